"""quantize_model: replace every planned nn.Linear of a model by an SFMPLinear, in place.

Layers are done one after the other.  Inside a layer everything is float32, whatever the dtype of the model;
AWQ hands the full-precision output of a layer to the next one, GPTQ the output of the quantized layer.

Source: METHOD.md sections 1.6, 1.7; DESIGN.md section 3.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections import Counter

import torch

from sfmp.awq import SEARCH_TOKENS, search_layer
from sfmp.heap import give_back
from sfmp.linear import SFMPLinear
from sfmp.pack import pack
from sfmp.quantize import dequantize
from sfmp.readers import weights_read_elsewhere
from sfmp.salience import check_in_memory
from sfmp.solvers import SOLVERS, Stats, rtn
from sfmp.spec import SfmpError
from sfmp.trace import shared_inputs
from sfmp.unfuse import expose_linears, is_linear, linears_exposed, unknown_fused
from sfmp.walk import Batch, as_float32, capture, find_layers, in_float32, is_chain, observe, run_layer
from sfmp.windows import batches_of, checked_windows, probe_of


def quantize_model(model, plan, windows=None, *, progress=False, solver=None, new_stats=Stats):
    """Quantize a model in place by a plan.

    Parameters
    ----------
    model : nn.Module
        Any module tree; float32, bfloat16 or float16.
    plan : Plan
        Bits and permutations of each linear layer to replace (Conv1D and fused experts as `sfmp.unfuse` shows them);
        ``plan.spec.method`` chooses rtn, awq or gptq.
    windows : Tensor, array or list, optional
        Calibration input, needed by awq and gptq: integer token ids [n, seqlen], or float [n, ...] for a
        model that is fed features.
    progress : bool
        Show a progress bar over matrices.
    solver : callable, optional
        ``(weight, stats, matrix_plan, spec) -> Quantized`` in the place of the one ``plan.spec.method`` names
        (sfmp.solvers); the bits it returns may differ from the plan's.
    new_stats : callable
        Makes the empty `Stats` of each matrix under gptq; a subclass may keep more of the inputs it is given.

    Returns
    -------
    nn.Module
        The same model.  ``model.sfmp_report`` is a JSON-able account: per matrix the relative weight error
        and what the solver noted (AWQ exponent, GPTQ damping), and the scale groups that had to be refused.

    Raises
    ------
    SfmpError
        If a planned matrix is missing, is no nn.Linear or has another shape, if windows are missing or
        unusable, or if a weight cannot be quantized; the matrix is named.

    Notes
    -----
    Source: METHOD.md 1.6 (awq), 1.7 (gptq), 1.5 (rtn).  Deterministic: equal inputs give equal codes.
    """
    method = plan.spec.method
    if method != "rtn":
        windows = checked_windows(model, windows, method)
    linears = planned_linears(model, plan)
    warn_of_unknown(model)
    training = [name for name, module in model.named_modules() if module.training]
    model.eval()
    report = {"method": method, "matrices": {}, "refused": []}
    try:
        with _bar(len(linears), progress) as done:
            job = Job(model, plan, linears, report, done, solver or SOLVERS[method], new_stats)
            if method == "rtn":
                for name in linears:
                    job.replace({name: job.solve(name, linears[name].weight.detach(), None)})
            else:
                job.calibrated(windows)
    finally:
        for name in training:  # by name: most of these modules have just been replaced
            model.get_submodule(name).training = True
    for sentence in report["refused"]:
        warnings.warn(f"awq: {sentence}", stacklevel=2)
    model.sfmp_report = report
    from sfmp.hf import attach

    attach(model, plan)
    return model


def warn_of_unknown(model) -> None:
    """Warn of parameters that hold several matrices in a way nobody here knows: they are not quantized."""
    left = unknown_fused(model)
    if left:
        warnings.warn(f"{', '.join(left)}: these 3-D parameters stay as they are; only linear layers, Conv1D and the "
                      "fused experts of transformers are quantized", stacklevel=3)


class Job:
    """One call of quantize_model."""

    def __init__(self, model, plan, linears, report, done, solver, new_stats):
        self.model, self.plan, self.spec, self.report, self.done = model, plan, plan.spec, report, done
        self.linears, self.solver, self.new_stats = linears, solver, new_stats
        # Also modules count: a module mounted twice must not be scaled for one of its places only.
        uses = Counter(id(p) for m in _mounted(model) for p in m._parameters.values() if p is not None)
        self.shared = frozenset(key for key, count in uses.items() if count > 1)

    def solve(self, name, weight, stats):
        """Quantize one matrix; errors name it."""
        solver = self.solver
        if self.spec.method == "gptq" and stats is not None and stats.tokens == 0:
            warnings.warn(f"gptq: no calibration token reached {name}; rounded it to nearest", stacklevel=4)
            solver = rtn
        give_back()
        try:
            quantized = solver(weight.to(torch.float32), stats, self.plan[name], self.spec)
        except SfmpError as error:
            raise SfmpError(f"{name}: {error}") from error
        self.done()
        return quantized

    def natural(self, name, quantized):
        """Dequantized weight in natural order."""
        rows, columns = (torch.as_tensor(p) for p in (self.plan[name].row_perm, self.plan[name].col_perm))
        weight = torch.empty_like(quantized.codes, dtype=torch.float32)
        weight[rows[:, None], columns] = dequantize(quantized)
        return weight

    def replace(self, quantized):
        """Put SFMPLinear modules in the place of quantized linears."""
        for name, q in quantized.items():
            linear, matrix = self.linears[name], self.plan[name]
            original = linear.weight.detach().to(torch.float32)
            error = (self.natural(name, q) - original).norm() / original.norm().clamp_min(1e-30)
            self.report["matrices"].setdefault(name, {})["relative_error"] = float(error)
            # One row block needs no padding beyond the matrix: the bit map is the same, the planes are not.
            block_rows = min(q.block_rows, len(q.codes))
            packed = pack(
                q.codes, q.scales, q.zeros, q.bits, group_size=q.group_size, block_rows=block_rows,
                row_perm=matrix.row_perm, col_perm=matrix.col_perm, bias=linear.bias,
            )
            parent, _, child = name.rpartition(".")
            module = SFMPLinear.from_packed(packed).to(linear.weight.device).eval()
            setattr(self.model.get_submodule(parent), child, module)

    def calibrated(self, windows):
        """Quantize with calibration: stacks of layers, and what is outside of them."""
        stacks = [
            stack for stack in find_layers(self.model, self.linears)
            if is_chain(self.model, [layer for _, layer in stack], probe_of(windows))
        ]
        prefixes = [prefix for stack in stacks for prefix, _ in stack]
        inside = [n for n in self.linears if any(n == p or n.startswith(p + ".") for p in prefixes)]
        outside = [name for name in self.linears if name not in inside]
        # AWQ works on the full-precision model, GPTQ on what comes out of the layers already quantized.
        if outside and self.spec.method == "awq":
            self.stack([("", self.model)], windows, outside)
        for stack in stacks:
            self.stack(stack, windows, inside)
        if outside and self.spec.method == "gptq":
            self.stack([("", self.model)], windows, outside)

    def stack(self, stack, windows, names):
        """Quantize the named linears of one stack of layers."""
        layers, whole = [layer for _, layer in stack], stack[0][1] is self.model
        groups = [probe_of(windows), *batches_of(windows, SEARCH_TOKENS)]
        if whole:
            device = next(self.model.parameters()).device
            batches = [Batch(as_float32(group.to(device))) for group in groups]
        else:
            batches = capture(self.model, layers, groups)
        for index, (prefix, layer) in enumerate(stack):
            self.one_layer(prefix, layer, batches, index, names, last=whole or index == len(stack) - 1)

    def one_layer(self, prefix, layer, batches, index, names, last):
        """Quantize the named linears of one layer; carry the batches on unless it is the last."""
        start = f"{prefix}." if prefix else ""
        inner = {n[len(start):]: n for n in names if n.startswith(start) and self._linear_at(n)}
        dtypes = {p.dtype for p in layer.parameters() if p.is_floating_point()}
        dtype = next(iter(dtypes)) if len(dtypes) == 1 else torch.float32
        step = self._awq if self.spec.method == "awq" else self._gptq
        with in_float32(layer, leave=(SFMPLinear,)):
            self._check_called(layer, inner, batches[0], index)
            quantized = step(layer, inner, batches, index, dtype, last)
        self.replace(quantized)

    def _check_called(self, layer, inner, probe, index):
        """Refuse linears whose weight other code multiplies by: Fisher salience leaves them out, others do not."""
        watched = {name: layer.get_submodule(short) for short, name in inner.items()}
        if wrong := weights_read_elsewhere(watched, lambda: run_layer(layer, probe, index)):
            short = sorted({name.rpartition(".")[2] for name in wrong})
            raise SfmpError(f"{wrong[0]}: expected a linear layer that is called, found its weight read by other code, "
                            f"so it cannot be replaced; skip it (--skip lm_head {' '.join(short)})")

    def _linear_at(self, name):
        """Whether the linear is still to be replaced (a layer that is run twice is quantized once)."""
        return self.model.get_submodule(name) is self.linears[name]

    def _awq(self, layer, inner, batches, index, dtype, last):
        """Scales, clip ranges, codes; full-precision outputs go on."""
        probe, *rest = batches
        probe_output = run_layer(layer, probe, index)
        planned = {short: self.plan[name] for short, name in inner.items()}
        found = search_layer(layer, planned, rest, probe, index, self.spec, dtype, self.shared)
        outputs, stats, refused = found
        where = next(iter(inner.values()), "")
        self.report["refused"] += [f"{sentence} (layer of {where})" for sentence in refused]
        quantized = {}
        for short, name in inner.items():
            quantized[name] = self.solve(name, layer.get_submodule(short).weight.detach(), stats[short])
            self.report["matrices"].setdefault(name, {}).update(stats[short].notes)
        if not last:
            for batch, hidden in zip(batches, [probe_output, *outputs], strict=True):
                batch.hidden = hidden
        return quantized

    def _gptq(self, layer, inner, batches, index, dtype, last):
        """Hessians, codes; outputs of the quantized layer go on."""
        probe, *rest = batches
        leaders = shared_inputs(layer, probe, index, inner) if inner else {}
        stats = {short: self.new_stats() for short in inner}

        def see(short, args, kwargs):
            if leaders.get(short, short) == short:
                stats[short].add(args[0].detach())

        if inner:
            with observe({short: layer.get_submodule(short) for short in inner}, see):
                for batch in rest:
                    run_layer(layer, batch, index)
        quantized = {}
        for short, name in inner.items():
            own = dataclasses.replace(stats[leaders.get(short, short)], notes={})
            quantized[name] = self.solve(name, layer.get_submodule(short).weight.detach(), own)
            self.report["matrices"].setdefault(name, {}).update(own.notes)
        if not last:
            held = {}
            for short, name in inner.items():
                linear = layer.get_submodule(short)
                held[linear] = linear.weight.data
                linear.weight.data = self.natural(name, quantized[name]).to(linear.weight.device)
            for batch in batches:
                batch.hidden = run_layer(layer, batch, index)
            for linear, weight in held.items():
                linear.weight.data = weight
        return quantized


def planned_linears(model, plan):
    """The planned modules by name, checked against the plan; what holds one as Conv1D or fused experts is replaced."""
    with linears_exposed(model):  # every complaint comes before anything is replaced
        _check_modules(model, plan)
    expose_linears(model, plan)
    modules = dict(model.named_modules())
    return {name: modules[name] for name in plan}


def _check_modules(model, plan):
    modules = dict(model.named_modules())
    for name, matrix in plan.items():
        module = modules.get(name)
        if module is None or not is_linear(module):
            found = "nothing of that name" if module is None else type(module).__name__
            raise SfmpError(f"{name}: the plan expects an nn.Linear, found {found}; is it for this model?")
        if tuple(module.weight.shape) != matrix.shape:
            found = tuple(module.weight.shape)
            raise SfmpError(f"{name}: the plan expects shape {matrix.shape}, found {found}")
    check_in_memory({name: modules[name] for name in plan}, "quantize_model")


def _mounted(model):
    """Every place of every module, with repetition."""
    yield model
    for child in model._modules.values():
        if child is not None:
            yield from _mounted(child)


@contextlib.contextmanager
def _bar(total, progress):
    """A progress bar over matrices, or nothing."""
    if not progress:
        yield lambda: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="quantize", unit="matrix") as bar:
        yield bar.update
