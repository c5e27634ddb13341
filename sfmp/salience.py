"""How much the loss depends on each weight: empirical Fisher, streamed in fp32; simpler sources."""

import contextlib
import importlib
import json
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import nn

from sfmp.checks import SfmpError, is_skipped, write_atomically
from sfmp.readers import InputRecord, Salience
from sfmp.unfuse import is_linear, on_linears
from sfmp.windows import one_window

LossFn = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def linear_modules(model: nn.Module, skip: Iterable[str] = ("lm_head",)) -> dict[str, nn.Linear]:
    """Return every nn.Linear of the module tree by dotted name, in module order, without the skipped ones.

    A module reachable by several names appears once, under the first. Raises SfmpError if none is left.
    """
    found = {name: module for name, module in model.named_modules()
             if is_linear(module) and not is_skipped(name, skip)}
    if not found:
        raise SfmpError(f"model: expected at least one nn.Linear outside skip={tuple(skip)}, "
                        f"found none in {type(model).__name__}")
    return found


def causal_lm_loss(model: nn.Module, window: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token cross-entropy of one window, as the model computes it.

    `window` is integers [seqlen] or [1, seqlen], a tensor, an array or a list; anything else is an SfmpError.
    """
    window = one_window(model, window, "loss_fn(model, window)")
    loss = getattr(model(input_ids=window, labels=window), "loss", None)
    if loss is None:
        raise SfmpError(f"model: expected {type(model).__name__} to return .loss for labels, found none; "
                        "pass loss_fn(model, window)")
    return loss


@on_linears
def fisher_salience(model: nn.Module, windows, *, skip: Iterable[str] = ("lm_head",), progress: bool = False,
                    loss_fn: LossFn | None = None) -> dict[str, torch.Tensor]:
    """Sum squared per-sample gradients of every linear weight: the diagonal of the empirical Fisher matrix.

    Parameters
    ----------
    model : nn.Module
        Any module tree and device, float32 or bfloat16 (float16 gradients may underflow: a warning says so).
        Left as found: gradient flags, gradients, modes.
    windows : integers [n, seqlen], or any iterable of samples that `loss_fn` understands
        One backward pass each (batch 1), so gradients are squared per sample.
    skip : names of linear layers to leave out, full or last component
    progress : bool
        Show a progress bar.
    loss_fn : callable (model, sample) -> scalar, optional
        Default `causal_lm_loss`.

    Returns
    -------
    Salience, a dict name -> float32 CPU tensor [N, K]
        sum_n (dL_n/dW)^2. A weight shared by several modules gets the gradient of all its uses. Its `readers` say
        which matrices read the same activations.

    Raises
    ------
    SfmpError
        If there is no linear layer or no sample, a window is not one sequence of token ids, a loss is not a
        finite scalar or depends on no linear weight, or a salience is not finite (named).

    Notes
    -----
    Peak memory is the model, the activations of one sample, one gradient and the fp32 accumulators: a hook
    squares and frees each gradient as soon as it is made. Squares and sums are fp32 whatever the dtype.
    Source: METHOD.md 1.2; avoids 1.12 #1.
    """
    layers = linear_modules(model, skip)
    weights = {name: layer.weight for name, layer in layers.items()}
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise SfmpError(f"{name}.weight: expected floating point, found {weight.dtype}; is it quantized?")
    if any(weight.dtype == torch.float16 for weight in weights.values()):
        warnings.warn("fisher_salience: the model is float16, whose gradients underflow below 6e-8; load it in "
                      "float32 or bfloat16", stacklevel=2)
    sums = {weight: torch.zeros_like(weight, dtype=torch.float32, requires_grad=False)
            for weight in weights.values()}
    reached = set()

    def consume(weight):
        gradient = weight.grad.float()
        weight.grad = None
        sums[weight].addcmul_(gradient, gradient)
        reached.add(weight)

    with gradients_only_for(model, sums), contextlib.ExitStack() as hooks:
        record = hooks.enter_context(InputRecord(layers))
        for weight in sums:
            hooks.callback(weight.register_post_accumulate_grad_hook(consume).remove)
        backward_passes(model, windows, loss_fn, "salience", progress)
    unused = [name for name, weight in weights.items() if weight not in reached]
    if unused:
        warnings.warn(f"no gradient reached {', '.join(unused)}: their salience is zero", stacklevel=3)
    bypassed = record.leave_bypassed(name for name, weight in weights.items() if weight in reached)
    kept = {name: sums[weight] for name, weight in weights.items() if name not in bypassed}
    return finished(kept, record.groups())


def backward_passes(model: nn.Module, windows, loss_fn: LossFn | None, title: str, progress: bool) -> None:
    """Run one forward and backward pass per sample for its hooks' sake; arguments as in `fisher_salience`.

    Raises SfmpError if there is no sample, or a loss is not a finite scalar that depends on what wants gradients.
    """
    loss_fn, count = loss_fn or causal_lm_loss, -1
    with torch.enable_grad():
        for count, window in enumerate(_progress(windows, title, progress)):
            loss = loss_fn(model, window)
            if not torch.is_tensor(loss) or loss.numel() != 1 or not loss.requires_grad:
                raise SfmpError(f"loss of window {count}: expected a scalar that depends on a linear weight, "
                                f"found {loss!r}")
            if not torch.isfinite(loss):
                raise SfmpError(f"loss of window {count}: expected a finite number, found {loss.item()}; "
                                "load the model in float32 or bfloat16 and check the window")
            loss.backward()
    if count < 0:
        raise SfmpError("windows: expected at least one sample, found none")


@on_linears
def magnitude_salience(model: nn.Module, *, skip: Iterable[str] = ("lm_head",)) -> dict[str, torch.Tensor]:
    """Return |W| of every linear layer, float32 [N, K]; needs no data. Source: METHOD.md section 4, A1."""
    return finished({name: layer.weight.detach().float().abs()
                      for name, layer in linear_modules(model, skip).items()})


@on_linears
def activation_salience(model: nn.Module, windows, *, skip: Iterable[str] = ("lm_head",),
                        progress: bool = False, forward: Callable | None = None) -> dict[str, torch.Tensor]:
    """Return |W| times the root mean square of its input column, float32 [N, K]: forward passes only.

    `windows` as in `fisher_salience`; `forward` (model, sample) defaults to feeding token ids.
    Source: METHOD.md section 4, A1.
    """
    layers = linear_modules(model, skip)
    forward = forward or (lambda model, window: model(input_ids=one_window(model, window, "forward(model, window)")))
    squares = {layer: torch.zeros(layer.in_features, dtype=torch.float64) for layer in layers.values()}
    tokens = dict.fromkeys(squares, 0)

    def observe(layer, inputs):
        rows = inputs[0].detach().reshape(-1, layer.in_features).double()
        squares[layer] += rows.square().sum(0).cpu()
        tokens[layer] += len(rows)

    with gradients_only_for(model, ()), contextlib.ExitStack() as hooks, torch.no_grad():
        record = hooks.enter_context(InputRecord(layers))
        for layer in squares:
            hooks.callback(layer.register_forward_pre_hook(observe).remove)
        for window in _progress(windows, "activations", progress):
            forward(model, window)
    unseen = [name for name, layer in layers.items() if not tokens[layer]]
    if len(unseen) == len(layers):
        raise SfmpError(f"{unseen[0]}: expected inputs, found none in these windows; use more or skip it")
    if unseen:
        warnings.warn(f"no token reached {', '.join(unseen)}: their salience is zero", stacklevel=3)
    return finished({name: layer.weight.detach().float().abs().cpu()
                      * (squares[layer] / max(tokens[layer], 1)).sqrt().float() for name, layer in layers.items()},
                    record.groups())


@on_linears
def random_salience(model: nn.Module, seed: int = 0, *,
                    skip: Iterable[str] = ("lm_head",)) -> dict[str, torch.Tensor]:
    """Return uniform random numbers in [0, 1), float32 [N, K], a function of seed, layer name and shape only.

    The control of the ablation: an allocation that knows nothing. Source: METHOD.md section 4, A1.
    """
    result = {}
    for name, layer in linear_modules(model, skip).items():
        generator = np.random.default_rng((seed, zlib.crc32(name.encode())))
        result[name] = torch.from_numpy(generator.random(tuple(layer.weight.shape), dtype=np.float32))
    return result


# Every source under one signature, (model, windows, seed=0, **options): a run picks its source by name.
SALIENCE_SOURCES: dict[str, Callable] = {
    "fisher": lambda model, windows, seed=0, **options: fisher_salience(model, windows, **options),
    "magnitude": lambda model, windows=None, seed=0, **options: magnitude_salience(model, **options),
    "activation": lambda model, windows, seed=0, **options: activation_salience(model, windows, **options),
    "guided": lambda model, windows, seed=0, **options: importlib.import_module(
        "sfmp.baselines.guided").guided_salience(model, windows, **options),
    "random": lambda model, windows=None, seed=0, **options: random_salience(model, seed, **options),
}


def save_salience(salience: Mapping[str, torch.Tensor], path, meta: Mapping | None = None) -> None:
    """Write name -> float32 [N, K], its `readers` if known and JSON-able `meta` to one safetensors file, atomically."""
    from safetensors.numpy import save_file

    tensors = {name: _checked(name, torch.as_tensor(value)).numpy() for name, value in salience.items()}
    # One metadata key only: safetensors writes several in an order that differs from run to run.
    readers = getattr(salience, "readers", None)
    known = {} if readers is None else {"readers": readers}
    record = {"sfmp_salience": json.dumps({"format_version": 1, **(meta or {}), **known}, sort_keys=True)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=record))


def load_salience(path) -> Salience:
    """Read what `save_salience` wrote; raises SfmpError naming a matrix that is negative, NaN or infinite."""
    with _opened(path) as file:
        readers = _record(path, file).get("readers")
        return Salience({name: _checked(f"{path}: {name}", file.get_tensor(name)) for name in file.keys()}, readers)


def salience_meta(path) -> dict:
    """Return the `meta` stored with a salience file."""
    with _opened(path) as file:
        return {key: value for key, value in _record(path, file).items() if key != "readers"}


def _record(path, file):
    record = (file.metadata() or {}).get("sfmp_salience")
    if record is None:
        raise SfmpError(f"{path}: expected a file written by save_salience, found another safetensors file")
    meta = json.loads(record)
    if meta.pop("format_version", None) != 1:
        raise SfmpError(f"{path}: expected salience of format_version 1; compute it again with this version")
    return meta


@contextlib.contextmanager
def _opened(path):
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise SfmpError(f"{path}: expected a file of save_salience, found a damaged one: {error}") from error
    with file as opened:
        yield opened


@contextlib.contextmanager
def gradients_only_for(model, wanted):
    """Evaluation mode, gradients for the wanted parameters only and no cache of keys; restores everything."""
    modes = {module: module.training for module in model.modules()}
    parameters = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    config = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    try:
        model.eval()
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(parameter in wanted)
        if cache is not None:
            config.use_cache = False
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, (requires, gradient) in parameters.items():
            parameter.requires_grad_(requires)
            parameter.grad = gradient
        if cache is not None:
            config.use_cache = cache


def _progress(items, title, show):
    if not show:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc=title, unit="window")


def _checked(name, value):
    value = value.detach().float().cpu().contiguous()
    if value.ndim != 2 or value.numel() == 0:
        raise SfmpError(f"{name}: expected a salience matrix [N, K], found shape {tuple(value.shape)}")
    low, high = torch.aminmax(value)  # NaN propagates, and no mask as large as the matrix is made
    if not (low >= 0 and high < torch.inf):
        raise SfmpError(f"{name}: expected finite salience >= 0, found {_worst(value)}; "
                        "compute it again with the model in float32 or bfloat16")
    return value


def _worst(value):
    for title, mask in (("NaN", value.isnan()), ("infinite", value.isinf()), ("negative", value < 0)):
        if mask.any():
            return f"{int(mask.sum())} {title} of {value.numel()} values"


def finished(salience: Mapping[str, torch.Tensor], readers=None) -> Salience:
    """Return every matrix as float32 on the CPU; raises SfmpError naming one that is negative or not finite."""
    return Salience({name: _checked(name, value) for name, value in salience.items()}, readers)
