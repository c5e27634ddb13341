"""SFMP behind the interface of its rivals: salience, closed-form allocation, a block-mixed quantizer.

Source: METHOD.md sections 1.2 to 1.7.
"""

from __future__ import annotations

from sfmp.allocate import make_plan
from sfmp.apply import quantize_model
from sfmp.baselines.outcome import Outcome, stored_bytes
from sfmp.cost import CostRecord
from sfmp.salience import SALIENCE_SOURCES
from sfmp.spec import QuantSpec

FULL_WINDOWS, FULL_TOKENS = 100, 512  # of the paper's salience, METHOD.md 1.2


def quantize(model, windows, bpw, *, seed=0, salience="fisher", method="awq", group_size=128, block_rows=512,
             levels=(2, 3, 4), reorder="both", scope="global", objective="paper"):
    """Quantize `model` in place by SFMP.

    Parameters
    ----------
    model, windows, bpw, seed
        As in :func:`sfmp.baselines.quantize`.
    salience : str or mapping of str to Tensor [N, K]
        A name of `SALIENCE_SOURCES`, computed from `windows`; or salience that is at hand.
    method, group_size, block_rows, levels, reorder, scope, objective
        Fields of :class:`sfmp.spec.QuantSpec`.

    Returns
    -------
    Outcome
        Stages ``salience``, ``allocation``, ``quantization``.
    """
    cost = CostRecord()
    spec = QuantSpec(bpw=bpw, group_size=group_size, block_rows=block_rows, levels=levels, reorder=reorder,
                     method=method, scope=scope, objective=objective, seed=seed)
    if isinstance(salience, str):
        with cost.stage("salience", unit="window") as stage:
            salience = SALIENCE_SOURCES[salience](model, windows, seed)
            stage.units = stage.evaluations = len(windows)
            stage.full_units, stage.unit_scale = FULL_WINDOWS, FULL_TOKENS / windows.shape[-1]
    with cost.stage("allocation"):
        plan = make_plan(salience, spec, model)
    with cost.stage("quantization", unit="matrix") as stage:
        quantize_model(model, plan, windows)
        stage.units = stage.full_units = len(plan)
    return Outcome(model, plan.bpw, sum(stored_bytes(model).values()), cost, plan)
