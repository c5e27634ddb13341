"""How much the loss depends on each weight: empirical Fisher, streamed in fp32; simpler sources."""

import contextlib
import importlib
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import nn

from sfmp.checks import SfmpError, is_skipped
from sfmp.progress import bar
from sfmp.readers import InputRecord
from sfmp.salience_file import finished, load_salience, salience_meta, save_salience
from sfmp.salience_memory import accumulators, checkpointed
from sfmp.unfuse import is_linear, on_linears
from sfmp.windows import one_window

__all__ = ["SALIENCE_SOURCES", "activation_salience", "backward_passes", "causal_lm_loss", "check_in_memory",
           "finished", "fisher_salience", "gradients_only_for", "linear_modules", "load_salience", "magnitude_salience",
           "random_salience", "salience_meta", "save_salience"]
LossFn = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def linear_modules(model: nn.Module, skip: Iterable[str] = ("lm_head",)) -> dict[str, nn.Linear]:
    """Return every nn.Linear of the module tree by dotted name, in module order, without the skipped ones.

    A module reachable by several names appears once, under the first. Raises SfmpError if none is left.
    """
    found = {name: module for name, module in model.named_modules()
             if is_linear(module) and not is_skipped(name, skip)}
    if not found:
        own = sorted({type(module).__name__ for module in model.modules() if isinstance(module, nn.Linear)
                      and not is_linear(module)})
        but = f" but {', '.join(own)}, which compute in a way of their own" if own else ""
        raise SfmpError(f"model: expected at least one nn.Linear outside skip={tuple(skip)}, "
                        f"found none in {type(model).__name__}{but}")
    return found


def check_in_memory(layers: Mapping[str, nn.Linear], what: str) -> None:
    """Raise SfmpError if weights are on the meta device, as those are that a device map left on the CPU or on disk."""
    away = [name for name, layer in layers.items() if layer.weight.is_meta]
    if away:
        raise SfmpError(f"{what}: expected every weight in memory, found {len(away)} of {len(layers)} matrices "
                        f"offloaded by the device map, first {away[0]}; use `sfmp quantize --device cuda` (or "
                        "cpu), which holds one layer at a time, or GPUs that hold the whole model")


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
                    loss_fn: LossFn | None = None, checkpointing: bool = False,
                    accumulate=None) -> dict[str, torch.Tensor]:
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
    checkpointing : bool
        Keep only what enters each layer and compute the rest again: less memory, a third more time, the same numbers.
    accumulate : None, "cpu" or path of a folder
        Where the sums are: beside the weights, in the memory of the CPU, or in files there, which the result maps: a
        folder for each call.

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
    squares and frees each gradient as soon as it is made; `sfmp.stream_salience` needs one layer of it at a time.
    Squares and sums are fp32 whatever the dtype.
    Source: METHOD.md 1.2; avoids 1.12 #1.
    """
    layers = linear_modules(model, skip)
    check_in_memory(layers, "fisher_salience")
    weights = {name: layer.weight for name, layer in layers.items()}
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise SfmpError(f"{name}.weight: expected floating point, found {weight.dtype}; is it quantized?")
    if any(weight.dtype == torch.float16 for weight in weights.values()):
        warnings.warn("fisher_salience: the model is float16, whose gradients underflow below 6e-8; load it in "
                      "float32 or bfloat16", stacklevel=2)
    sums = accumulators(weights.values(), accumulate)
    reached = set()

    def consume(weight):
        gradient = weight.grad.to(sums[weight].device, torch.float32)
        weight.grad = None
        sums[weight].addcmul_(gradient, gradient)
        reached.add(weight)

    with gradients_only_for(model, sums), checkpointed(model, layers, checkpointing), contextlib.ExitStack() as hooks:
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
        for count, window in enumerate(bar(windows, title, "window", progress)):
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
    layers = linear_modules(model, skip)
    check_in_memory(layers, "magnitude_salience")
    return finished({name: layer.weight.detach().float().abs() for name, layer in layers.items()})


@on_linears
def activation_salience(model: nn.Module, windows, *, skip: Iterable[str] = ("lm_head",),
                        progress: bool = False, forward: Callable | None = None) -> dict[str, torch.Tensor]:
    """Return |W| times the root mean square of its input column, float32 [N, K]: forward passes only.

    `windows` as in `fisher_salience`; `forward` (model, sample) defaults to feeding token ids.
    Source: METHOD.md section 4, A1.
    """
    layers = linear_modules(model, skip)
    check_in_memory(layers, "activation_salience")
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
        for window in bar(windows, "activations", "window", progress):
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
