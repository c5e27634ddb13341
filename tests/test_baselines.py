"""The common interface: every method by name, exact bytes, budgets, and the controls behind it."""

import numpy as np
import pytest
import torch

from sfmp import baselines
from sfmp.accounting import tensor_sizes
from sfmp.baselines.outcome import stored_bytes
from sfmp.baselines.uniform import uniform_plan
from sfmp.checks import SfmpError
from sfmp.hf import save_checkpoint


@pytest.fixture
def windows():
    return torch.randint(0, 128, (4, 32), generator=torch.Generator().manual_seed(0))


def test_unknown_methods_are_named(tiny_llama, windows):
    with pytest.raises(SfmpError, match="'awk'.*rtn, awq"):
        baselines.quantize("awk", tiny_llama, windows, 2.5)


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_uniform_methods_store_their_budget_and_one_byte_per_matrix(tiny_llama, windows, method):
    # hidden 64 and ffn 172: group 32 divides 64, and 172 leaves a short last group that is stored in full
    outcome = baselines.quantize(method, tiny_llama, windows, 3.0, group_size=32)
    expected = 0
    for name in outcome.plan:
        rows, columns = outcome.plan[name].shape
        groups = -(-columns // 32)
        expected += rows * groups * 32 * 2 // 8 + rows * groups * 4 + 1
    assert outcome.stored_bytes == expected
    assert outcome.bpw == pytest.approx(3.0)


def test_uniform_methods_refuse_fractional_code_bits(tiny_llama, windows):
    with pytest.raises(SfmpError, match=r"2\.25 at group_size 128"):
        baselines.quantize("rtn", tiny_llama, windows, 2.5, group_size=128)


def test_sfmp_is_charged_for_permutations_and_the_bit_map(tiny_llama, windows, tmp_path):
    outcome = baselines.quantize("sfmp", tiny_llama, windows, 3.5, method="rtn", group_size=32, block_rows=16)
    parts = stored_bytes(outcome.model)
    # uint16 row and column permutations: none of these is an identity, which a matrix of 32 rows could be
    assert parts["permutations"] == sum(2 * sum(outcome.plan[name].shape) for name in outcome.plan)
    mixed = [m.bits.size if len(np.unique(m.bits)) > 1 else 1 for m in outcome.plan.values()]
    assert parts["bit_map"] == sum(mixed)
    # An independent count: the headers of the saved file.
    sizes = tensor_sizes(save_checkpoint(outcome.model, tmp_path / "model"))
    saved = sizes[sizes.part.isin(["planes", "alpha", "beta", "row_perm", "col_perm", "block_bits"])]
    constant = sum(m.bits.size - 1 for m in outcome.plan.values() if len(np.unique(m.bits)) == 1)
    assert outcome.stored_bytes == sum(parts.values()) == saved.bytes.sum() - constant


def test_sfmp_equals_the_three_calls_it_is_made_of(tiny_llama, windows):
    import copy

    from sfmp import QuantSpec, fisher_salience, make_plan, quantize_model

    other = copy.deepcopy(tiny_llama)
    outcome = baselines.quantize("sfmp", tiny_llama, windows, 3.5, method="rtn", group_size=32, block_rows=16)
    spec = QuantSpec(bpw=3.5, method="rtn", group_size=32, block_rows=16)
    plan = make_plan(fisher_salience(other, windows), spec)
    quantize_model(other, plan, windows)
    assert outcome.plan.hash == plan.hash
    with torch.no_grad():
        assert torch.equal(outcome.model(windows).logits, other(windows).logits)
    stages = {row["stage"]: row for row in outcome.cost.rows()}
    assert list(stages) == ["salience", "allocation", "quantization"]
    assert stages["salience"]["evaluations"] == 4 and stages["salience"]["full_units"] == 100


def test_salience_at_hand_is_not_computed_again(tiny_llama, windows):
    from sfmp import fisher_salience

    salience = fisher_salience(tiny_llama, windows)
    outcome = baselines.quantize("sfmp", tiny_llama, windows, 3.5, salience=salience, method="rtn",
                                 group_size=32, block_rows=16)
    assert [row["stage"] for row in outcome.cost.rows()] == ["allocation", "quantization"]


def test_an_unquantized_model_stores_nothing_that_could_be_counted(tiny_llama):
    with pytest.raises(SfmpError, match="expected a quantized layer"):
        stored_bytes(tiny_llama)


def test_a_uniform_plan_is_in_natural_order(tiny_llama):
    plan = uniform_plan(tiny_llama, 3.25, 128, "rtn")
    assert plan.bpw == pytest.approx(3.25) and len(plan) == 14
    for matrix in plan.values():
        assert (matrix.row_perm == np.arange(len(matrix.row_perm))).all()
        assert (matrix.bits == 3).all()
