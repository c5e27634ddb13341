"""AWQ: search a scale for every scale group and a clip range for every weight group, one layer at a time.

Both searches see the real block-mixed quantizer (salience order, bit map, stored fp16 numbers).  Scales are
folded into the operation before, so the layer still computes what it did; clip ranges are handed to the
``rtn`` solver. Searches use the first batch of the walk (`SEARCH_TOKENS` tokens at most, evenly spaced
windows); mean |x| uses all.

Source: METHOD.md sections 1.6, 2.2 (AWQ, arXiv 2306.00978).
"""

from __future__ import annotations

import torch

from sfmp.heap import give_back
from sfmp.quantize import column_chunks, decode, dequantize, encode, group_parameters, quantize, row_bits
from sfmp.scale_groups import NO_CLIP, ScaleGroup, find_groups, fold
from sfmp.solvers import Stats
from sfmp.trace import shared_inputs
from sfmp.walk import first_tensor, observe, run_layer

GRID = 20  # exponents r = 0, 1/20, ..., 19/20 of mean|x|
SMALLEST = 1e-4  # floor of a scale before it is normalised
SHRINK = tuple(1.0 - step / 20.0 for step in range(10))  # clip factors 1, 0.95, ..., 0.55
SEARCH_TOKENS = 2048


def search_layer(layer, planned, batches, probe, index, spec, dtype, shared=frozenset()):
    """Find and fold the scales of one layer and find the clip ranges of its linears.

    Parameters
    ----------
    layer : nn.Module
        In float32 and evaluation mode; its weights are scaled in place.
    planned : dict of str to MatrixPlan
        Names inside the layer.
    batches : list of Batch
        Full-precision inputs of the layer; the searches use the first.
    probe : Batch
        A short batch on which groups are proved.
    index : int
        Place of the layer among the calls of a batch.
    spec : QuantSpec
    dtype : torch.dtype
        The dtype the layer will be stored in.
    shared : collection of int
        ``id`` of parameters used elsewhere in the model.

    Returns
    -------
    outputs : list of Tensor float32
        Full-precision output of the layer for each batch.
    stats : dict of str to Stats
        Clip ranges per planned linear (none for linears no token reached, and for those of NO_CLIP); its
        notes hold the exponent of the scale.
    refused : list of str
        Groups that are not function-preserving and linears that no token reached, one sentence each.
    """
    groups, refused = find_groups(layer, probe, index, planned, shared)
    inspected = {g.inspect for g in groups if g.inspect not in g.linears}
    seen = _observe(layer, planned, inspected, groups, batches, probe, index)
    stats = {name: Stats() for name in planned}
    if planned and not groups and not refused:
        refused.append(f"found nothing that a scale for {', '.join(planned)} can be folded into; these linears are "
                       "quantized without an AWQ scale")
    unreached = [name for name in planned if name not in seen.inputs]
    if unreached:
        refused.append(f"no calibration token of the search reached {', '.join(unreached)}; rounded to nearest")
    for group in groups:
        if all(name in unreached for name in group.linears if name in planned):
            continue
        give_back()
        ratio, scale = search_scale(layer, group, planned, seen, spec)
        for name in group.linears:
            if name in planned:
                stats[name].notes["awq_exponent"] = ratio
        if ratio > 0.0:
            columns = fold(layer, group, scale, dtype)
            seen.scale(group.linears, columns)
    for name, matrix in planned.items():
        if name in seen.inputs and name.rpartition(".")[2] not in NO_CLIP:
            weight = layer.get_submodule(name).weight.detach()
            give_back()
            stats[name].lower, stats[name].upper = search_clip(weight, seen.inputs[name], matrix, spec)
    return seen.outputs, stats, refused


class _Seen:
    """What a full-precision pass over all batches showed about one layer."""

    def __init__(self):
        self.inputs = {}  # linear -> tokens [T, K] of the first batch
        self.calls = {}  # inspected module -> (args, kwargs) on the first batch
        self.outputs = []  # output of the layer per batch
        self._sums = {}  # linear -> (sum of |x| per channel, tokens), all batches

    def mean_abs(self, names):
        """Mean |x| per channel over what any of the linears read; a tensor that several read counts once."""
        sums = {id(self._sums[name]): self._sums[name] for name in names if name in self._sums}
        totals, tokens = zip(*sums.values(), strict=True)
        return sum(totals) / sum(tokens)

    def scale(self, names, columns):
        """Divide the inputs of linears; those that read one tensor go on sharing it."""
        scaled = {}
        for name in names:
            if name in self.inputs:
                inputs = self.inputs[name]
                self.inputs[name] = scaled.setdefault(id(inputs), (inputs, inputs / columns))[1]

    def add(self, name, tokens):
        total, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = (total + tokens.abs().sum(0), count + tokens.shape[0])


def _observe(layer, planned, inspected, groups, batches, probe, index) -> _Seen:
    """Run all batches through the layer once."""
    seen = _Seen()
    leaders = shared_inputs(layer, probe, index, planned)
    linears = {*planned, *(group.linears[0] for group in groups)}
    watched = {name: layer.get_submodule(name) for name in sorted(linears | inspected)}

    def see(name, args, kwargs):
        if name in inspected and first:
            seen.calls[name] = (args, kwargs)
        if name in linears and leaders.get(name, name) == name:
            tokens = args[0].detach().reshape(-1, args[0].shape[-1])
            seen.add(name, tokens)
            if first:
                kept = seen.inputs.get(name)
                seen.inputs[name] = tokens if kept is None else torch.cat([kept, tokens])

    with observe(watched, see):
        for number, batch in enumerate(batches):
            first = number == 0
            seen.outputs.append(run_layer(layer, batch, index))
    for name, leader in leaders.items():
        if leader in seen.inputs:
            seen.inputs[name], seen._sums[name] = seen.inputs[leader], seen._sums[leader]
    return seen


def search_scale(layer, group: ScaleGroup, planned, seen, spec):
    """Best exponent r and the scale mean|x|**r of a group, by the output error of its inspected module.

    Returns
    -------
    ratio : float
        0.0 leaves the group unscaled.
    scale : Tensor float32 [channels of the previous operation]
        Normalised so that sqrt(max * min) = 1.
    """
    channels = group.channels(layer)
    weights = {name: layer.get_submodule(name).weight.detach() for name in group.linears if name in planned}
    strength = seen.mean_abs(group.linears)
    counts = torch.bincount(channels).to(strength.dtype)
    # Heads that read one channel (grouped-query attention) share its scale.
    strength = torch.zeros_like(counts).index_add_(0, channels, strength) / counts
    error = _module_error if group.inspect not in group.linears else _linear_error
    measure = error(layer, group, weights, seen)
    best, best_ratio, best_scale = float("inf"), 0.0, torch.ones_like(strength)
    for step in range(GRID):
        scale = strength.pow(step / GRID).clamp_min(SMALLEST)
        scale = scale / (scale.max() * scale.min()).sqrt()
        columns = scale[channels]
        loss = measure({
            name: round_trip(weight * columns, planned[name], spec) / columns
            for name, weight in weights.items()
        })
        if loss < best:
            best, best_ratio, best_scale = loss, step / GRID, scale
    return best_ratio, best_scale


def round_trip(weight, matrix, spec):
    """Quantize a natural-order weight with its plan and come back to natural order, float32 [N, K]."""
    rows = torch.as_tensor(matrix.row_perm, device=weight.device)
    columns = torch.as_tensor(matrix.col_perm, device=weight.device)
    permuted = weight[rows][:, columns]
    q = quantize(permuted, matrix.bits, group_size=spec.group_size, block_rows=spec.block_rows)
    result = torch.empty_like(weight)
    result[rows[:, None], columns] = dequantize(q)
    return result


def _linear_error(layer, group, weights, seen):
    """Output error of a single linear: through its Gram matrix when that is smaller than the tokens."""
    (name, weight), = weights.items()
    tokens = seen.inputs[name]
    gram = tokens.T @ tokens if tokens.shape[1] <= tokens.shape[0] else None

    def measure(candidate):
        difference = candidate[name] - weight
        if gram is None:
            return float((difference @ tokens.T).square().sum())
        return float(((difference @ gram) * difference).sum())

    return measure


def _module_error(layer, group, weights, seen):
    """Output error of a module (attention, mlp) on the arguments it was called with."""
    module = layer.get_submodule(group.inspect)
    args, kwargs = seen.calls[group.inspect]

    def output():
        with torch.no_grad():
            return first_tensor(module(*args, **kwargs))

    reference = output()

    def measure(candidate):
        held = {name: layer.get_submodule(name).weight.data for name in weights}
        try:
            for name, value in candidate.items():
                layer.get_submodule(name).weight.data = value
            return float((output() - reference).square().mean())
        finally:
            for name, value in held.items():
                layer.get_submodule(name).weight.data = value

    return measure


def search_clip(weight, tokens, matrix, spec):
    """Clip range of every (row, group) that gives the smallest output error of the group.

    Parameters
    ----------
    weight : Tensor float32 [N, K]
        Natural order, already scaled.
    tokens : Tensor float32 [T, K]
        Inputs of the linear, already scaled.
    matrix : MatrixPlan
    spec : QuantSpec

    Returns
    -------
    lower, upper : Tensor float32 [N, groups]
        Minimum and maximum shrunk by one common factor out of `SHRINK`, permuted order.

    Notes
    -----
    Source: METHOD.md 1.6.  The error of a group over tokens, sum_t (x_t . d)², is computed as dᵀ (XᵀX) d
    with the diagonal blocks of the Gram matrix, which is the same number for a fraction of the work.
    """
    rows = torch.as_tensor(matrix.row_perm, device=weight.device)
    columns = torch.as_tensor(matrix.col_perm, device=weight.device)
    weight, tokens = weight[rows][:, columns], tokens[:, columns]
    bits = row_bits(matrix.bits, weight.shape[0], spec.block_rows, weight.device)
    lower, upper = torch.empty_like(bits), torch.empty_like(bits)
    for column, group, count, width in column_chunks(weight.shape[1], spec.group_size):
        part = weight[:, column].reshape(-1, count, width)
        inputs = tokens[:, column].reshape(-1, count, width).transpose(0, 1)  # [count, T, width]
        gram = inputs.transpose(1, 2) @ inputs  # [count, width, width]
        low, high, width_bits = part.amin(-1), part.amax(-1), bits[:, group]
        best = torch.full_like(low, float("inf"))
        best_factor = torch.ones_like(low)
        for factor in SHRINK:
            scale, zero = group_parameters(part, width_bits, low * factor, high * factor)
            values = decode(encode(part, scale, zero, width_bits), scale, zero, width_bits)
            difference = (values - part).transpose(0, 1)  # [count, N, width]
            error = ((difference @ gram) * difference).sum(-1).T
            better = error < best
            best = torch.where(better, error, best)
            best_factor = torch.where(better, factor, best_factor)
        lower[:, group], upper[:, group] = low * best_factor, high * best_factor
    return lower, upper
