"""Compact ScaleBITS: batches, refresh and decisions equal a naive greedy; bytes equal those of the checkpoint."""

import copy

import naive
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sfmp.accounting import tensor_sizes
from sfmp.baselines import scalebits
from sfmp.baselines.scalebits import promote, quantize, swapped_in
from sfmp.checks import SfmpError
from sfmp.hf import save_checkpoint
from sfmp.salience import SALIENCE_SOURCES, fisher_salience

SMALL = dict(group_size=32, block_rows=16, method="rtn")


@pytest.fixture
def windows():
    return torch.randint(0, 128, (5, 24), generator=torch.Generator().manual_seed(0))


def naive_promote(losses, weights, levels, bits, budget):
    """Batch after batch: rank the blocks that can rise by one level, raise them in turn, stop at the first misfit."""
    bits = [int(b) for b in bits]
    while True:
        able = [i for i, b in enumerate(bits) if b < levels[-1]]
        ranked = []
        for i in able:
            at = levels.index(bits[i])
            cost = (levels[at + 1] - levels[at]) * int(weights[i])
            ranked.append((-(losses[i][at] - losses[i][at + 1]) / cost, i, levels[at + 1], cost))
        for _, i, level, cost in sorted(ranked):
            if sum(b * int(w) for b, w in zip(bits, weights, strict=True)) + cost > budget:
                return bits
            bits[i] = level
        if not able:
            return bits


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.sampled_from([(2, 3, 4), (2, 4), (1, 3, 4, 8)]),
       st.floats(0, 1), st.booleans())
def test_batches_equal_the_naive_ones_and_meet_the_budget(seed, count, levels, share, start):
    rng = np.random.default_rng(seed)
    losses, weights = rng.integers(0, 9, (count, len(levels))).astype(float), rng.choice([64, 24, 6], count)
    bits = rng.choice(levels, count).astype(np.uint8) if start else np.full(count, levels[0], np.uint8)
    used = int((bits.astype(int) * weights).sum())
    budget = used + int(share * (levels[-1] * weights.sum() - used))
    found = promote(losses, weights, levels, bits, budget)
    assert found.dtype == np.uint8 and found.tolist() == naive_promote(losses, weights, levels, bits, budget)
    left = budget - int((found.astype(int) * weights).sum())
    assert 0 <= left < np.diff(levels).max() * weights.max() or (found == levels[-1]).all()


def test_a_batch_cannot_start_above_its_budget():
    with pytest.raises(SfmpError, match="found 8 bits less"):
        promote(np.zeros((2, 2)), np.array([8, 8]), (2, 3), np.array([3, 2], np.uint8), 32)


def naive_losses(weight, salience, rows, cols, level):
    """sum S (w - w_q)^2 of every block of 16 x 32 of the permuted matrix."""
    weight, salience = weight[rows][:, cols].astype(np.float64), salience[rows][:, cols].astype(np.float64)
    shape = -(-weight.shape[0] // 16), -(-weight.shape[1] // 32)
    error = weight - naive.quantize_blocks(weight, np.full(shape, level), 32, 16)
    return naive.block_sums(salience * error**2, range(len(rows)), range(len(cols)), 16, 32).ravel()


@pytest.mark.parametrize("rounds", [1, 3])
def test_decisions_equal_a_naive_greedy_on_measured_errors(tiny_llama, windows, rounds):
    salience = fisher_salience(tiny_llama, windows)
    names = sorted(salience)
    order, losses, sizes = {}, [], []
    for name in names:
        weight, importance = tiny_llama.get_submodule(name).weight.detach().numpy(), salience[name].numpy()
        order[name] = (np.argsort(-importance.sum(1, dtype=np.float64), kind="stable"),
                       np.argsort(-importance.sum(0, dtype=np.float64), kind="stable"))
        losses.append(np.stack([naive_losses(weight, importance, *order[name], b) for b in (2, 3, 4)], 1))
        natural = range(weight.shape[0]), range(weight.shape[1])
        sizes.append(naive.block_sums(np.ones(weight.shape), *natural, 16, 32).ravel())
    losses, sizes = np.concatenate(losses), np.concatenate(sizes).astype(int)
    outcome = quantize(tiny_llama, windows, 3.6, salience=salience, rounds=rounds, refreshes=0, **SMALL)
    bits, floor = [2] * len(sizes), 2 * sizes.sum()
    total = int(2.6 * sizes.sum() + 1e-6)
    for index in range(rounds):
        bits = naive_promote(losses, sizes, (2, 3, 4), bits, floor + (total - floor) * (index + 1) // rounds)
    found = np.concatenate([outcome.plan[name].bits.ravel() for name in names])
    assert found.tolist() == bits
    for name in names:
        assert (outcome.plan[name].row_perm == order[name][0]).all()
        assert (outcome.plan[name].col_perm == order[name][1]).all()
    assert 0 <= 3.6 - outcome.bpw < 16 * 32 / sizes.sum() + 1e-9
    assert [r["code_bits"] for r in outcome.notes["rounds"]][-1] == int((found * sizes).sum())


def test_refresh_sees_the_quantized_weights_and_decides(tiny_llama, windows, monkeypatch):
    before = {name: p.detach().clone() for name, p in tiny_llama.named_parameters()}
    name = "model.layers.0.mlp.down_proj"
    seen, used = [], []

    def spy(model, given, seed=0, **options):
        seen.append(model.get_submodule(name).weight.detach().clone())
        used.append(given)
        made = fisher_salience(model, given)
        return made if len(seen) == 1 else {key: value.flip(0) for key, value in made.items()}

    monkeypatch.setitem(SALIENCE_SOURCES, "fisher", spy)
    monkeypatch.setattr(scalebits, "quantize_model", lambda model, plan, windows: model)
    monkeypatch.setattr(scalebits, "stored_bytes", lambda model: {})
    refreshed = quantize(tiny_llama, windows, 3.6, rounds=4, refreshes=3, refresh_windows=2, **SMALL)
    assert len(seen) == 4 and torch.equal(seen[0], before[f"{name}.weight"])
    assert torch.equal(used[0], windows) and all(torch.equal(u, windows[[0, 2]]) for u in used[1:])
    # After the first of four rounds every block stands at two bits or, if it was promoted, at three.
    plan, original = refreshed.plan[name], before[f"{name}.weight"].numpy()
    rows, cols = plan.row_perm, plan.col_perm
    first, raised = seen[1].numpy()[rows][:, cols], 0
    low, high = (naive.quantize_blocks(original[rows][:, cols], np.full((4, 6), b), 32, 16) for b in (2, 3))
    for i in range(4):
        for j in range(6):
            block = slice(16 * i, 16 * i + 16), slice(32 * j, 32 * j + 32)
            at_high = np.allclose(first[block], high[block], atol=1e-6)
            assert at_high or np.allclose(first[block], low[block], atol=1e-6)
            raised += at_high
    assert 0 < raised < 24 and not torch.equal(seen[1], seen[2])
    for key, parameter in tiny_llama.named_parameters():
        assert torch.equal(parameter, before[key])
    assert [r["refreshed"] for r in refreshed.notes["rounds"]] == [False, True, True, True]
    counts = {row["stage"]: row for row in refreshed.cost.counts()}
    assert counts["sensitivity refresh"]["units"] == counts["sensitivity refresh"]["evaluations"] == 6
    assert counts["salience"]["evaluations"] == 5 and counts["greedy allocation"]["units"] == 4
    seen.clear()
    kept = quantize(tiny_llama, windows, 3.6, rounds=4, refreshes=0, **SMALL)
    assert len(seen) == 1
    assert any((kept.plan[n].bits != refreshed.plan[n].bits).any() for n in kept.plan)


def test_swapped_weights_come_back_after_an_error(tiny_llama, windows):
    tiny_llama.bfloat16()
    plan = quantize(copy.deepcopy(tiny_llama), windows, 3.6, refreshes=0, salience=fisher_salience(tiny_llama, windows),
                    **SMALL).plan
    before = {name: p.detach().clone() for name, p in tiny_llama.named_parameters()}
    with pytest.raises(KeyError), swapped_in(tiny_llama, plan):
        inside = tiny_llama.model.layers[0].mlp.up_proj.weight
        assert inside.dtype == torch.bfloat16 and not torch.equal(inside, before["model.layers.0.mlp.up_proj.weight"])
        raise KeyError
    for key, parameter in tiny_llama.named_parameters():
        assert torch.equal(parameter, before[key])


def test_bytes_equal_the_checkpoint_and_runs_repeat(tiny_llama, windows, tmp_path):
    twin = copy.deepcopy(tiny_llama)
    knobs = dict(rounds=3, refresh_windows=1, **SMALL)
    first, second = quantize(tiny_llama, windows, 3.6, **knobs), quantize(twin, windows, 3.6, **knobs)
    assert first.plan.hash == second.plan.hash and first.notes == second.notes
    assert first.cost.counts() == second.cost.counts()
    for (key, value), other in zip(tiny_llama.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    save_checkpoint(tiny_llama, tmp_path)
    sizes = tensor_sizes(tmp_path)
    expected = 0
    for name, matrix in first.plan.items():
        part = sizes[sizes.module == name].set_index("part").bytes
        expected += part["planes"] + part["alpha"] + part["beta"]
        expected += part["block_bits"] if len(np.unique(matrix.bits)) > 1 else 1
        for key in ("row_perm", "col_perm"):
            permutation = getattr(matrix, key)
            expected += part[key] if (permutation != np.arange(len(permutation))).any() else 0
    assert first.stored_bytes == expected
    assert first.bpw == first.plan.bpw <= 3.6


def test_any_module_tree_with_salience_at_hand():
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32))
    for parameter in model.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    salience = {name: torch.rand(model.get_submodule(name).weight.shape) for name in ("0", "2")}
    outcome = quantize(model, torch.randn(4, 64), 4.0, salience=salience, refreshes=0, **SMALL)
    assert outcome.plan.bpw <= 4.0 and "salience" not in outcome.cost.stages


@pytest.mark.parametrize(("bpw", "knobs", "message"), [
    (2.9, {}, r"choose bpw in 3\.\.5"),
    (4.0, {"rounds": 0}, "rounds: expected an integer >= 1"),
    (4.0, {"rounds": 3, "refreshes": 3}, r"refreshes: expected an integer in 0\.\.2"),
    (4.0, {"refresh_windows": 0}, "refresh_windows: expected an integer >= 1"),
])
def test_bad_input_is_refused(tiny_llama, windows, bpw, knobs, message):
    with pytest.raises(SfmpError, match=message):
        quantize(tiny_llama, windows, bpw, **knobs, **SMALL)
