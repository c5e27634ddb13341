"""BitStack against numpy: signs, low rank, order, budget; and the layer that holds the result."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from sfmp.accounting import tensor_sizes
from sfmp.baselines import bitstack
from sfmp.baselines.bitstack_linear import BitStackLinear, level_bytes, pack_signs, unpack_signs
from sfmp.checks import SfmpError
from sfmp.hf import save_checkpoint
from sfmp.linear import keep_dequantized


@pytest.fixture
def windows():
    return torch.randint(0, 128, (3, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tiny_llama):
    """Larger weights, so that one matrix more or less shows in the perplexity."""
    with torch.no_grad():
        for name, parameter in tiny_llama.named_parameters():
            if "proj" in name:
                parameter.mul_(5)
    return tiny_llama


def _naive_signs(packed, columns):
    """+1 and -1, bit by bit."""
    return np.array([[1.0 if row[c // 8] >> (c % 8) & 1 else -1.0 for c in range(columns)] for row in packed.tolist()])


def _naive_levels(signs, left, right, columns):
    """Every level as float64 [N, K]."""
    factors = zip(left.double().numpy(), right.double().numpy(), strict=True)
    return np.array([_naive_signs(bits, columns) * (u @ v) for bits, (u, v) in zip(signs, factors, strict=True)])


def _naive_perplexity(model, windows):
    """Mean over windows of the mean negative log-likelihood, exponentiated; in float64, token by token."""
    means = []
    with torch.no_grad():
        for window in windows:
            logits = model(input_ids=window[None]).logits[0].double().numpy()
            nll = [math.log(np.exp(row - row.max()).sum()) + row.max() - row[token]
                   for row, token in zip(logits[:-1], window[1:].tolist(), strict=True)]
            means.append(sum(nll) / len(nll))
    return math.exp(sum(means) / len(means))


@pytest.mark.parametrize(("shape", "rank"), [((24, 40), 1), ((40, 24), 3), ((13, 19), 2), ((7, 5), 5)])
def test_every_level_is_the_sign_and_the_best_low_rank_of_what_is_left(shape, rank):
    rng = np.random.default_rng(0)
    weight, scale = rng.normal(size=shape), rng.uniform(0.2, 5, shape[1])
    scale32 = torch.tensor(scale, dtype=torch.float32)
    stack = bitstack.decompose(torch.tensor(weight, dtype=torch.float32), scale32, 5, rank)
    residual, norms = weight * scale, [np.linalg.norm(weight * scale)]
    for bits, level in zip(stack.signs, _naive_levels(*stack, shape[1]), strict=True):
        signs, scaled = _naive_signs(bits, shape[1]), level * scale
        clear = np.abs(residual) > 1e-5  # float32 may disagree about the sign of nothing
        assert (signs == np.where(residual >= 0, 1, -1))[clear].all()
        lost = np.linalg.norm(residual - scaled)
        tail = np.linalg.svd(np.abs(residual), compute_uv=False)[rank:]
        # No product of this rank is nearer (Eckart and Young); float16 factors cost a few parts in a thousand.
        assert lost <= math.hypot(1.001 * np.linalg.norm(tail), 3e-3 * norms[-1], 1e-5 * norms[0])
        residual = residual - scaled
        norms.append(np.linalg.norm(residual))
    shrinks = [after / before for before, after in zip(norms, norms[1:], strict=False) if before > 1e-5 * norms[0]]
    assert max(shrinks) < 0.8
    sum_of_levels = _naive_levels(*stack, shape[1]).sum(0)
    assert np.allclose(stack.dequantize().numpy(), sum_of_levels, rtol=1e-5, atol=1e-6)


def test_a_stored_bit_is_the_sign_of_the_residual_and_zero_counts_as_positive():
    weight = torch.tensor([[0.0, -1.0, 2.0, -0.0, 0.5, -3.0, 1.0, -1.0, 4.0, -0.25]])
    stack = bitstack.decompose(weight, None, 1, 1)
    assert stack.signs.tolist() == [[[0b01011101, 0b00000001]]]
    assert torch.equal(unpack_signs(pack_signs(weight >= 0), 10), torch.where(weight >= 0, 1.0, -1.0))


def test_the_scale_costs_no_byte_and_no_exactness():
    # With one column scaled a thousandfold its magnitudes dominate, so they come out nearly exact.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 32, generator=generator)
    plain = bitstack.decompose(weight, None, 2, 1).dequantize()
    scale = torch.ones(32)
    scale[5] = 1000.0
    scaled = bitstack.decompose(weight, scale, 2, 1)
    assert [t.shape for t in scaled] == [t.shape for t in bitstack.decompose(weight, None, 2, 1)]
    error = (scaled.dequantize() - weight).abs().mean(0)
    assert error[5] < 0.02 * (plain - weight)[:, 5].abs().mean()


@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (256, 768)])
def test_bits_per_level_are_the_formula_of_the_publication(shape):
    (m, n), k = shape, 16
    assert 8 * level_bytes(m, n, k) / (m * n) == pytest.approx(1 + 16 * k * (m + n) / (m * n), abs=1e-12)


def test_bits_per_level_of_the_published_shapes():
    assert 8 * level_bytes(4096, 4096, 16) / 4096**2 == 1.125
    assert round(8 * level_bytes(1024, 4096, 16) / (1024 * 4096), 2) == 1.31
    stack = bitstack.decompose(torch.randn(6, 13), None, 3, 2)  # rows of 13 bits take two bytes
    assert sum(t.numel() * t.element_size() for t in stack) == 3 * level_bytes(6, 13, 2) == 3 * (6 * 2 + 4 * 19)


def test_channel_scales_are_mean_norms_over_tokens(model, windows):
    found = bitstack.channel_scales(model, windows)
    name = "model.layers.1.mlp.down_proj"
    inputs = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0].numpy()))
    with torch.no_grad():
        model(windows)
    handle.remove()
    scale = np.sqrt((inputs[0].astype(np.float64) ** 2).sum(axis=1)).mean(axis=0) + 1e-3
    assert np.allclose(found[name], scale / math.sqrt(scale.max() * scale.min()), rtol=1e-5)
    assert list(found) == [name for name, m in model.named_modules()
                           if isinstance(m, nn.Linear) and name != "lm_head"]


def _stacks(model, windows, levels=3, rank=1):
    scales = bitstack.channel_scales(model, windows)
    return {name: bitstack.decompose(model.get_submodule(name).weight, scales[name], levels, rank) for name in scales}


def test_universal_order_is_by_level_then_by_naive_perplexity(model, windows):
    stacks = _stacks(model, windows)
    order = bitstack.universal_order(copy.deepcopy(model), stacks, windows)
    names = list(stacks)
    assert order[: len(names)] == [(1, name) for name in names]
    sums = {name: _naive_levels(*stack, stack.right.shape[-1]).cumsum(0) for name, stack in stacks.items()}
    for level in (2, 3):
        part = [name for at, name in order if at == level]
        assert sorted(part) == sorted(names)
        found = []
        for raised in part:
            for name in names:
                weight = sums[name][level - 1 if name == raised else level - 2]
                model.get_submodule(name).weight.data = torch.tensor(weight, dtype=torch.float32)
            found.append(_naive_perplexity(model, windows))
        assert all(b >= a * (1 - 1e-5) for a, b in zip(found, found[1:], strict=False))
        assert found[-1] > 1.01 * found[0]  # else any order would pass
    assert [at for at, _ in order] == sorted(at for at, _ in order)


@pytest.mark.parametrize("bpw", [2.5, 3.3, 4.6, 99.0])
def test_what_is_loaded_is_the_prefix_of_the_whole_order(model, windows, bpw):
    stacks = _stacks(model, windows)
    sizes = {name: level_bytes(*model.get_submodule(name).weight.shape, 1) for name in stacks}
    weights = sum(model.get_submodule(name).weight.numel() for name in stacks)
    budget = math.floor(bpw * weights / 8)
    expected, used = dict.fromkeys(stacks, 0), 0
    for _, name in bitstack.universal_order(copy.deepcopy(model), stacks, windows):
        if used + sizes[name] > budget:
            break
        used += sizes[name]
        expected[name] += 1
    outcome = bitstack.quantize(model, windows, bpw, rank=1, n_levels=3)
    assert outcome.notes["levels"] == expected
    assert outcome.stored_bytes == used and outcome.bpw == pytest.approx(8 * used / weights)
    for name, layer in outcome.model.named_modules():
        if isinstance(layer, BitStackLinear):
            for key in ("signs", "left", "right"):
                assert torch.equal(getattr(layer, key), getattr(stacks[name].first(expected[name]), key))


def test_stored_bytes_are_those_of_the_saved_file(model, windows, tmp_path):
    outcome = bitstack.quantize(model, windows, 3.3, rank=1)
    sizes = tensor_sizes(save_checkpoint(outcome.model, tmp_path / "model"))
    assert outcome.stored_bytes == sizes[sizes.part.isin(["signs", "left", "right"])].bytes.sum()
    assert set(sizes[sizes.module.str.contains("proj")].part) == {"signs", "left", "right"}


def test_cost_carries_the_published_numbers(model, windows):
    cost = {row["stage"]: row for row in bitstack.quantize(model, windows, 3.3, rank=1, sort_windows=2).cost.counts()}
    assert list(cost) == ["activation scales", "decomposition", "sorting"]
    assert cost["activation scales"]["full_units"] == 256 and cost["activation scales"]["units"] == 3
    assert cost["decomposition"]["full_units"] == 16 * 14
    assert cost["sorting"]["full_units"] == 15 * 14 and cost["sorting"]["units"] == 14
    assert cost["sorting"]["evaluations"] == 14 * 2 and cost["sorting"]["unit_scale"] == 32 * 2048 / (2 * 16)


def test_a_budget_below_one_level_names_the_smallest(model, windows):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SfmpError, match=r"at least \d\.\d+.*found 1") as error:
        bitstack.quantize(model, windows, 1.0, rank=1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    smallest = float(str(error.value).split("at least ")[1].split(",")[0]) + 1e-4
    assert set(bitstack.quantize(model, windows, smallest, rank=1).notes["levels"].values()) == {1}


@pytest.mark.parametrize(("arguments", "words"), [
    ({"rank": 33}, "rank.*1..32, found 33"), ({"rank": 0}, "rank"), ({"n_levels": 0}, "n_levels"),
    ({"n_windows": 0}, "n_windows"), ({"sort_windows": 0}, "sort_windows"),
])
def test_bad_knobs_are_named(model, windows, arguments, words):
    with pytest.raises(SfmpError, match=words):
        bitstack.quantize(model, windows, 90.0, **{"rank": 1, **arguments})


@pytest.mark.parametrize("failing", ["decompose", "universal_order"])
def test_an_error_leaves_the_model_as_it_was(model, windows, monkeypatch, failing):
    model.train().model.layers[0].eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    real = getattr(bitstack, failing)

    def fail(*arguments):
        real(*arguments)
        raise SfmpError("late")

    monkeypatch.setattr(bitstack, failing, fail)
    with pytest.raises(SfmpError, match="late"):
        bitstack.quantize(model, windows, 3.3, rank=1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes


def test_rank_weighs_at_every_width_as_sixteen_does_at_4096(model, windows):
    assert bitstack.quantize(model, windows, 4.0).notes["knobs"]["rank"] == 1
    for width, rank in ((4096, 16), (8192, 16), (2048, 8), (1024, 4), (300, 1), (64, 1)):
        assert bitstack.default_rank([(width, width), (width // 2, 3 * width)]) == rank


def test_bad_weights_are_named(model, windows):
    name = "model.layers.0.mlp.up_proj"
    with torch.no_grad():
        model.get_submodule(name).weight[0, 0] = float("nan")
    with pytest.raises(SfmpError, match="NaN"):
        bitstack.decompose(model.get_submodule(name).weight, None, 1, 1)
    with pytest.raises(SfmpError, match="float16"):
        bitstack.decompose(torch.full((4, 4), 1e12), None, 1, 1)


def test_same_input_same_bits(model, windows):
    other = copy.deepcopy(model)
    first, second = (bitstack.quantize(m, windows, 3.3, rank=2, seed=seed) for m, seed in ((model, 0), (other, 0)))
    assert first.notes == second.notes
    assert all(torch.equal(value, second.model.state_dict()[key]) for key, value in first.model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_forward_is_the_product_with_the_sum_of_the_levels(dtype):
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(6, 13, generator=generator), torch.randn(6, generator=generator)
    stack = bitstack.decompose(weight, None, 3, 2)
    layer = BitStackLinear(*stack, bias, in_features=13).to(dtype)
    assert layer.left.dtype == torch.float16 and layer.signs.dtype == torch.uint8 and layer.bias.dtype == dtype
    x = torch.randn(2, 3, 13, generator=generator).to(dtype)
    expected = x.double().numpy() @ _naive_levels(*stack, 13).sum(0).T + layer.bias.double().numpy()
    found = layer(x)
    assert found.dtype == dtype and found.shape == (2, 3, 6)
    assert np.allclose(found.double().numpy(), expected, atol=20 * torch.finfo(dtype).eps + 1e-5)
    with keep_dequantized(layer):
        assert torch.equal(layer(x), found) and torch.equal(layer(x), found)
        assert "weight" in layer._cache
    assert not layer._cache
    with pytest.raises(SfmpError, match=r"\[\.\.\., 13\].*found"):
        layer(x[..., :12])


def test_a_half_precision_model_with_biases_and_ragged_columns(windows):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=45, vocab_size=128, max_position_embeddings=64)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval().to(torch.bfloat16)
    with torch.no_grad():
        full = model(windows).logits
        outcome = bitstack.quantize(model, windows, 40.0, rank=1)
        layer = model.get_submodule("model.layers.0.mlp.down_proj")
        assert layer.signs.shape == (16, 32, 6) and layer.left.dtype == torch.float16
        assert model.model.layers[0].self_attn.q_proj.bias is not None
        error = (model(windows).logits - full).float().norm() / full.float().norm()
    assert error < 0.02 and outcome.notes["levels"]["model.layers.0.mlp.down_proj"] == 16
