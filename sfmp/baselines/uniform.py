"""One bit-width for every weight: round-to-nearest, AWQ and GPTQ, the controls of every comparison.

Source: METHOD.md sections 2.1 and 2.2.
"""

from __future__ import annotations

import numpy as np

from sfmp.apply import quantize_model
from sfmp.baselines.outcome import Outcome, stored_bytes
from sfmp.checks import SfmpError
from sfmp.cost import CostRecord
from sfmp.salience import linear_modules
from sfmp.spec import BlockGrid, MatrixPlan, Plan, QuantSpec
from sfmp.unfuse import on_linears


@on_linears
def uniform_plan(model, bpw: float, group_size: int, method: str, *, skip=("lm_head",), seed: int = 0) -> Plan:
    """Plan that gives every weight the same whole number of bits, without reordering.

    Raises
    ------
    SfmpError
        If ``bpw - 32 / group_size`` is no whole number of bits.
    """
    bits = round(bpw - 32 / group_size)
    if abs(bits - (bpw - 32 / group_size)) > 1e-6:
        raise SfmpError(
            f"bpw: a uniform method needs a whole number of code bits, found {bpw - 32 / group_size:g} at "
            f"group_size {group_size}; choose bpw = bits + 32 / group_size, e.g. {bits + 32 / group_size:g}"
        )
    linears = linear_modules(model, skip)
    rows = max(linear.out_features for linear in linears.values())
    spec = QuantSpec(bpw=bpw, group_size=group_size, block_rows=rows, levels=(bits,), reorder="none",
                     method=method, skip=skip, seed=seed)
    matrices = {}
    for name in sorted(linears):
        out_features, in_features = linears[name].weight.shape
        grid = BlockGrid(out_features, in_features, rows, group_size)
        matrices[name] = MatrixPlan(np.arange(out_features), np.arange(in_features),
                                    np.full((grid.row_blocks, grid.groups), bits, dtype=np.uint8))
    return Plan(spec, matrices)


def _uniform(solver):
    def quantize(model, windows, bpw, *, seed=0, group_size=128):
        cost = CostRecord()
        plan = uniform_plan(model, bpw, group_size, solver, seed=seed)
        with cost.stage("quantization", unit="matrix") as stage:
            quantize_model(model, plan, windows)
            stage.units = stage.full_units = len(plan)
        return Outcome(model, plan.bpw, sum(stored_bytes(model).values()), cost, plan)

    quantize.__name__ = solver
    quantize.__doc__ = (
        f"{solver.upper()} with one bit-width: ``bpw - 32 / group_size`` bits (see :func:`uniform_plan`)."
    )
    return quantize


rtn, awq, gptq = _uniform("rtn"), _uniform("awq"), _uniform("gptq")
