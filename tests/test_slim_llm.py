"""SliM-LLM: bits, ranges and codes against brute force in numpy; exact mean bits, exact bytes, bad input."""

import copy
import itertools
import json

import naive
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sfmp.accounting import tensor_sizes
from sfmp.baselines import uniform
from sfmp.baselines.slim_bits import Exchanges, SampledStats, candidate_bits, candidates, group_salience
from sfmp.baselines.slim_llm import quantize
from sfmp.baselines.slim_scales import calibrated_parameters
from sfmp.checks import SfmpError
from sfmp.hf import save_checkpoint
from sfmp.quantize import dequantize
from sfmp.solvers import Stats, compensation, round_columns
from sfmp.spec import MatrixPlan, QuantSpec

GROUP = 32


@pytest.fixture
def windows():
    return torch.randint(0, 128, (5, 24), generator=torch.Generator().manual_seed(2))


def _case(rows, columns, seed, tokens=200):
    """A weight whose groups differ in importance, and correlated inputs; float64."""
    generator = np.random.default_rng(seed)
    contrast = np.geomspace((0.05, 0.6, 1.2)[seed % 3], 2.0, -(-columns // GROUP))
    strength = np.repeat(generator.permutation(contrast), GROUP)[:columns]
    weight = generator.standard_normal((rows, columns)) * 0.3
    mix = generator.standard_normal((columns, columns)) * 0.1 + np.eye(columns)
    return weight, generator.standard_normal((tokens, columns)) @ mix * strength


def _compensation(weight, inputs, dtype=torch.float64):
    rows, columns = weight.shape
    matrix = MatrixPlan(np.arange(rows), np.arange(columns), None)
    stats = Stats(gram=torch.tensor(inputs.T @ inputs), tokens=len(inputs))
    return compensation(torch.tensor(weight, dtype=dtype), stats, matrix)


# Brute force
def _damped_inverse(inputs):
    hessian = 2.0 / len(inputs) * inputs.T @ inputs
    return np.linalg.inv(hessian + 0.01 * np.diag(hessian).mean() * np.eye(len(hessian)))


def _naive_salience(weight, inputs):
    """Entry by entry; the diagonal of the Cholesky factor of a matrix from its leading minors."""
    inverse = _damped_inverse(inputs)
    logarithms = [0.0] + [np.linalg.slogdet(inverse[:k, :k])[1] for k in range(1, len(inverse) + 1)]
    squares = np.exp(np.diff(logarithms))  # U_jj²
    sums = np.zeros(-(-weight.shape[1] // GROUP))
    for row in weight:
        for j, value in enumerate(row):
            sums[j // GROUP] += value**2 / squares[j]
    return sums


def _naive_search(weight, salience, inputs, base, kl="quantized"):
    """Quantize the whole matrix for every p, and compare the softmax of its outputs token by token."""
    groups, whole = len(salience), weight.shape[1] // GROUP
    ranked = sorted(range(whole), key=lambda group: salience[group])
    losses, maps = [], []
    for p in range(max(1, whole // 2)):
        bits = [base] * groups
        for group in range(whole):
            bits[group] += (group in ranked[whole - p :]) - (group in ranked[:p])
        rounded, loss = naive.quantize_blocks(weight, np.array([bits]), GROUP, len(weight)), 0.0
        for x in inputs:
            true, found = (values / values.sum() for values in (np.exp(weight @ x), np.exp(rounded @ x)))
            a, b = (found, true) if kl == "quantized" else (true, found)
            loss += (a * np.log(a / b)).sum() / len(inputs)
        losses.append(loss)
        maps.append(bits)
    return maps, losses


def _naive_levels(group, bit, steps, spread, emphasis):
    """Values a group of one row can take after trying every range."""
    if bit == 1:
        return naive.naive_levels(group, 1)
    best, kept = np.inf, None
    for factor in [1.0, *(1.0 + spread * i / steps for i in range(-steps, steps + 1) if i)]:
        levels = naive.naive_levels(np.array([group.min() * factor, group.max() * factor]), bit)
        nearest = levels[np.abs(group[:, None] - levels[None]).argmin(1)]
        loss = sum(e * abs(w - q) ** 2.4 for e, w, q in zip(emphasis, group, nearest, strict=True))
        if loss < best:
            best, kept = loss, levels
    return kept


def _naive_slim(weight, inputs, bits, steps, spread, lam):
    """Column after column with the explicit inverse Hessian; ranges searched when a group begins."""
    current, restored = weight.copy(), np.zeros(weight.shape)
    inverse = _damped_inverse(inputs)
    for j in range(weight.shape[1]):
        if j % GROUP == 0:
            span = slice(j, j + GROUP)
            part, remaining = current[:, span], inverse[j:, j:]
            logarithms = [0.0] + [np.linalg.slogdet(remaining[:k, :k])[1] for k in range(1, part.shape[1] + 1)]
            salience = part**2 / np.exp(np.diff(logarithms))
            z = (salience - salience.mean()) / salience.std()
            emphasis = np.where(np.abs(z) > 2, lam, 1.0)
            levels = [_naive_levels(row, bits[j // GROUP], steps, spread, e)
                      for row, e in zip(part, emphasis, strict=True)]
        for i in range(len(current)):
            restored[i, j] = levels[i][np.abs(levels[i] - current[i, j]).argmin()]
        error = (current[:, j] - restored[:, j]) / inverse[j, j]
        current[:, j + 1 :] -= np.outer(error, inverse[j, j + 1 :])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return restored


# Decisions
@pytest.mark.parametrize("columns, seed", [(128, 0), (256, 1), (170, 2), (64, 3)])
def test_salience_of_groups(columns, seed):
    weight, inputs = _case(6, columns, seed, 3 * columns)
    current, factor = _compensation(weight, inputs)
    assert np.allclose(group_salience(current, factor, GROUP), _naive_salience(weight, inputs), rtol=1e-6)


@pytest.mark.parametrize("kl", ["quantized", "original"])
@pytest.mark.parametrize("columns, base, seed", [
    (256, 2, 0), (256, 2, 1), (224, 3, 2), (200, 2, 3), (200, 3, 4), (320, 2, 5), (96, 2, 6), (20, 2, 7),
])
def test_bit_search_is_brute_force(columns, base, seed, kl):
    weight, inputs = _case(10, columns, seed)
    salience = _naive_salience(weight, inputs)
    samples = [torch.tensor(part, dtype=torch.float32) for part in (inputs[:70], inputs[70:])]
    exchanges = Exchanges(torch.tensor(weight, dtype=torch.float32), salience, base, GROUP, kl)
    losses = exchanges.divergences(samples)
    maps, expected = _naive_search(weight, salience, inputs, base, kl)
    assert [exchanges.bits(p).tolist() for p in range(exchanges.count)] == maps
    assert np.allclose(losses, expected, rtol=1e-3) if len(maps) > 1 else losses == []


def test_the_cases_of_the_search_differ_in_their_answer():
    cases = [_case(10, 256, seed) for seed in range(6)]
    losses = [_naive_search(w, _naive_salience(w, x), x, 2, "original")[1] for w, x in cases]
    assert set(np.argmin(losses, 1).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("columns", [*range(20, 400, 36), 32 * 7, 32 * 8])
@pytest.mark.parametrize("base", [2, 3, 7])
def test_mean_bits_are_exact_for_every_p(columns, base):
    widths = [min(GROUP, columns - start) for start in range(0, columns, GROUP)]
    order = np.random.default_rng(columns).permutation(columns // GROUP)
    for p in range(candidates(columns, GROUP)):
        bits = candidate_bits(order, len(widths), base, p)
        assert sum(int(b) * w for b, w in zip(bits, widths, strict=True)) == base * columns
        assert (bits < base).sum() == (bits > base).sum() == p
        assert 2 * p < max(2, len(order))


@pytest.mark.parametrize("lam", [1.0, 0.2, 6.0])
@pytest.mark.parametrize("bits, steps", [([2, 3, 1, 2, 3], 4), ([2, 2, 2, 2, 1], 7)])
def test_ranges_and_codes_are_brute_force(lam, bits, steps):
    weight, inputs = _case(6, 150, 11, 500)
    weight[:, 5] *= 6.0  # something salient to single out
    current, factor = _compensation(weight, inputs)
    spec = QuantSpec(bpw=3.0, group_size=GROUP, block_rows=6, levels=(1, 2, 3))

    def choose(part, width, diagonal):
        return calibrated_parameters(part, width, diagonal, steps=steps, spread=0.1, lam=lam)

    got = dequantize(round_columns(current, factor, np.array([bits]), spec, choose)).numpy()
    assert np.allclose(got, _naive_slim(weight, inputs, bits, steps, 0.1, lam), atol=1e-5)


def test_every_ingredient_of_the_range_search_matters():
    """Otherwise the comparison with brute force would prove nothing about it."""
    weight, inputs = _case(6, 150, 11, 500)
    weight[:, 5] *= 6.0
    options = ((4, 0.0, 1.0), (4, 0.1, 1.0), (4, 0.1, 6.0), (4, 0.3, 1.0))
    results = [_naive_slim(weight, inputs, [2, 3, 1, 2, 3], *option) for option in options]
    assert all(np.abs(a - b).max() > 0.01 for a, b in itertools.combinations(results, 2))


def test_no_step_leaves_min_max_and_one_bit_its_closed_form():
    part = torch.randn(4, GROUP, generator=torch.Generator().manual_seed(0))
    ones, diagonal = torch.ones(4), torch.ones(GROUP)
    for bits in (ones, 2 * ones):
        plain = calibrated_parameters(part, bits, diagonal, steps=0)
        searched = calibrated_parameters(part, bits, diagonal, steps=5)
        assert torch.equal(plain[0], searched[0]) == (bits is ones)


def test_samples_are_evenly_spaced():
    stats = SampledStats(windows=3, of=7, tokens_each=2, group_size=GROUP)
    inputs = torch.arange(7 * 4 * 128, dtype=torch.float32).reshape(7, 4, 128)
    stats.add(inputs[:3])
    stats.add(inputs[3:])
    assert torch.equal(torch.cat(stats.kept), inputs[[0, 3, 5]][:, [0, 2]]) and stats.tokens == 28
    narrow = SampledStats(windows=3, of=7, group_size=GROUP)
    narrow.add(inputs[..., :64])
    assert narrow.kept == []  # two groups: nothing to decide


# Whole models

def _contrast(model):
    """Weights of the first groups of down_proj made unimportant, so that trading bits pays."""
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, :GROUP] *= 0.02
        layer.mlp.down_proj.weight.data[:, GROUP : 2 * GROUP] *= 4.0
    return model


def test_without_search_it_is_uniform_gptq(tiny_llama, windows):
    plain = copy.deepcopy(tiny_llama)
    uniform.gptq(plain, windows, 3.0, group_size=GROUP)
    outcome = quantize(tiny_llama, windows, 3.0, group_size=GROUP, sba_windows=0, sqc_steps=0)
    expected = plain.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in tiny_llama.state_dict().items())
    assert outcome.cost.stages["bit search (SBA)"].units == 0


def test_outcome_is_exact_to_the_byte_and_loads_again(tiny_llama, windows, tmp_path):
    model = _contrast(tiny_llama)
    outcome = quantize(model, windows, 3.0, group_size=GROUP, sqc_steps=3, n_windows=4, sba_windows=2, sba_tokens=7)
    assert outcome.bpw == outcome.plan.bpw == 3.0
    expected, traded = 0, 0
    for name, matrix in outcome.plan.items():
        rows, columns = matrix.shape
        widths = [min(GROUP, columns - start) for start in range(0, columns, GROUP)]
        bits = matrix.bits[0].tolist()
        assert matrix.bits.shape == (1, len(widths))
        assert sum(b * w for b, w in zip(bits, widths, strict=True)) == 2 * columns
        assert model.get_submodule(name).block_bits.flatten().tolist() == bits
        notes = outcome.notes["matrices"][name]
        assert bits == notes["group_bits"] and bits.count(3) == notes["p"] == np.argmin(notes["divergences"] or [0])
        mixed = len(set(bits)) > 1
        traded += mixed
        expected += sum(rows * 4 * b + rows * 4 for b in bits) + (len(bits) if mixed else 1)
    assert traded and outcome.notes["with_choice"] == 2
    assert outcome.stored_bytes == expected
    folder = save_checkpoint(model, tmp_path / "model")
    sizes = tensor_sizes(folder)
    saved = sizes[sizes.part.isin(["planes", "alpha", "beta", "block_bits"])].bytes.sum()
    constant = sum(m.bits.size - 1 for m in outcome.plan.values() if len(np.unique(m.bits)) == 1)
    assert outcome.stored_bytes == saved - constant
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.quantization_config.plan_hash == outcome.plan.hash
    with torch.no_grad():
        assert torch.equal(loaded(windows).logits, model(windows).logits)


def test_work_is_counted(tiny_llama, windows):
    outcome = quantize(tiny_llama, windows, 3.0, group_size=GROUP, sqc_steps=0, sba_windows=2, sba_tokens=8)
    counts = {row["stage"]: row for row in outcome.cost.counts()}
    assert list(counts) == ["hessian", "column update (SQC + GPTQ)", "bit search (SBA)"]
    assert counts["hessian"]["evaluations"] == 2 * 5 and counts["hessian"]["full_units"] == 256
    # only down_proj (172 columns, five whole groups) has a choice, of two candidates, in each of two layers
    search = counts["bit search (SBA)"]
    assert search["units"] == 2 * 2 * 2 and search["full_units"] == 128 * 2 * 2
    assert search["unit_scale"] == 2048 / 8
    assert counts["column update (SQC + GPTQ)"]["units"] == 14


def test_deterministic_and_json_able(tiny_llama, windows):
    runs = []
    for seed in (0, 5):
        model = copy.deepcopy(tiny_llama)
        outcome = quantize(model, windows.numpy(), 3.0, seed=seed, group_size=GROUP, sqc_steps=2)
        runs.append((model.state_dict(), json.dumps(outcome.notes)))
    assert runs[0][1] == runs[1][1] and '"sqc_steps": 2' in runs[0][1]
    assert '"n_windows": 5, "sba_windows": 5, "sba_tokens": 24' in runs[0][1]  # what there was, not the published
    assert all(torch.equal(value, runs[1][0][name]) for name, value in runs[0][0].items())


def test_half_precision(tiny_llama, windows):
    model = tiny_llama.to(torch.bfloat16)
    outcome = quantize(model, windows, 4.0, group_size=GROUP, sqc_steps=2)
    assert outcome.bpw == 4.0 and {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("bpw, knobs, message", [
    (2.0, {}, r"needs 2\.\.7 code bits, found 1 .*choose bpw in 3\.\.8"),
    (9.0, {}, r"needs 2\.\.7 code bits, found 8"),
    (3.4, {}, "whole number of code bits"),
    (3.0, {"sqc_steps": -1}, "sqc_steps: expected an integer >= 0"),
    (3.0, {"n_windows": 0}, "n_windows: expected an integer >= 1"),
    (3.0, {"sba_windows": 1.5}, "sba_windows: expected an integer"),
    (3.0, {"sba_tokens": 0}, "sba_tokens: expected an integer >= 1"),
    (3.0, {"sqc_range": 1.0}, "sqc_range"),
    (3.0, {"lam": float("nan")}, "lam: expected a finite"), (3.0, {"kl": "both"}, "kl: expected one of quant"),
])
def test_bad_input_is_named(tiny_llama, windows, bpw, knobs, message):
    with pytest.raises(SfmpError, match=message):
        quantize(tiny_llama, windows, bpw, group_size=GROUP, **knobs)
    with pytest.raises(SfmpError, match="slim_llm needs calibration"):
        quantize(tiny_llama, None, 3.0, group_size=GROUP)
