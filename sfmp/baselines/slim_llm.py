"""SliM-LLM: column groups of all rows trade bits by salience, then GPTQ with searched scales.

Per matrix: the salience of each group from the Hessian; the bits of the groups by the divergence of the outputs
(SBA, sfmp.baselines.slim_bits); the column update of GPTQ whose groups search their range (SQC,
sfmp.baselines.slim_scales).  Layer by layer, on what comes out of the layers already quantized.

Source: METHOD.md sections 2.3 and 2.1 (SliM-LLM, arXiv 2405.14917).
"""

from __future__ import annotations

import contextlib
import functools
import math

import numpy as np
import torch

from sfmp.apply import quantize_model
from sfmp.baselines.outcome import Outcome, stored_bytes
from sfmp.baselines.slim_bits import DIRECTIONS, Exchanges, SampledStats, candidates, group_salience
from sfmp.baselines.slim_scales import calibrated_parameters
from sfmp.baselines.uniform import uniform_plan
from sfmp.checks import SfmpError, integer
from sfmp.cost import CostRecord
from sfmp.hf import attach
from sfmp.solvers import compensation, round_columns
from sfmp.spec import MatrixPlan, Plan, QuantSpec
from sfmp.windows import checked_windows

LOWEST, HIGHEST = 2, 7  # base bits: a group may have one bit less or more, and codes have 1..8
FULL_WINDOWS, FULL_TOKENS = 128, 2048  # of the publication, METHOD.md 2.3


def quantize(model, windows, bpw, *, seed=0, group_size=128, n_windows=FULL_WINDOWS, sba_windows=FULL_WINDOWS,
             sba_tokens=None, sqc_steps=50, sqc_range=0.1, lam=1.0, kl="quantized"):
    """Quantize `model` in place by SliM-LLM.

    Parameters
    ----------
    model, windows, seed
        As in :func:`sfmp.baselines.quantize`; nothing is random, so `seed` changes nothing.
    bpw : float
        A whole number of code bits, 2..7, plus ``32 / group_size``; reached exactly.
    group_size : int
        Input columns of a group.
    n_windows : int
        Windows for the Hessians, evenly spaced; all if there are fewer.
    sba_windows : int
        Windows in whose outputs bit maps are compared; 0 leaves the bits uniform.
    sba_tokens : int or None
        Tokens of each of them, evenly spaced; all if None.
    sqc_steps : int
        Ranges tried on each side of min-max; 0 leaves min-max.
    sqc_range : float
        Distance of the outermost from 1.
    lam : float
        Weight of salient weights in the choice of a range.
    kl : str
        Direction of the divergence by which bit maps are compared: ``quantized``, published, is
        KL(softmax(x W_qᵀ) || softmax(x Wᵀ)); ``original`` is the reverse.

    Returns
    -------
    Outcome
        Stages ``hessian`` (the walk through the layers, packing included), ``column update (SQC + GPTQ)`` and
        ``bit search (SBA)``.  Notes: ``matrices`` holds bits, divergences and the rest per matrix,
        ``with_choice`` counts those with enough groups for a search, ``knobs`` has the amounts that were used.

    Raises
    ------
    SfmpError
        If the budget is no whole number of code bits or outside 2..7 of them, or a knob is invalid.

    Notes
    -----
    Source: METHOD.md 2.3.  The Hessian is damped as in GPTQ (1 % of the mean diagonal), not by an absolute
    0.01.  A matrix needs four whole groups before p = 1 exists; smaller ones stay uniform.
    The cost of the column update is not extrapolated over `sqc_steps`: with fewer ranges than published its
    `full_seconds` is a lower bound.
    """
    knobs = _checked_knobs(n_windows, sba_windows, sba_tokens, sqc_steps, sqc_range, lam, kl)
    plan = _starting_plan(model, bpw, group_size, seed)
    windows = checked_windows(model, windows, "slim_llm")
    given, length = len(windows), windows.shape[1]
    n_windows, sba_windows = min(n_windows, given), min(sba_windows, n_windows, given)
    windows = windows[torch.arange(n_windows) * given // n_windows]
    knobs |= {"n_windows": n_windows, "sba_windows": sba_windows, "sba_tokens": min(sba_tokens or length, length)}
    cost = CostRecord()
    run = _Run(cost, round(plan.wbits), sba_windows, kl,
               functools.partial(calibrated_parameters, steps=sqc_steps, spread=sqc_range, lam=lam))
    new_stats = functools.partial(SampledStats, windows=sba_windows, of=n_windows, tokens_each=sba_tokens,
                                  group_size=group_size)
    with run.walking():
        quantize_model(model, plan, windows, solver=run.solve, new_stats=new_stats)
        matrices = model.sfmp_report["matrices"]
        plan = _decided_plan(plan, matrices)
        attach(model, plan)
    _count(cost, plan, n_windows, sba_windows, length, knobs["sba_tokens"])
    notes = {
        "knobs": {"group_size": group_size, **knobs},
        "with_choice": sum(candidates(matrix.shape[1], group_size) > 1 for matrix in plan.values()),
        "matrices": {name: matrices[name] for name in plan},
    }
    return Outcome(model, plan.bpw, sum(stored_bytes(model).values()), cost, plan, notes)


class _Run:
    """The solver of one call: times its parts and leaves its decisions in the notes of each matrix."""

    def __init__(self, cost, base, sba_windows, kl, choose):
        self.cost, self.base, self.sba_windows, self.kl, self.choose = cost, base, sba_windows, kl, choose
        self.current = contextlib.ExitStack()

    @contextlib.contextmanager
    def walking(self):
        """Everything outside the solver belongs to the stage ``hessian``."""
        try:
            self._enter("hessian", "model evaluation")
            yield
        finally:
            self.current.close()

    def _enter(self, name, unit):
        """Leave the stage under way for another: stages do not nest."""
        self.current.close()
        return self.current.enter_context(self.cost.stage(name, unit))

    def solve(self, weight, stats, matrix, spec):
        """Bits of the groups, then their codes; see sfmp.solvers for the arguments."""
        # What is done once per matrix stays out of the search: its cost is extrapolated by candidates and windows.
        self._enter("column update (SQC + GPTQ)", "matrix").units += 1
        current, factor = compensation(weight, stats, matrix)
        salience = group_salience(current, factor, spec.group_size)
        exchanges = Exchanges(current, salience, self.base, spec.group_size, self.kl)
        search = self._enter("bit search (SBA)", "candidate x window")
        divergences = exchanges.divergences(stats.kept)
        search.units += len(divergences) * self.sba_windows
        p = int(np.argmin(divergences)) if divergences else 0  # ties go to the smaller p
        bits = exchanges.bits(p)
        self._enter("column update (SQC + GPTQ)", "matrix")
        quantized = round_columns(current, factor, bits[None], spec, self.choose)
        self._enter("hessian", "model evaluation")
        stats.notes.update(group_bits=bits.tolist(), p=p, divergences=divergences)
        return quantized


def _checked_knobs(n_windows, sba_windows, sba_tokens, sqc_steps, sqc_range, lam, kl):
    """The knobs as they go in the notes, or a clear error."""
    integer("n_windows", n_windows, 1)
    integer("sba_windows", sba_windows, 0)
    integer("sqc_steps", sqc_steps, 0)
    if sba_tokens is not None:
        integer("sba_tokens", sba_tokens, 1)
    if not 0.0 <= sqc_range < 1.0:
        raise SfmpError(f"sqc_range: expected a number in 0..1 (1 excluded), found {sqc_range!r}")
    if not (lam >= 0.0 and math.isfinite(lam)):
        raise SfmpError(f"lam: expected a finite number >= 0, found {lam!r}")
    if kl not in DIRECTIONS:
        raise SfmpError(f"kl: expected one of {', '.join(DIRECTIONS)}, found {kl!r}")
    return {"n_windows": n_windows, "sba_windows": sba_windows, "sba_tokens": sba_tokens,
            "sqc_steps": sqc_steps, "sqc_range": sqc_range, "lam": lam, "kl": kl}


def _starting_plan(model, bpw, group_size, seed) -> Plan:
    """Uniform bits, in a plan that allows one bit less and more; columns in natural order."""
    overhead = 32 / integer("group_size", group_size, 1)
    if not LOWEST - 0.5 < bpw - overhead < HIGHEST + 0.5:
        raise SfmpError(f"bpw: SliM-LLM needs {LOWEST}..{HIGHEST} code bits, found {bpw - overhead:g} at group_size "
                        f"{group_size}; choose bpw in {LOWEST + overhead:g}..{HIGHEST + overhead:g}")
    uniform = uniform_plan(model, bpw, group_size, "gptq", seed=seed)
    base = round(uniform.wbits)
    spec = QuantSpec.from_dict({**uniform.spec.to_dict(), "levels": (base - 1, base, base + 1)})
    return Plan(spec, uniform)


def _decided_plan(plan, matrices) -> Plan:
    """The plan with the bits that were chosen; a matrix no token reached kept its own."""
    chosen = {name: np.array([matrices[name].get("group_bits", matrix.bits[0])]) for name, matrix in plan.items()}
    return Plan(plan.spec, {name: MatrixPlan(matrix.row_perm, matrix.col_perm, chosen[name])
                            for name, matrix in plan.items()})


def _count(cost, plan, n_windows, sba_windows, length, tokens):
    """Work done, and what the publication's settings would need on this model."""
    hessian, update = cost.stages["hessian"], cost.stages["column update (SQC + GPTQ)"]
    # Every window goes through each layer twice: for the Hessians, and quantized on to the next layer.
    hessian.units = hessian.evaluations = 2 * n_windows
    hessian.full_units, hessian.unit_scale = 2 * FULL_WINDOWS, FULL_TOKENS / length
    update.full_units = len(plan)
    search = cost.stages["bit search (SBA)"]
    tried = [candidates(matrix.shape[1], plan.spec.group_size) for matrix in plan.values()]
    search.full_units = FULL_WINDOWS * sum(count for count in tried if count > 1)
    search.unit_scale = FULL_TOKENS / tokens
