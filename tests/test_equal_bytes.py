"""Stored budgets: the reduced bits per weight fit, to the byte, whatever the shapes, levels and permutations."""

import dataclasses
import doctest

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch import nn

from sfmp import equal_bytes
from sfmp.allocate import make_plan
from sfmp.apply import quantize_model
from sfmp.baselines.outcome import stored_bytes
from sfmp.checks import SfmpError
from sfmp.spec import QuantSpec


def random_salience(shapes, seed):
    rng = np.random.default_rng(seed)
    return {name: rng.lognormal(sigma=2, size=shape).astype(np.float32) for name, shape in shapes.items()}


def naive_bytes(plan):
    """Bytes of a plan when it is stored, block by block: padded planes, affine pairs, maps, permutations."""
    total = 0
    for name in plan:
        (rows, columns), bits = plan[name].shape, plan[name].bits
        block_rows = min(plan.spec.block_rows, rows)
        for row_bits in bits.tolist():
            for width in row_bits:
                total += width * block_rows * plan.spec.group_size // 8
        total += 2 * 2 * rows * bits.shape[1] + (bits.size if np.unique(bits).size > 1 else 1)
        total += 2 * rows * (plan.spec.reorder in ("rows", "both"))
        total += 2 * columns * (plan.spec.reorder in ("cols", "both"))
    return total


@given(
    sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 150)), min_size=1, max_size=4),
    reorder=st.sampled_from(["none", "rows", "cols", "both"]),
    levels=st.sampled_from([(2, 3, 4), (1, 8), "auto"]),
    scope=st.sampled_from(["global", "matrix"]),
    extra=st.floats(0.0, 2.0),
    seed=st.integers(0, 99),
)
@settings(suppress_health_check=[HealthCheck.filter_too_much])  # small shapes are all overhead; with no plan it fails
def test_every_plan_fits_its_bytes(sizes, reorder, levels, scope, extra, seed):
    shapes = {f"m{i}": size for i, size in enumerate(sizes)}
    weights = sum(rows * columns for rows, columns in sizes)
    spec = QuantSpec(bpw=3.5, group_size=32, block_rows=16, levels=levels, reorder=reorder, scope=scope)
    fixed = sum(equal_bytes.fixed_bytes(shapes, spec).values())
    bpw = 8 * (fixed + 1) / weights + (2 if levels == "auto" else spec.candidate_levels[0]) + extra
    try:
        spec = dataclasses.replace(spec, bpw=bpw)
        reduced = equal_bytes.spec_for_stored(shapes, spec)
    except SfmpError:
        assert bpw > spec.candidate_levels[-1] or levels == "auto"  # a budget that must be met is met
        reject()  # outside the levels: refused, not exceeded
    plan = make_plan(random_salience(shapes, seed), reduced)
    assert naive_bytes(plan) <= int(bpw * weights / 8 + 1e-9)


@pytest.mark.parametrize("bpw", [2.75, 3.0, 3.3, 3.75])
@pytest.mark.parametrize("reorder", ["none", "both"])
def test_packed_models_use_their_bytes_up_to_one_block(bpw, reorder):
    model = nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 192, bias=False))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    shapes = {name: tuple(module.weight.shape) for name, module in model.named_children()}
    weights = sum(rows * columns for rows, columns in shapes.values())
    spec = QuantSpec(bpw=bpw, group_size=64, block_rows=32, method="rtn", reorder=reorder)
    plan = make_plan(random_salience(shapes, 1), equal_bytes.spec_for_stored(shapes, spec))
    stored = sum(stored_bytes(quantize_model(model, plan)).values())
    assert stored == naive_bytes(plan)
    gap = int(bpw * weights / 8) - stored
    maps = sum(matrix.bits.size - 1 for matrix in plan.values() if np.unique(matrix.bits).size == 1)
    assert 0 <= gap - maps < 32 * 64 // 8  # no padding: less than one step of one block


def test_the_same_input_gives_the_same_spec_and_nothing_else_changes():
    shapes, spec = {"a": (64, 128), "lm_head": (64, 128)}, QuantSpec(bpw=3.0, block_rows=32)
    once, twice = (equal_bytes.spec_for_stored(shapes, spec) for _ in range(2))
    assert once == twice and once.bpw < spec.bpw
    assert dataclasses.replace(once, bpw=3.0) == spec
    assert equal_bytes.spec_for_stored({"a": (64, 128)}, spec) == once  # lm_head is skipped
    weights, fixed = 64 * 128, 64 * 4 + 2 + 2 * (64 + 128)
    assert once.budget_bits(weights) == 8 * (3 * weights // 8 - fixed)


def test_impossible_budgets_name_the_least_one():
    shapes, spec = {"a": (64, 128)}, QuantSpec(bpw=2.3, block_rows=32)
    with pytest.raises(SfmpError, match=r"bpw: 2\.3 bits .* choose bpw >= (2\.\d+)") as caught:
        equal_bytes.spec_for_stored(shapes, spec)
    least = float(str(caught.value).split(">= ")[1].split(" ")[0])
    assert equal_bytes.spec_for_stored(shapes, dataclasses.replace(spec, bpw=least + 1e-3)).wbits >= 2
    with pytest.raises(SfmpError, match="skip"):
        equal_bytes.spec_for_stored({"lm_head": (64, 128)}, spec)


def test_examples():
    assert doctest.testmod(equal_bytes).failed == 0
