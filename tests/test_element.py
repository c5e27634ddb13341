"""The granularity oracle: thresholds per weight are optimal and exact, values and bytes equal hand-made ones."""

import copy

import naive
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from sfmp.allocate import allocate
from sfmp.baselines.element import element_bits, element_bytes, element_values, quantize
from sfmp.checks import SfmpError
from sfmp.salience import fisher_salience


@pytest.fixture
def windows():
    return torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(0))


def losses_of(salience, levels):
    return np.asarray(salience, dtype=np.float64)[:, None] / (2.0 ** np.asarray(levels) - 1) ** 2


@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.sampled_from([(2, 3, 4), (2, 3), (3, 5, 8), (2, 6)]),
       st.floats(0, 1), st.booleans())
def test_bits_are_the_enumerated_optimum_and_exact(seed, count, levels, share, ties):
    rng = np.random.default_rng(seed)
    salience = rng.integers(0, 3, count).astype(float) if ties else rng.lognormal(0, 2, count)
    budget = int(count * (levels[0] + share * (levels[-1] - levels[0])))
    bits = element_bits(salience, levels, budget)
    used = int(bits.sum())
    assert bits.dtype == np.uint8 and set(bits.tolist()) <= set(levels)
    assert used <= budget and (budget - used < np.diff(levels).max() or used == budget)
    losses = losses_of(salience, levels)
    found = losses[np.arange(count), np.searchsorted(levels, bits)].sum()
    assert found == pytest.approx(naive.best_losses(losses, [1] * count, levels)[used])


def test_bits_equal_the_block_allocation_with_blocks_of_one_weight():
    salience = np.random.default_rng(0).lognormal(0, 3, 5000).astype(np.float32)
    losses, ones = losses_of(salience, (2, 3, 4)), np.ones(5000, dtype=int)
    assert (element_bits(salience, (2, 3, 4), 13_777) == allocate(losses, ones, (2, 3, 4), 13_777, salience)).all()


def test_values_are_nearest_on_grids_that_follow_from_one_stored_range():
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(6, 72)).astype(np.float32)  # groups of 32, 32 and 8
    bits, cols = rng.choice([2, 3, 4], (6, 72)).astype(np.uint8), rng.permutation(72)
    found = element_values(torch.tensor(weight), bits, cols, (2, 3, 4), 32).numpy()
    for row in range(6):
        for start in (0, 32, 64):
            inside = cols[start:start + 32]
            group = weight[row, inside]
            stored = np.array([np.float16(group.min()), np.float16(group.max())], dtype=np.float64)
            for column in inside:
                grid = naive.naive_levels(stored, int(bits[row, column]))
                nearest = grid[np.abs(grid - weight[row, column]).argmin()]
                assert found[row, column] == pytest.approx(nearest, abs=1e-6)


def test_bytes_are_codes_ranges_levels_and_column_order(tiny_llama, windows):
    salience = fisher_salience(tiny_llama, windows)
    before = {name: tiny_llama.get_submodule(name).weight.shape for name in salience}
    outcome = quantize(tiny_llama, windows, 4.0, group_size=32, salience=salience)
    weights = sum(n * k for n, k in before.values())
    code_bits = sum(int(bits) * count for bits, count in outcome.notes["weights_at_level"].items())
    assert code_bits == 3 * weights and outcome.bpw == 4.0
    assert sum(outcome.notes["weights_at_level"].values()) == weights
    flat = np.concatenate([salience[name].numpy().ravel() for name in before])
    bits, at, expected = element_bits(flat, (2, 3, 4), 3 * weights), 0, 0
    for rows, columns in before.values():
        here = bits[at:at + rows * columns]
        at += rows * columns
        expected += int(np.ceil(here.sum(dtype=int) / 8)) + 2 * 2 * rows * int(np.ceil(columns / 32))
        expected += rows * columns // 4 + 2 * columns
    assert outcome.stored_bytes == expected and outcome.notes["index_bits"] == 2
    assert outcome.plan is None
    assert element_bytes(np.full((3, 5), 3, np.uint8), np.arange(5), 2, 32) == 6 + 12 + 2  # natural order is free


def test_model_stays_dense_saves_loads_and_repeats(tiny_llama, windows, tmp_path):
    twin, original = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    first = quantize(tiny_llama, windows, 3.7, group_size=32)
    second = quantize(twin, windows, 3.7, group_size=32)
    assert first.notes == second.notes and first.stored_bytes == second.stored_bytes
    assert first.cost.counts() == second.cost.counts()
    assert [row["stage"] for row in first.cost.counts()] == ["salience", "allocation", "quantization"]
    tiny_llama.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, parameter in tiny_llama.named_parameters():
        assert torch.equal(parameter, dict(twin.named_parameters())[name])
        assert torch.equal(parameter, dict(loaded.named_parameters())[name])
        changed = not torch.equal(parameter, dict(original.named_parameters())[name])
        assert changed == name.endswith("_proj.weight")
    assert all(isinstance(tiny_llama.get_submodule(n), nn.Linear) for n in fisher_salience(original, windows))


def test_half_precision_and_shared_weights(tiny_llama, windows):
    tiny_llama.bfloat16()
    first, second = (tiny_llama.model.layers[i].mlp.gate_proj for i in (0, 1))
    second.weight = first.weight
    names = [name for name, m in tiny_llama.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    salience = {name: torch.rand(tiny_llama.get_submodule(name).weight.shape) for name in names}
    outcome = quantize(tiny_llama, windows, 4.0, group_size=32, salience=salience)
    distinct = {id(tiny_llama.get_submodule(name).weight): tiny_llama.get_submodule(name).weight for name in names}
    assert sum(outcome.notes["weights_at_level"].values()) == sum(w.numel() for w in distinct.values())
    assert first.weight.dtype == torch.bfloat16 and first.weight is second.weight


def test_bad_input_is_refused(tiny_llama, windows):
    salience = fisher_salience(tiny_llama, windows)
    with pytest.raises(SfmpError, match="at least 2, found 1"):
        quantize(tiny_llama, windows, 3.0, levels=(1, 2, 4), salience=salience, group_size=32)
    with pytest.raises(SfmpError, match=r"choose bpw in 3\.\.5"):
        quantize(tiny_llama, windows, 2.9, group_size=32, salience=salience)
    name = "model.layers.0.self_attn.k_proj"
    with pytest.raises(SfmpError, match="k_proj.*found nothing"):
        quantize(tiny_llama, windows, 4.0, group_size=32, salience={k: v for k, v in salience.items() if k != name})
    with pytest.raises(SfmpError, match="k_proj.*expected shape"):
        quantize(tiny_llama, windows, 4.0, group_size=32, salience=salience | {name: torch.ones(3, 3)})
    with pytest.raises(SfmpError, match="expected finite numbers"):
        element_bits([1.0, -1.0], (2, 3), 5)
    with pytest.raises(SfmpError, match="budget: expected at least 4"):
        element_bits([1.0, 1.0], (2, 3), 3)
    tiny_llama.get_submodule(name).weight.data[0, 0] = float("nan")
    with pytest.raises(SfmpError, match="k_proj: .*NaN"):
        quantize(tiny_llama, windows, 4.0, group_size=32, salience=salience)
