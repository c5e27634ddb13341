"""The table of allocation methods: one optimum per problem, nothing below it, no clock in it."""

import numpy as np
import pandas as pd
import pytest
from torch import nn

from sfmp.allocate import make_plan
from sfmp.allocation_study import METHODS, allocation_table
from sfmp.checks import SfmpError
from sfmp.salience import random_salience
from sfmp.spec import QuantSpec

SPEC = QuantSpec(bpw=4.0, group_size=32, block_rows=16)
BUDGETS = (3.25, 4.0)


@pytest.fixture
def tables(tiny_llama):
    salience = {name: value**4 for name, value in random_salience(tiny_llama, 1).items()}
    return salience, tiny_llama, allocation_table(salience, SPEC, tiny_llama, 0, budgets=BUDGETS, evaluations=400)


def test_closed_form_is_the_optimum_and_nothing_is_below(tables):
    salience, model, (table, seconds) = tables
    assert table.method.tolist() == list(METHODS) * 4
    assert table.groupby(["objective", "bpw"], sort=False).size().to_dict() == {
        (objective, bpw): 4 for objective in ("paper", "measured") for bpw in BUDGETS}
    assert (table.bits_used <= table.budget_bits).all()
    assert (table.loss_ratio >= 1 - 1e-7).all()
    step = 2 * 16 * 32  # two levels of the largest block
    closed = table[table.method == "closed form"]
    assert (closed.budget_bits - closed.bits_used < step).all() and (closed.loss_ratio < 1.01).all()
    assert (table[table.method == "genetic search"].loss_ratio > 1.001).all()
    assert table[table.method == "ILP optimum"].loss_ratio.tolist() == [1.0] * 4
    assert table[table.method == "genetic search"].evaluations.tolist() == [400] * 4
    assert (seconds.seconds > 0).all() and len(seconds) == len(table)


def test_closed_form_row_is_the_plan_of_the_model(tables):
    salience, model, (table, _) = tables
    for objective in ("paper", "measured"):
        plan = make_plan(salience, QuantSpec(bpw=3.25, group_size=32, block_rows=16, objective=objective), model)
        row = table[(table.objective == objective) & (table.bpw == 3.25) & (table.method == "closed form")].iloc[0]
        assert row.bits_used == sum(int((plan.grid(name).weights * plan[name].bits).sum()) for name in plan)
        assert row.blocks == sum(plan[name].bits.size for name in plan)


def test_table_repeats_and_needs_no_model():
    layer = nn.Linear(64, 48)
    rng = np.random.default_rng(0)
    salience = {"layer": rng.lognormal(0, 3, tuple(layer.weight.shape)).astype(np.float32)}
    first = allocation_table(salience, SPEC, budgets=(4.0,), evaluations=300)[0]
    pd.testing.assert_frame_equal(first, allocation_table(salience, SPEC, budgets=(4.0,), evaluations=300)[0])
    assert set(first.objective) == {"paper"}


@pytest.mark.parametrize("levels", ["auto", (3,)])
def test_nothing_to_allocate_is_refused(levels):
    with pytest.raises(SfmpError, match="at least two bit-widths"):
        allocation_table({"a": np.ones((8, 32))}, QuantSpec(bpw=4.0, group_size=32, levels=levels))
