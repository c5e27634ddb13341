"""Granularity oracle: every single weight has its own bit-width, chosen by the paper's rule on its own salience.

No hardware could run this and the index of the levels costs as much as it saves, so it is no rival but a bound:
what SFMP's rule reaches when a block is one weight. The values are those of the group grids of rounding to
nearest, so the only thing that differs from SFMP with that quantizer is the size of a block.

Source: METHOD.md section 1.3 (Eq. 7) and experiment A5.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from sfmp.baselines.outcome import Outcome
from sfmp.checks import SfmpError
from sfmp.cost import CostRecord
from sfmp.quantize import column_chunks, dequantize
from sfmp.quantize import quantize as group_affine
from sfmp.reorder import as_numpy, permutations
from sfmp.salience import SALIENCE_SOURCES, linear_modules
from sfmp.spec import QuantSpec

FULL_WINDOWS, FULL_TOKENS = 100, 512  # of the paper's salience, METHOD.md 1.2


def quantize(model, windows, bpw, *, seed=0, group_size=128, salience="fisher", levels=(2, 3, 4), reorder="both",
             skip=("lm_head",)) -> Outcome:
    """Quantize every weight of `model` at its own bit-width, in place; the model stays an ordinary dense one.

    Parameters
    ----------
    model, windows, bpw, seed
        As in :func:`sfmp.baselines.quantize`; `bpw` is the paper's account, without the index of the levels.
    group_size : int
        Columns that share a range.
    salience : str or mapping of str to Tensor [N, K]
        A name of `SALIENCE_SOURCES`, computed from `windows`; or salience that is at hand.
    levels : tuple of int
        Bit-widths, increasing within 2..8.
    reorder : {"both", "rows", "cols", "none"}
        Groups are consecutive columns of the order that SFMP would use; the order of the rows changes nothing.
    skip : tuple of str
        Linear layers left alone.

    Returns
    -------
    Outcome
        `plan` is None. `stored_bytes` is what would have to be stored (:func:`element_bytes`). Stages
        ``salience``, ``allocation``, ``quantization``.

    Raises
    ------
    SfmpError
        If the budget is out of reach of the levels, a level is 1, or the salience does not match the model.

    Notes
    -----
    Source: METHOD.md section 4, A5.
    """
    spec = QuantSpec(bpw=bpw, group_size=group_size, block_rows=1, levels=levels, reorder=reorder, method="rtn",
                     skip=skip, seed=seed)
    levels = spec.candidate_levels
    if levels[0] < 2:
        raise SfmpError("levels: expected bit-widths of at least 2, found 1; the two values of a 1-bit weight do not "
                        "follow from the range of its group, so they could not share its storage")
    cost = CostRecord()
    knobs = {"group_size": group_size, "salience": salience if isinstance(salience, str) else "given",
             "levels": list(levels), "reorder": reorder, "skip": list(skip)}
    if isinstance(salience, str):
        with cost.stage("salience", unit="window") as stage:
            salience = SALIENCE_SOURCES[salience](model, windows, seed, skip=skip)
            stage.units = stage.evaluations = len(windows)
            stage.full_units, stage.unit_scale = FULL_WINDOWS, FULL_TOKENS / windows.shape[-1]
    layers = _distinct(linear_modules(model, skip))
    for name, layer in layers.items():
        if name not in salience or tuple(salience[name].shape) != tuple(layer.weight.shape):
            found = tuple(salience[name].shape) if name in salience else "nothing of that name"
            raise SfmpError(f"salience[{name}]: expected shape {tuple(layer.weight.shape)} as in the model, found "
                            f"{found}")
    with cost.stage("allocation"):
        flat = np.concatenate([as_numpy(salience[name]).ravel() for name in layers])
        bits = element_bits(flat, levels, spec.budget_bits(flat.size))
    stored, at = 0, 0
    with cost.stage("quantization", unit="matrix") as stage:
        for name, layer in layers.items():
            weight, cols = layer.weight, permutations(salience[name], reorder)[1]
            chosen = bits[at:at + weight.numel()].reshape(weight.shape)
            at += weight.numel()
            try:
                rebuilt = element_values(weight.detach(), chosen, cols, levels, group_size)
            except SfmpError as error:
                raise SfmpError(f"{name}: {error}") from error
            weight.data.copy_(rebuilt)
            stored += element_bytes(chosen, cols, len(levels), group_size)
        stage.units = stage.full_units = len(layers)
    counts = {str(level): int((bits == level).sum()) for level in levels}
    notes = {"knobs": knobs, "weights_at_level": counts, "index_bits": _index_bits(len(levels))}
    mean = int(bits.sum(dtype=np.int64)) / bits.size
    return Outcome(model, mean + 32 / group_size, stored, cost, None, notes)


def element_bits(salience, levels, budget_bits: int) -> np.ndarray:
    """Choose one level per weight: thresholds on the salience, exact in the budget.

    Parameters
    ----------
    salience : array [n], >= 0
    levels : sequence of int, increasing
    budget_bits : int

    Returns
    -------
    uint8 [n]
        Least ``sum salience / (2^b - 1)^2`` for the bits used, which are less than one step below the budget.

    Raises
    ------
    SfmpError
        If a salience is negative or not finite, or the lowest level alone exceeds the budget.

    Notes
    -----
    The loss of every weight is convex in its bits, so sorting all steps by loss removed per bit and taking the
    longest prefix that fits takes the steps of a weight in order. Ties go to lower steps, then to earlier weights.
    Source: METHOD.md 1.3, with blocks of one weight.

    Examples
    --------
    >>> element_bits([1.0, 9.0, 0.1], (2, 3, 4), 9).tolist()
    [3, 4, 2]
    """
    salience, levels = np.asarray(salience, dtype=np.float64), np.asarray(levels, dtype=np.int64)
    if salience.size and not (salience.min() >= 0 and np.isfinite(salience.max())):
        raise SfmpError("salience: expected finite numbers >= 0; compute it again in float32 or bfloat16")
    room = int(budget_bits) - int(levels[0]) * salience.size
    if room < 0:
        raise SfmpError(f"budget: expected at least {int(levels[0]) * salience.size} bits (every weight at "
                        f"{levels[0]}), found {budget_bits}; raise bpw or add a lower level")
    step = np.diff(levels)
    worth = -np.diff(1.0 / (2.0**levels - 1.0) ** 2) / step
    order = np.argsort((-worth[:, None] * salience).ravel(), kind="stable")
    taken = order[:np.searchsorted(np.cumsum(step[order // max(1, salience.size)]), room, side="right")]
    bits = np.full(salience.size, levels[0], dtype=np.uint8)
    for index, gained in enumerate(step):
        bits[taken[taken // max(1, salience.size) == index] % max(1, salience.size)] += np.uint8(gained)
    return bits


def element_values(weight, bits, col_perm, levels, group_size) -> torch.Tensor:
    """Round every weight to the nearest value of its group's grid at its own bit-width.

    Parameters
    ----------
    weight : Tensor [N, K], natural order
    bits : uint8 [N, K], natural order
    col_perm : int64 [K]
        A group is `group_size` consecutive columns of this order.
    levels : sequence of int
    group_size : int

    Returns
    -------
    float32 Tensor [N, K], natural order
        The grid of every level follows from one range per group, its extremes rounded to fp16: what is stored
        does not grow with the number of levels.
    """
    cols = torch.as_tensor(col_perm, device=weight.device)
    permuted = weight.to(torch.float32)[:, cols]
    chosen = torch.as_tensor(bits, device=weight.device)[:, cols]
    rows, columns = permuted.shape
    lower = torch.empty(rows, -(-columns // group_size), dtype=torch.float32, device=weight.device)
    upper = torch.empty_like(lower)
    for column, group, count, width in column_chunks(columns, group_size):
        part = permuted[:, column].reshape(rows, count, width)
        lower[:, group], upper[:, group] = part.amin(-1).half().float(), part.amax(-1).half().float()
    values = torch.empty_like(permuted)
    for level in levels:
        one_level = np.full((1, lower.shape[1]), level, dtype=np.uint8)
        grid = group_affine(permuted, one_level, group_size=group_size, block_rows=rows, lower=lower, upper=upper)
        values = torch.where(chosen == level, dequantize(grid), values)
    natural = torch.empty_like(values)
    natural[:, cols] = values
    return natural


def element_bytes(bits, col_perm, levels: int, group_size: int) -> int:
    """Bytes of one matrix: codes, two fp16 numbers per group, the level of every weight, the order of the columns.

    ``ceil(sum(bits) / 8) + 4 N ceil(K / group_size) + ceil(N K ceil(log2(levels)) / 8)``, and 2 K more (4 K above
    65,536 columns) unless the columns are in natural order.
    """
    rows, columns = bits.shape
    code_bits, index_bits = int(bits.sum(dtype=np.int64)), rows * columns * _index_bits(levels)
    moved = not np.array_equal(col_perm, np.arange(columns))
    order = columns * (2 if columns <= 1 << 16 else 4) if moved else 0
    return -(-code_bits // 8) + 4 * rows * -(-columns // group_size) + -(-index_bits // 8) + order


def _index_bits(levels: int) -> int:
    return math.ceil(math.log2(levels))


def _distinct(layers):
    """Layers by name; a weight that several of them share appears once."""
    first = {}
    for name, layer in layers.items():
        first.setdefault(id(layer.weight), (name, layer))
    return dict(first.values())
