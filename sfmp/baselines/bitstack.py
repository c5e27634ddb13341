"""BitStack: every matrix a stack of levels (sign bits times a product of low rank), loaded up to a byte budget.

The levels of all matrices stand in one order: by level, inside a level by the perplexity with this one raised
alone. A model of any size is a prefix of it.

Source: METHOD.md section 2.5 (arXiv 2410.23918).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from sfmp import evaluate
from sfmp.baselines import bitstack_hf
from sfmp.baselines.bitstack_levels import Stack, channel_scales, decompose
from sfmp.baselines.bitstack_linear import BitStackLinear, level_bytes
from sfmp.baselines.outcome import Outcome, stored_bytes
from sfmp.checks import SfmpError, integer, token_ids
from sfmp.cost import CostRecord
from sfmp.salience import linear_modules

FULL_WINDOWS, FULL_SORT_WINDOWS, FULL_LEVELS = 256, 32, 16  # of the publication
FULL_RANK, FULL_WIDTH = 16, 4096  # its rank, and the width of the models it was chosen for
FULL_TOKENS = 2048  # of a sort window; METHOD.md leaves the length of the other windows open


def universal_order(model: nn.Module, stacks: Mapping[str, Stack], windows: torch.Tensor,
                    levels: Iterable[int] | None = None) -> list[tuple[int, str]]:
    """Order in which the levels of all matrices are loaded.

    Parameters
    ----------
    model : nn.Module
        Its linears are left holding weights of the stacks.
    stacks : mapping of str to Stack
    windows : int64 [n, seqlen]
    levels : iterable of int, optional
        Levels to sort, counted from 2; by default all there are. No order depends on another level's, so a
        budget that ends inside one level needs that level only.

    Returns
    -------
    list of (level, name)
        Level l of a matrix comes after all of level l - 1; inside a level the lowest perplexity, with this
        matrix at l and all others at l - 1, comes first; equal ones keep the order of the model. Level 1 is
        in the order of the model.

    Notes
    -----
    Source: METHOD.md section 2.5.
    """
    linears = {name: model.get_submodule(name) for name in stacks}
    depth = len(next(iter(stacks.values())).signs)
    order = [(1, name) for name in stacks]
    for level in range(2, depth + 1) if levels is None else levels:
        for name, linear in linears.items():
            _set_weight(linear, stacks[name].first(level - 1))
        found = {}
        for name, linear in linears.items():
            held = linear.weight
            _set_weight(linear, stacks[name].first(level))
            found[name] = evaluate.perplexity(model, windows, windows.shape[1])
            linear.weight = held
        order += [(level, name) for name in sorted(found, key=found.get)]
    return order


def _set_weight(linear, stack):
    linear.weight = nn.Parameter(stack.dequantize().to(linear.weight.dtype), requires_grad=False)


def quantize(model, windows, bpw, *, seed=0, group_size=None, rank=None, n_levels=16, n_windows=256,
             sort_windows=32) -> Outcome:
    """Quantize `model` in place by BitStack to a budget of bytes.

    Parameters
    ----------
    model, windows, bpw, seed
        As in :func:`sfmp.baselines.quantize`; the budget is all bytes a matrix stores. No choice is random.
    group_size : ignored
        There are no groups; the interface passes one to every method.
    rank : int, optional
        Of the magnitudes of a level; a level costs 1 + 16 rank (N + K) / (N K) bits per weight. Published: 16. By
        default what costs at the width of this model as much as 16 does at 4096 (:func:`default_rank`): 16 for
        models that wide or wider, less for narrow ones, where one level of rank 16 would exceed the budget.
    n_levels : int
        Levels of a whole stack.
    n_windows, sort_windows : int
        Windows for the channel scales and for the perplexities of the order, evenly spaced; all if there are
        fewer.

    Returns
    -------
    Outcome
        Stages ``activation scales``, ``decomposition``, ``sorting``; no plan. ``notes`` has the levels of
        every matrix. Only levels within the budget are computed, and only the level it ends in is sorted:
        what is loaded is the same prefix of the same order, and the cost record extrapolates to the whole.

    Raises
    ------
    SfmpError
        If the budget does not hold one level of every matrix.

    Notes
    -----
    Loading stops at the first level that does not fit, as a prefix of one order for all budgets must, though
    a smaller one may come later. Source: METHOD.md section 2.5.
    """
    linears = linear_modules(model)
    windows = token_ids("windows", windows, model)
    rank = default_rank(linear.weight.shape for linear in linears.values()) if rank is None else rank
    rank = integer("rank", rank, 1, min(min(linear.weight.shape) for linear in linears.values()))
    n_levels = integer("n_levels", n_levels, 1)
    sizes = {name: level_bytes(*linear.weight.shape, rank) for name, linear in linears.items()}
    budget = _Budget(bpw, sizes, sum(linear.weight.numel() for linear in linears.values()), n_levels)
    scale_windows = _spread("n_windows", windows, n_windows)
    order_windows = _spread("sort_windows", windows, sort_windows)
    cost, longer = CostRecord(), FULL_TOKENS / windows.shape[1]
    with _left_as_it_was(model, linears):
        with cost.stage("activation scales", unit="model evaluation") as stage:
            scales = channel_scales(model, scale_windows)
            stage.units = stage.evaluations = len(scale_windows)
            stage.full_units, stage.unit_scale = FULL_WINDOWS, longer
        with cost.stage("decomposition", unit="SVD") as stage:
            stacks = {name: _named(name, linear, scales[name], budget.depth, rank) for name, linear in linears.items()}
            stage.units, stage.full_units = len(linears) * budget.depth, len(linears) * FULL_LEVELS
        with cost.stage("sorting", unit="model evaluation") as stage:
            sorted_levels = [budget.depth] if budget.depth > budget.whole_levels else []
            order = universal_order(model, stacks, order_windows, sorted_levels)[len(linears):]
            stage.units, stage.full_units = len(order), len(linears) * (FULL_LEVELS - 1)
            stage.evaluations = len(order) * len(order_windows)
            stage.unit_scale = longer * FULL_SORT_WINDOWS / len(order_windows)
    loaded = budget.load([name for _, name in order])
    for name, linear in linears.items():
        stack = Stack(*(tensor.clone() for tensor in stacks[name].first(loaded[name])))  # frees the rest
        bias = None if linear.bias is None else linear.bias.detach()
        model.set_submodule(name, BitStackLinear(*stack, bias, in_features=linear.in_features).train(linear.training))
    knobs = {"rank": rank, "n_levels": n_levels, "n_windows": len(scale_windows), "sort_windows": len(order_windows)}
    bitstack_hf.attach(model, knobs)
    stored = sum(stored_bytes(model).values())
    notes = {"knobs": knobs, "levels": loaded, "order_of_last_level": [name for _, name in order],
             "budget_bytes": budget.bytes}
    return Outcome(model, 8 * stored / budget.weights, stored, cost, None, notes)


def default_rank(shapes: Iterable[tuple[int, int]]) -> int:
    """Rank that weighs in matrices of these shapes [N, K] as the published 16 does in a square one of 4096.

    The width is the largest of the shorter sides; no wider model gets more than 16.

    Examples
    --------
    >>> default_rank([(4096, 4096), (14336, 4096)]), default_rank([(128, 256), (768, 256)])
    (16, 1)
    """
    width = max(min(shape) for shape in shapes)
    return min(FULL_RANK, max(1, FULL_RANK * width // FULL_WIDTH))


@contextlib.contextmanager
def _left_as_it_was(model, linears):
    """Evaluation mode inside; afterwards, also after an error, modules have their modes and linears their weights."""
    training = [module for module in model.modules() if module.training]
    weights = {name: linear.weight for name, linear in linears.items()}
    model.eval()
    try:
        yield
    finally:
        for name, linear in linears.items():
            linear.weight = weights[name]
        for module in training:
            module.training = True


class _Budget:
    """How far a number of bytes reaches into the universal order."""

    def __init__(self, bpw, sizes, weights, n_levels):
        self.sizes, self.weights = sizes, weights
        self.bytes = math.floor(bpw * weights / 8)
        one = sum(sizes.values())
        self.whole_levels = min(n_levels, self.bytes // one)
        if not self.whole_levels:
            raise SfmpError(f"bpw: expected at least {8 * one / weights:.4f}, the first level of every matrix at this "
                            f"rank, found {bpw:g}; raise bpw or lower rank")
        rest = self.bytes - self.whole_levels * one
        partial = self.whole_levels < n_levels and rest >= min(sizes.values())
        self.depth = self.whole_levels + partial  # levels that anything of is loaded

    def load(self, order) -> dict[str, int]:
        """Levels loaded of each matrix, given the order inside the level where the budget ends."""
        loaded = dict.fromkeys(self.sizes, self.whole_levels)
        rest = self.bytes - self.whole_levels * sum(self.sizes.values())
        for name in order:
            if self.sizes[name] > rest:
                break
            rest -= self.sizes[name]
            loaded[name] += 1
        return loaded


def _named(name, linear, scale, depth, rank):
    try:
        return decompose(linear.weight, scale, depth, rank)
    except SfmpError as error:
        raise SfmpError(f"{name}: {error}") from error


def _spread(name, windows, count):
    """`count` windows evenly spaced, all of them if there are fewer."""
    count = min(integer(name, count, 1), len(windows))
    return windows[torch.arange(count) * len(windows) // count]
