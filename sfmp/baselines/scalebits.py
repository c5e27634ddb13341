"""ScaleBITS, our reading: greedy by measured error in batches, with the sensitivity refreshed on the way.

Only the abstract of the publication is available to us: a hardware-aligned partition in blocks, channels reordered in
both directions from a sensitivity analysis, and a global allocation by a scalable approximation of the greedy
algorithm. Everything else here (the number of rounds, the refresh, the batch) is ours, so this is a compact version
in its spirit and no number of it is a number of theirs. It differs from SFMP in what it calls the loss of a block
(the measured error, not a model of it) and in that it looks again at the model that it has quantized so far.

Source: METHOD.md section 2.9 (ScaleBITS, arXiv 2602.17698).
"""

from __future__ import annotations

import contextlib

import numpy as np
import torch

from sfmp.allocate import block_problem, level_losses
from sfmp.apply import quantize_model
from sfmp.baselines.outcome import Outcome, stored_bytes
from sfmp.checks import SfmpError, integer
from sfmp.cost import CostRecord
from sfmp.quantize import dequantize
from sfmp.quantize import quantize as group_affine
from sfmp.reorder import apply, as_numpy
from sfmp.salience import SALIENCE_SOURCES
from sfmp.spec import QuantSpec

FULL_WINDOWS, FULL_TOKENS = 100, 512  # of the paper's salience, METHOD.md 1.2
ROUNDS = 10


def quantize(model, windows, bpw, *, seed=0, group_size=128, block_rows=512, levels=(2, 3, 4), salience="fisher",
             method="awq", rounds=ROUNDS, refreshes=None, refresh_windows=None) -> Outcome:
    """Quantize `model` in place by the compact ScaleBITS.

    Parameters
    ----------
    model, windows, bpw, seed
        As in :func:`sfmp.baselines.quantize`.
    group_size, block_rows, levels, method
        Fields of :class:`sfmp.spec.QuantSpec`.
    salience : str or mapping of str to Tensor [N, K]
        A name of `SALIENCE_SOURCES`, computed from `windows`; or salience that is at hand, which decides the
        order of rows and columns and the first round (later ones refresh the Fisher salience).
    rounds : int
        Batches of the greedy; each spends an equal share of the bits above the lowest level.
    refreshes : int, optional
        How often the sensitivity is computed again, evenly between rounds; after every round but the last if None.
    refresh_windows : int, optional
        Windows of a refresh, evenly spaced; all if None.

    Returns
    -------
    Outcome
        Stages ``salience``, ``greedy allocation`` (unit: round), ``sensitivity refresh`` (unit: window),
        ``quantization``. The bits used are less than one step of a block below the budget.

    Raises
    ------
    SfmpError
        If a knob is out of range, or the budget is out of reach of the levels.

    Notes
    -----
    Source: METHOD.md section 2.9, compact version.
    """
    spec = QuantSpec(bpw=bpw, group_size=group_size, block_rows=block_rows, levels=levels, reorder="both",
                     method=method, objective="measured", seed=seed)
    rounds = integer("rounds", rounds, 1)
    refreshes = rounds - 1 if refreshes is None else integer("refreshes", refreshes, 0, rounds - 1)
    count = len(windows) if refresh_windows is None else integer("refresh_windows", refresh_windows, 1)
    few = windows[torch.arange(min(count, len(windows))) * len(windows) // min(count, len(windows))]
    cost, scale = CostRecord(), FULL_TOKENS / windows.shape[-1]
    source = SALIENCE_SOURCES[salience if isinstance(salience, str) else "fisher"]
    knobs = {"group_size": group_size, "block_rows": block_rows, "levels": list(spec.candidate_levels),
             "salience": salience if isinstance(salience, str) else "given", "method": method, "rounds": rounds,
             "refreshes": refreshes, "refresh_windows": len(few)}
    if isinstance(salience, str):
        with cost.stage("salience", unit="window") as stage:
            salience = source(model, windows, seed)
            stage.units = stage.evaluations = len(windows)
            stage.full_units, stage.unit_scale = FULL_WINDOWS, scale
    with cost.stage("greedy allocation", unit="round") as stage:
        problem = block_problem(salience, spec, model)
        losses, weights, _ = problem.arrays()
        bits = np.full(len(weights), spec.candidate_levels[0], dtype=np.uint8)
    floor = int(spec.candidate_levels[0] * weights.sum())
    room, history = spec.budget_bits(int(weights.sum())) - floor, []
    # A refresh comes before the rounds that are nearest to equal parts of the way.
    refreshed_before = {(index + 1) * rounds // (refreshes + 1) for index in range(refreshes)}
    for index in range(rounds):
        if index in refreshed_before:
            with cost.stage("sensitivity refresh", unit="window") as stage:
                with swapped_in(model, problem.plan(bits)):
                    current = source(model, few, seed)
                stage.units += len(few)
                stage.evaluations += len(few)
                stage.full_units, stage.unit_scale = (ROUNDS - 1) * FULL_WINDOWS, scale
            with cost.stage("greedy allocation"):
                losses = np.concatenate([
                    level_losses(name, as_numpy(current[name]), *problem.permuted[name], grid, spec, model)
                    for name, grid in problem.grids.items()
                ])
        with cost.stage("greedy allocation") as stage:
            before = bits
            bits = promote(losses, weights, spec.candidate_levels, bits, floor + room * (index + 1) // rounds)
            stage.units, stage.full_units = index + 1, ROUNDS
        history.append({"refreshed": index in refreshed_before, "promoted": int((bits != before).sum()),
                        "code_bits": int((bits * weights).sum())})
    with cost.stage("quantization", unit="matrix") as stage:
        plan = problem.plan(bits)
        quantize_model(model, plan, windows)
        stage.units = stage.full_units = len(plan)
    notes = {"knobs": knobs, "rounds": history}
    return Outcome(model, plan.bpw, sum(stored_bytes(model).values()), cost, plan, notes)


def promote(losses, weights, levels, bits, budget_bits: int) -> np.ndarray:
    """Raise blocks by one level each, those that remove most loss per bit first, until the budget is reached.

    Parameters
    ----------
    losses : float64 [blocks, levels]
    weights : int64 [blocks]
    levels : sequence of int, increasing
    bits : uint8 [blocks]
        Where the blocks stand; not modified.
    budget_bits : int
        Total code bits allowed after this batch.

    Returns
    -------
    uint8 [blocks]
        A block may rise by more than one level only if every block that can rise has risen by one. Ties go to the
        earlier block.

    Raises
    ------
    SfmpError
        If the blocks already use more than the budget.
    """
    levels = np.asarray(levels, dtype=np.int64)
    at, room = np.searchsorted(levels, bits), int(budget_bits) - int((np.asarray(bits, np.int64) * weights).sum())
    if room < 0:
        raise SfmpError(f"budget: expected at least the bits in use, found {-room} bits less")
    while (able := np.flatnonzero(at < len(levels) - 1)).size:
        costs = weights[able] * (levels[at[able] + 1] - levels[at[able]])
        gains = (losses[able, at[able]] - losses[able, at[able] + 1]) / costs
        order = np.argsort(-gains, kind="stable")
        fitting = int(np.searchsorted(np.cumsum(costs[order]), room, side="right"))
        at[able[order[:fitting]]] += 1
        room -= int(costs[order[:fitting]].sum())
        if fitting < len(able):
            break
    return levels[at].astype(np.uint8)


@contextlib.contextmanager
def swapped_in(model, plan):
    """Hold the planned weights rounded to nearest at the bits of the plan while inside; they come back exactly."""
    held = []
    try:
        for name, matrix in plan.items():
            weight = model.get_submodule(name).weight
            held.append((weight, weight.data))
            rows, cols = (torch.as_tensor(p, device=weight.device) for p in (matrix.row_perm, matrix.col_perm))
            permuted = apply(weight.data.to(torch.float32), matrix.row_perm, matrix.col_perm)
            rebuilt = dequantize(group_affine(permuted, matrix.bits, group_size=plan.spec.group_size,
                                              block_rows=plan.spec.block_rows))
            natural = torch.empty_like(rebuilt)
            natural[rows[:, None], cols] = rebuilt
            weight.data = natural.to(weight.dtype)
        yield model
    finally:
        for weight, data in reversed(held):  # a weight planned twice was last seen already rounded
            weight.data = data
