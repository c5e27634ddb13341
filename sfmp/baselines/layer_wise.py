"""Layer-wise oracle: SFMP's salience and closed form with one bit-width per matrix, no reordering.

The coarsest granularity of the comparison, and what a search over layers (AMQ) aims at, without the search.

Source: METHOD.md section 2.4 (compact version), section 4 A5.
"""

from __future__ import annotations

import numpy as np

from sfmp.allocate import allocate
from sfmp.apply import quantize_model
from sfmp.baselines.amq import plan_of
from sfmp.baselines.outcome import Outcome, stored_bytes
from sfmp.baselines.sfmp import FULL_TOKENS, FULL_WINDOWS
from sfmp.checks import SfmpError
from sfmp.cost import CostRecord
from sfmp.reorder import as_numpy
from sfmp.salience import SALIENCE_SOURCES, linear_modules
from sfmp.spec import QuantSpec


def quantize(model, windows, bpw, *, seed=0, group_size=128, salience="fisher", method="awq",
             levels=(2, 3, 4)) -> Outcome:
    """Quantize `model` in place with one bit-width per matrix.

    Parameters
    ----------
    model, windows, bpw, seed
        As in :func:`sfmp.baselines.quantize`.
    group_size : int
    salience : str or mapping of str to Tensor [N, K]
        A name of `SALIENCE_SOURCES`, computed from `windows`; or salience that is at hand.
    method : str
        Quantizer: "awq", "gptq" or "rtn".
    levels : tuple of int
        Allowed bit-widths.

    Returns
    -------
    Outcome
        Stages ``salience``, ``allocation``, ``quantization``; `bpw` is at most the budget.

    Raises
    ------
    SfmpError
        If the budget cannot be reached with these levels, or the salience does not fit the model.
    """
    linears = linear_modules(model)
    spec = QuantSpec(bpw=bpw, group_size=group_size, levels=levels, reorder="none", method=method, seed=seed,
                     block_rows=max(linear.out_features for linear in linears.values()))
    cost, source = CostRecord(), salience if isinstance(salience, str) else "given"
    if isinstance(salience, str):
        if salience not in SALIENCE_SOURCES:
            raise SfmpError(f"salience: expected one of {', '.join(SALIENCE_SOURCES)} or a mapping, found "
                            f"{salience!r}")
        with cost.stage("salience", unit="window") as stage:
            salience = SALIENCE_SOURCES[salience](model, windows, seed)
            stage.units = stage.evaluations = len(windows)
            stage.full_units, stage.unit_scale = FULL_WINDOWS, FULL_TOKENS / np.shape(windows)[-1]
    with cost.stage("allocation"):
        bits, filled = allocate_layers(salience, {n: tuple(m.weight.shape) for n, m in linears.items()}, spec)
        plan = plan_of(spec, model, bits)
    with cost.stage("quantization", unit="matrix") as stage:
        quantize_model(model, plan, windows)
        stage.units = stage.full_units = len(plan)
    notes = {"knobs": {"group_size": group_size, "salience": source, "method": method,
                       "levels": list(spec.candidate_levels)},
             "wbits": plan.wbits, "filled": filled}
    return Outcome(model, plan.bpw, sum(stored_bytes(model).values()), cost, plan, notes)


def allocate_layers(salience, shapes, spec):
    """Bits of every matrix: the closed form on its summed salience, then what still fits.

    Parameters
    ----------
    salience : mapping of str to array or Tensor [N, K]
    shapes : dict of str to (int, int)
    spec : QuantSpec

    Returns
    -------
    bits : dict of str to int
    filled : list of str
        Matrices raised one level after the closed form, in order. Its threshold stops at the first step that
        does not fit; with matrices as blocks that step is a large share of the budget, and smaller ones may fit.

    Raises
    ------
    SfmpError
        If a matrix has no salience, of its shape, finite and at least 0.
    """
    names, levels = sorted(shapes), spec.candidate_levels
    weights = np.array([shapes[name][0] * shapes[name][1] for name in names], dtype=np.int64)
    sums = np.array([_total(name, salience, shapes[name]) for name in names])
    losses = sums[:, None] / (2.0 ** np.array(levels) - 1.0) ** 2  # objective "paper"
    budget = spec.budget_bits(int(weights.sum()))
    place = np.searchsorted(levels, allocate(losses, weights, levels, budget, sums))
    filled, room = [], budget - int(np.array(levels)[place] @ weights)
    while True:
        steps = []
        for index in np.flatnonzero(place < len(levels) - 1):
            at = place[index]
            price = (levels[at + 1] - levels[at]) * int(weights[index])
            if price <= room:
                steps.append(((losses[index, at] - losses[index, at + 1]) / price, -index, price))
        if not steps:
            break
        _, index, price = max(steps)  # best gain per bit; among equals the first name
        place[-index] += 1
        room -= price
        filled.append(names[-index])
    return {name: levels[at] for name, at in zip(names, place, strict=True)}, filled


def _total(name, salience, shape):
    if name not in salience:
        raise SfmpError(f"salience: expected an entry for {name!r}, found none; compute it for this model")
    matrix = as_numpy(salience[name])
    if matrix.shape != shape or not np.isfinite(matrix).all() or (matrix < 0).any():
        raise SfmpError(f"salience[{name}]: expected finite numbers >= 0 of shape {shape}, found shape "
                        f"{matrix.shape}; compute it for this model")
    return float(matrix.sum(dtype=np.float64))
