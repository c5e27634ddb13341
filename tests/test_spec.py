"""QuantSpec, BlockGrid and Plan: validation, budgets, exact round trips."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfmp.spec import BlockGrid, MatrixPlan, Plan, QuantSpec, SfmpError

ROOT = Path(__file__).resolve().parents[1]


def small_plan(seed=0, names=("b.proj", "a.proj"), **fields):
    """A random plan of 70 x 96 matrices in blocks of 32 x 32."""
    rng = np.random.default_rng(seed)
    spec = QuantSpec(**{"bpw": 4.0, "group_size": 32, "block_rows": 32, **fields})
    return Plan(spec, {
        name: MatrixPlan(rng.permutation(70), rng.permutation(96), rng.choice(spec.levels, (3, 3)))
        for name in names
    })


def run_python(code):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("module", ["sfmp", "sfmp.spec"])
def test_import_loads_neither_torch_nor_transformers(module):
    done = run_python(f"import sys, {module}; import sfmp; sfmp.QuantSpec(bpw=3)\n"
                      "print(sorted({'torch', 'transformers'} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr


def test_public_names_resolve_and_unknown_ones_do_not():
    import sfmp
    import sfmp.salience

    assert sfmp.fisher_salience is sfmp.salience.fisher_salience
    assert sfmp.allocate.make_plan is sfmp.make_plan
    assert {"QuantSpec", "make_plan", "quantize_model", "PackedMatrix", "pack"} <= set(dir(sfmp))
    with pytest.raises(AttributeError, match="nothing"):
        _ = sfmp.nothing


@st.composite
def specs(draw):
    fixed = st.sets(st.integers(1, 8), min_size=1).map(lambda s: tuple(sorted(s)))
    levels = draw(st.one_of(st.just("auto"), fixed))
    group_size = 32 * draw(st.integers(1, 16))
    low, high = (1, 8) if levels == "auto" else (levels[0], levels[-1])
    wbits = draw(st.floats(low, high))
    choice = {name: draw(st.sampled_from(values)) for name, values in {
        "reorder": ["both", "rows", "cols", "none"], "method": ["awq", "gptq", "rtn"],
        "scope": ["global", "layer", "matrix"], "objective": ["paper", "measured"]}.items()}
    skip = tuple(draw(st.lists(st.text(max_size=8), max_size=3)))
    return QuantSpec(bpw=wbits + 32 / group_size, group_size=group_size, levels=levels, skip=skip,
                     block_rows=draw(st.integers(1, 4096)), seed=draw(st.integers(0, 2**31)), **choice)


@given(specs())
def test_json_round_trip_is_exact(spec):
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@given(specs(), st.integers(1, 10**12))
def test_budget_is_whole_and_within_one_bit_of_the_target(spec, weights):
    budget = spec.budget_bits(weights)
    assert isinstance(budget, int)
    assert abs(budget - spec.wbits * weights) <= 1 + 1e-5 * weights
    assert spec.candidate_levels[0] * weights <= budget <= spec.candidate_levels[-1] * weights


def test_budget_reads_bpw_as_a_decimal():
    # In binary, (2.3 - 0.25) * 100 is 204.99999999999997: truncated, it would lose a bit, and so a block.
    assert QuantSpec(bpw=2.3).budget_bits(100) == 205
    assert QuantSpec(bpw=2.25, group_size=128, levels=(2,)).budget_bits(7) == 14


@pytest.mark.parametrize("bpw, group_size, expected", [
    (3.0, 128, (2, 3)), (3.25, 128, (3,)), (3.75, 128, (3, 4)), (1.25, 128, (1,)), (8.25, 128, (8,)),
    (2 + 1 / 3, 96, (2,)), (2.5, 64, (2,)), (3.0, 32, (2,)),
])
def test_auto_levels_are_floor_and_ceil_of_the_code_bits(bpw, group_size, expected):
    assert QuantSpec(bpw=bpw, group_size=group_size, levels="auto").candidate_levels == expected


@pytest.mark.parametrize("fields, message", [
    ({"bpw": 1.0}, r"bpw.*2\.25\.\.4\.25"), ({"bpw": 4.5}, "choose bpw in 2.25..4.25"),
    ({"bpw": 3.3, "levels": (3,)}, "3.25..3.25"), ({"bpw": 9, "levels": "auto"}, "1.25..8.25"),
    ({"bpw": "3"}, "finite number"), ({"bpw": float("nan")}, "finite number"),
    ({"bpw": True}, "finite number"), ({"group_size": 100}, "multiple of 32"),
    ({"group_size": 0}, "group_size"), ({"group_size": 64.0}, "integer"), ({"group_size": -1}, "group_size"),
    ({"block_rows": 0}, "block_rows"), ({"block_rows": True}, "block_rows"), ({"levels": ()}, "levels"),
    ({"levels": (3, 2)}, "increasing"), ({"levels": (2, 2)}, "increasing"), ({"levels": (0, 3)}, "1..8"),
    ({"levels": (2, 9)}, "1..8"), ({"levels": "all"}, "auto"), ({"levels": 3}, "tuple"),
    ({"levels": (2.5, 3)}, "integer"), ({"reorder": "row"}, "both, rows, cols, none"),
    ({"method": None}, "awq"), ({"scope": "model"}, "global"), ({"objective": "loss"}, "measured"),
    ({"skip": "lm_head"}, r"write \(name,\)"), ({"skip": (1,)}, "module names"),
    ({"skip": None}, "tuple"), ({"seed": -1}, "seed"),
])
def test_invalid_specs_say_what_was_expected(fields, message):
    # METHOD.md 1.12 #15: a group size of -1 passed some checks and broke later.
    with pytest.raises(SfmpError, match=message):
        QuantSpec(**fields)


def test_unknown_keys_are_rejected_with_a_suggestion():
    with pytest.raises(SfmpError, match="'groupsize'; did you mean 'group_size'"):
        QuantSpec.from_dict({"groupsize": 64})
    with pytest.raises(SfmpError, match="known keys are bpw"):
        QuantSpec.from_dict({"zzz": 1})
    with pytest.raises(SfmpError, match="mapping"):
        QuantSpec.from_dict([1])


def test_specs_are_values():
    assert QuantSpec(levels=[2, 3, 4], skip=["lm_head"]) == QuantSpec()
    assert len({QuantSpec(), QuantSpec(bpw=3)}) == 1
    with pytest.raises(AttributeError):
        QuantSpec().bpw = 2.5


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 70), st.integers(1, 3).map(lambda i: 32 * i))
def test_grid_covers_every_weight_once(rows, cols, block_rows, group_size):
    grid = BlockGrid(rows, cols, block_rows, group_size)
    seen = np.zeros((rows, cols), dtype=int)
    for i in range(grid.row_blocks):
        for j in range(grid.groups):
            block = seen[i * block_rows : (i + 1) * block_rows, j * group_size : (j + 1) * group_size]
            block += 1
            assert block.size == grid.weights[i, j] > 0
    assert (seen == 1).all() and grid.weights.dtype == np.int64


def test_grid_rejects_empty_matrices():
    with pytest.raises(SfmpError, match="in_features"):
        BlockGrid(4, 0, 2, 32)


def test_plan_counts_real_weights_only():
    plan = small_plan()
    cells = {name: np.kron(m.bits, np.ones((32, 32)))[:70, :96] for name, m in plan.items()}
    assert plan.wbits == pytest.approx(np.mean([c.mean() for c in cells.values()]), abs=1e-12)
    assert plan.bpw == pytest.approx(plan.wbits + 1.0)
    rows = plan.summary()
    assert [r["name"] for r in rows] == ["a.proj", "b.proj"] and rows[0]["N"] == 70 and rows[0]["K"] == 96
    assert rows[0]["wbits"] == pytest.approx(cells["a.proj"].mean())
    assert sum(rows[0][f"blocks_{b}"] for b in (2, 3, 4)) == 9


def test_summary_reads_layers_in_numeric_order():
    plan = small_plan(names=("l.10.w", "l.9.w", "l.1.w"))
    assert list(plan) == ["l.1.w", "l.10.w", "l.9.w"]
    assert [row["name"] for row in plan.summary()] == ["l.1.w", "l.9.w", "l.10.w"]


def test_plan_file_round_trip_is_exact_and_byte_identical(tmp_path):
    plan = small_plan()
    plan.save(tmp_path / "sub" / "a.safetensors")
    loaded = Plan.load(tmp_path / "sub" / "a.safetensors")
    assert loaded.spec == plan.spec and loaded.hash == plan.hash and list(loaded) == list(plan)
    for name, matrix in plan.items():
        for part in ("row_perm", "col_perm", "bits"):
            np.testing.assert_array_equal(getattr(loaded[name], part), getattr(matrix, part))
            assert getattr(loaded[name], part).dtype == getattr(matrix, part).dtype
    loaded.save(tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "sub" / "a.safetensors").read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))


def test_hash_depends_on_spec_and_on_every_array():
    plan = small_plan()
    others = [small_plan(1), small_plan(seed=0, names=("a.proj", "c.proj"))]
    others.append(Plan(QuantSpec.from_dict({**plan.spec.to_dict(), "seed": 1}), plan))
    for part in ("row_perm", "col_perm", "bits"):
        changed = {p: getattr(plan["a.proj"], p).copy() for p in ("row_perm", "col_perm", "bits")}
        changed[part] = changed[part][::-1] if part != "bits" else np.full((3, 3), 2)
        others.append(Plan(plan.spec, {**plan, "a.proj": MatrixPlan(**changed)}))
    assert len({plan.hash, *(p.hash for p in others)}) == 1 + len(others)
    assert Plan(plan.spec, {name: plan[name] for name in reversed(list(plan))}).hash == plan.hash


def test_invalid_plans_name_the_matrix():
    plan = small_plan()
    good = plan["a.proj"]
    for matrix, message in [
        (MatrixPlan(np.zeros(70, int), good.col_perm, good.bits), r"a.proj\].row_perm.*permutation of 0..69"),
        (MatrixPlan(good.row_perm, good.col_perm + 1, good.bits), r"plan\[a.proj\].col_perm"),
        (MatrixPlan(good.row_perm, good.col_perm * 1.0, good.bits), "integer"),
        (MatrixPlan(good.row_perm, good.col_perm, good.bits[:2]), r"\(3, 3\), found \(2, 3\)"),
        (MatrixPlan(good.row_perm, good.col_perm, good.bits + 3), "levels"),
    ]:
        with pytest.raises(SfmpError, match=message):
            Plan(plan.spec, {"a.proj": matrix})
    with pytest.raises(SfmpError, match="at least one matrix"):
        Plan(plan.spec, {})
    with pytest.raises(KeyError, match="not in the plan"):
        plan["z"]


def test_damaged_plan_files_are_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "plan.safetensors"
    small_plan().save(path)
    whole, tensors = path.read_bytes(), load_file(path)
    record = {"format_version": 1, "spec": small_plan().spec.to_dict(), "hash": "0" * 64}
    meta = {"sfmp_plan": json.dumps(record)}
    for write, message in [
        (lambda: path.write_bytes(whole[:-10]), "damaged"),
        (lambda: save_file(tensors, path), "format_version"),
        (lambda: save_file(tensors, path, metadata=meta), "altered"),
        (lambda: save_file({"a.row_perm": np.arange(3)}, path, metadata=meta), "missing"),
        (lambda: save_file({**tensors, "a.proj.row_perm": np.zeros(70, int)}, path, metadata=meta), "a.proj"),
    ]:
        write()
        with pytest.raises(SfmpError, match=message):
            Plan.load(path)
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "none.safetensors")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    from sfmp.checks import write_atomically

    path = tmp_path / "file"
    path.write_text("old")

    def broken(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, broken)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]
