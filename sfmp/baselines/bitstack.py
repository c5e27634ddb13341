"""BitStack: every matrix a stack of levels (sign bits times a product of low rank), loaded up to a byte budget.

    scaled weight R = W diag(s); per level: sign(R), |R| ~ U V of rank k, R -= sign(R) * U V
    order of the levels of all matrices: by level, inside a level by the perplexity with this one raised alone

The scale s is divided into the stored V, which leaves the sum of the levels exactly the approximation of W
itself: s is positive and one number a column, so it passes through sign and product, and costs no byte.

Source: METHOD.md section 2.5 (arXiv 2410.23918).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from sfmp import evaluate
from sfmp.baselines import bitstack_hf
from sfmp.baselines.bitstack_linear import BitStackLinear, level_bytes, pack_signs
from sfmp.baselines.outcome import Outcome, stored_bytes
from sfmp.checks import SfmpError, integer, token_ids
from sfmp.cost import CostRecord
from sfmp.salience import linear_modules
from sfmp.walk import observe, run_model

SKIP = ("lm_head",)
SCALE_FLOOR = 1e-3  # added to a channel's norm, METHOD.md 2.5
FULL_WINDOWS, FULL_SORT_WINDOWS, FULL_LEVELS = 256, 32, 16  # of the publication
FULL_TOKENS = 2048  # of a sort window; METHOD.md leaves the length of the other windows open


class Stack(NamedTuple):
    """Levels of one matrix as they are stored: arguments of `BitStackLinear`."""

    signs: torch.Tensor  # uint8 [levels, N, ceil(K / 8)]
    left: torch.Tensor  # float16 [levels, N, k]
    right: torch.Tensor  # float16 [levels, k, K]

    def first(self, levels: int) -> Stack:
        """The first `levels` levels."""
        return Stack(*(tensor[:levels] for tensor in self))

    def dequantize(self) -> torch.Tensor:
        """Their sum, float32 [N, K]."""
        return BitStackLinear(*self, in_features=self.right.shape[-1]).dequantize()


def channel_scales(model: nn.Module, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scale of every input channel of every linear: the mean over windows of its norm over tokens, + 1e-3.

    Parameters
    ----------
    model : nn.Module
    windows : int64 [n, seqlen]

    Returns
    -------
    dict of str to Tensor float32 [K]
        Divided by the root of its extremes' product: a common factor changes no level, and without it the
        stored float16 factors could overflow. All ones for a matrix that no token reached.

    Notes
    -----
    Source: METHOD.md section 2.5.
    """
    linears = linear_modules(model, SKIP)
    norms = {name: torch.zeros(m.in_features, dtype=torch.float64, device=m.weight.device)
             for name, m in linears.items()}
    calls = dict.fromkeys(linears, 0)

    def see(name, args, kwargs):
        (value,) = (*args, *kwargs.values())
        norms[name] += value.detach().reshape(-1, value.shape[-1]).double().norm(dim=0)
        calls[name] += 1

    device = next(model.parameters()).device
    with observe(linears, see):
        for window in windows:  # one at a time: a norm is of one sequence, whatever the architecture flattens
            run_model(model, window[None].to(device))
    found = {name: total / max(1, calls[name]) + SCALE_FLOOR for name, total in norms.items()}
    return {name: (scale / (scale.max() * scale.min()).sqrt()).float() for name, scale in found.items()}


def decompose(weight: torch.Tensor, channel_scale: torch.Tensor | None, n_levels: int, rank: int) -> Stack:
    """Stack of levels of one matrix.

    Parameters
    ----------
    weight : floating [N, K]
    channel_scale : float32 [K] of positive numbers, or None for all ones
    n_levels : int
    rank : int
        Of the product that stands for the magnitudes; at most min(N, K).

    Returns
    -------
    Stack
        Each level takes its residual from the float16 factors as stored, so later levels also make up for
        their rounding. sign(0) is +1.

    Raises
    ------
    SfmpError
        If the weight is not finite, or a factor overflows float16.

    Notes
    -----
    Source: METHOD.md section 2.5.
    """
    rank = integer("rank", rank, 1, min(weight.shape))
    n_levels = integer("n_levels", n_levels, 1)
    scale = torch.ones(weight.shape[1], device=weight.device) if channel_scale is None else channel_scale
    residual = weight.detach().float() * scale
    if not bool(residual.isfinite().all()):
        raise SfmpError("weight: expected finite numbers, found NaN or infinity; check the model")
    levels = []
    for _ in range(n_levels):
        positive = residual >= 0
        left, right = _low_rank(residual.abs(), rank)
        left, right = left.half(), (right / scale).half()
        if not bool(left.isfinite().all() & right.isfinite().all()):
            raise SfmpError("weight: a factor overflows float16, expected magnitudes below 65504; rescale the layer")
        magnitude = left.float() @ (right.float() * scale)
        residual -= torch.where(positive, magnitude, -magnitude)
        levels.append((pack_signs(positive), left, right))
    return Stack(*(torch.stack(parts) for parts in zip(*levels, strict=True)))


def _low_rank(matrix, rank):
    """Factors [N, k], [k, K] of the best product of rank k, sharing each singular value evenly.

    From the eigenvectors of the smaller Gram matrix, which are cheaper than a whole SVD. Given U, the right
    factor Uᵀ A is the best there is, so an error of U in float32 enters the product's error squared only.
    """
    if matrix.shape[0] > matrix.shape[1]:
        left, right = _low_rank(matrix.T, rank)
        return right.T, left.T
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:].flip(-1)
    right = vectors.T @ matrix
    root = right.norm(dim=1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return vectors * root, right / root[:, None]


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


def quantize(model, windows, bpw, *, seed=0, group_size=None, rank=16, n_levels=16, n_windows=256,
             sort_windows=32) -> Outcome:
    """Quantize `model` in place by BitStack to a budget of bytes.

    Parameters
    ----------
    model, windows, bpw, seed
        As in :func:`sfmp.baselines.quantize`; the budget is all bytes a matrix stores. No choice is random.
    group_size : ignored
        There are no groups; the interface passes one to every method.
    rank : int
        Of the magnitudes of a level; a level costs 1 + 16 rank (N + K) / (N K) bits per weight.
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
    linears = linear_modules(model, SKIP)
    windows = token_ids("windows", windows, model)
    n_levels = integer("n_levels", n_levels, 1)
    sizes = {name: level_bytes(*linear.weight.shape, rank) for name, linear in linears.items()}
    budget = _Budget(bpw, sizes, sum(linear.weight.numel() for linear in linears.values()), n_levels)
    scale_windows, order_windows = _spread(windows, n_windows), _spread(windows, sort_windows)
    cost, longer = CostRecord(), FULL_TOKENS / windows.shape[1]
    training = {name for name, module in model.named_modules() if module.training}
    model.eval()
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
        layer = BitStackLinear(*stack, bias, in_features=linear.in_features)
        model.set_submodule(name, layer.train(name in training))
    for name in training:
        model.get_submodule(name).training = True
    knobs = {"rank": rank, "n_levels": n_levels, "n_windows": len(scale_windows), "sort_windows": len(order_windows)}
    bitstack_hf.attach(model, knobs)
    stored = sum(stored_bytes(model).values())
    notes = {"knobs": knobs, "levels": loaded, "order_of_last_level": [name for _, name in order],
             "budget_bytes": budget.bytes}
    return Outcome(model, 8 * stored / budget.weights, stored, cost, None, notes)


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


def _spread(windows, count):
    """`count` windows evenly spaced, all of them if there are fewer."""
    count = min(integer("windows", count, 1), len(windows))
    return windows[torch.arange(count) * len(windows) // count]
