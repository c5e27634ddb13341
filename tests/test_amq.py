"""AMQ: divergence, freezing, predictor, search and pick against brute force; bytes, errors, determinism."""

import copy
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sfmp.accounting import tensor_sizes
from sfmp.baselines import amq
from sfmp.baselines.design_search import Predictor, non_dominated, random_designs, spread_subset
from sfmp.baselines.half_quadratic import half_quadratic
from sfmp.baselines.proxy_model import jensen_shannon
from sfmp.baselines.search_archive import Search
from sfmp.cost import CostRecord
from sfmp.hf import save_checkpoint
from sfmp.salience import linear_modules
from sfmp.spec import SfmpError

FEW = {"n_windows": 2, "n_tokens": 8, "n_initial": 6, "iterations": 2, "per_iteration": 3, "population": 12,
       "generations": 4, "subset_population": 8, "subset_generations": 4}


class _Toy(nn.Module):
    """Embedding, three linears of different sizes and importance, a head that is skipped."""

    def __init__(self, seed=0, widths=(32, 64, 32, 96), outlier=None):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(40, widths[0])
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths))
        self.lm_head = nn.Linear(widths[-1], 40, bias=False)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
        self.lm_head.weight.data *= 4
        if outlier is not None:  # a wide column takes the range of its group from all the others
            self.layers[outlier].weight.data[:, 0] *= 9
        self.eval()

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden) if layer.in_features == layer.out_features else torch.tanh(layer(hidden))
        return SimpleNamespace(logits=self.lm_head(hidden))


def _windows(count=3, length=16, vocabulary=40):
    return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(1))


def _divergence(p_logits, q_logits):
    """Mean Jensen-Shannon divergence per token: two Kullback-Leibler sums in float64."""
    total, tokens = 0.0, 0
    for a, b in zip(np.asarray(p_logits, np.float64).reshape(-1, p_logits.shape[-1]),
                    np.asarray(q_logits, np.float64).reshape(-1, q_logits.shape[-1]), strict=True):
        p, q = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
        m = (p + q) / 2
        total += 0.5 * sum(x * np.log(x / y) for x, y in zip(p, m, strict=True) if x > 0)
        total += 0.5 * sum(x * np.log(x / y) for x, y in zip(q, m, strict=True) if x > 0)
        tokens += 1
    return total / tokens


def _measured(model, design, windows, group_size):
    """Divergence of a design on a copy of the model."""
    twin = copy.deepcopy(model)
    for linear, bits in zip(linear_modules(twin).values(), design, strict=True):
        linear.weight.data = half_quadratic(linear.weight, int(bits), group_size)
    with torch.no_grad():
        return _divergence(model(windows).logits.numpy(), twin(windows).logits.numpy())


@pytest.fixture(scope="module")
def toy():
    """Toy model, its windows, and the measured divergence of all 27 designs."""
    model, windows = _Toy(), _windows()
    designs = list(itertools.product((2, 3, 4), repeat=3))
    return model, windows, {d: _measured(model, d, windows, 32) for d in designs}


def test_divergence_equals_the_definition():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 7, 50, generator=generator) * 3 for _ in range(2))
    a[0, 0, 1:] = -1e4  # a certain token: the other probabilities are 0
    assert jensen_shannon(a, b) / 14 == pytest.approx(_divergence(a.numpy(), b.numpy()), rel=1e-5)
    assert jensen_shannon(a, a) == 0.0
    apart = torch.tensor([[100.0, -100.0]])
    assert jensen_shannon(apart, -apart) == pytest.approx(np.log(2), rel=1e-6)
    with pytest.raises(SfmpError, match="shape"):
        jensen_shannon(a, b[:1])
    with pytest.raises(SfmpError, match="finite"):
        jensen_shannon(a, b * float("nan"))


def test_divergence_does_not_depend_on_chunks_or_on_logits_kept(toy, monkeypatch):
    model, windows, measured = toy
    found = amq.search(model, windows, group_size=32, **{**FEW, "n_tokens": 16, "n_windows": 3})
    monkeypatch.setattr("sfmp.baselines.proxy_model.CHUNK", {"cpu": 100})
    monkeypatch.setattr("sfmp.baselines.proxy_model.KEPT_LOGITS", 1)
    monkeypatch.setattr("sfmp.baselines.proxy_model.BATCH_TOKENS", 16)
    again = amq.search(model, windows, group_size=32, **{**FEW, "n_tokens": 16, "n_windows": 3})
    assert np.allclose(found.sensitivities, again.sensitivities, rtol=1e-4)


def test_sensitivities_and_frozen(toy):
    model, windows, measured = toy
    found = amq.search(model, windows, group_size=32, **{**FEW, "n_windows": 3, "n_tokens": 16})
    alone = [(2, 4, 4), (4, 2, 4), (4, 4, 2)]
    expected = np.array([measured[d] for d in alone])
    assert np.allclose(found.sensitivities, expected, rtol=1e-3)
    assert found.frozen.tolist() == [bool(s > 2 * np.sort(expected)[1]) for s in expected]
    # every divergence in the archive is that of its design
    for bits, divergence in zip(found.bits.tolist(), found.divergences, strict=True):
        assert divergence == pytest.approx(measured[tuple(bits)], rel=1e-3)


def test_an_outlier_is_frozen_in_every_design():
    model = _Toy(outlier=0)
    found = amq.search(model, _windows(), group_size=32, **FEW)
    assert found.frozen.tolist() == [True, False, False] and (found.bits[:, 0] == 4).all()
    sizes = found.weights / found.weights.sum()
    assert found.mean_bits.min() == pytest.approx(2 + 2 * sizes[0])
    with pytest.raises(SfmpError, match="expected 3.*frozen"):
        found.best(2.0)


def test_exhausting_the_space_finds_the_enumerated_best(toy, monkeypatch):
    model, windows, measured = toy
    monkeypatch.setattr(amq, "FROZEN_ABOVE", np.inf)
    found = amq.search(model, windows, group_size=32, n_windows=3, n_tokens=16, n_initial=4, iterations=40,
                       per_iteration=3, population=12, generations=4, subset_population=8, subset_generations=4)
    assert {tuple(b) for b in found.bits.tolist()} == set(measured) and len(found.bits) == 27
    sizes = [m.weight.numel() for m in linear_modules(model).values()]
    for wbits in np.linspace(2.0, 4.0, 41).round(3):
        allowed = [d for d in measured if sum(b * n for b, n in zip(d, sizes, strict=True)) <= wbits * sum(sizes)]
        index, _ = found.best(float(wbits))
        assert measured[tuple(found.bits[index].tolist())] == pytest.approx(min(measured[d] for d in allowed), rel=1e-4)
        assert found.mean_bits[index] <= wbits


def test_the_search_beats_random_designs(toy, monkeypatch):
    """On a loss known in closed form, about 100 designs of 3 ** 16 come near the optimum of every budget."""
    monkeypatch.setattr(amq, "FROZEN_ABOVE", np.inf)
    price = np.random.default_rng(0).lognormal(0, 1.5, 16)

    def loss(designs):
        return (price / (2.0 ** np.asarray(designs) - 1) ** 2).sum(axis=-1)

    rng = np.random.default_rng(1)
    found = Search([f"l{i}" for i in range(16)], np.ones(16), np.ones(16), np.zeros(16, bool), 128)
    designs = np.where(np.eye(16, dtype=bool), 2, 4)
    found.add(designs, loss(designs))
    new = amq._random_new(found, 20, rng)
    found.add(new, loss(new))
    for _ in range(8):
        new = amq._propose(found, 8, 40, 15, 20, 10, rng)
        assert len(new) == 8
        found.add(new, loss(new))
    assert len(np.unique(found.bits, axis=0)) == len(found.bits) == 100
    blind = random_designs(100, 16, (2, 3, 4), rng)
    for wbits in (2.25, 2.5, 2.75, 3.0, 3.25, 3.5):
        index, _ = found.best(wbits)
        assert found.divergences[index] < loss(blind[blind.mean(axis=1) <= wbits]).min()
        bits = np.full(16, 2)
        while bits.mean() < wbits:  # equal sizes: the optimum takes the largest gain each time
            gains = price * (1 / (2.0**bits - 1) ** 2 - 1 / (2.0 ** (bits + 1) - 1) ** 2)
            bits[np.where(bits < 4, gains, -1).argmax()] += 1
        assert loss(bits) <= found.divergences[index] * (1 + 1e-9) < 1.5 * loss(bits)


def test_predictor_interpolates_and_is_linear_where_the_loss_is():
    rng = np.random.default_rng(0)
    designs = np.unique(random_designs(40, 6, (2, 3, 4), rng), axis=0)
    slope = rng.normal(size=6)
    assert np.allclose(Predictor(designs, designs @ slope + 1)([[2, 3, 4, 4, 3, 2]]), 1 + slope @ [2, 3, 4, 4, 3, 2])
    losses = rng.random(len(designs))
    assert np.allclose(Predictor(designs, losses)(designs), losses)


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_predictor_with_too_few_designs(count):
    rng = np.random.default_rng(0)
    designs = np.unique(random_designs(20, 8, (2, 3, 4), rng), axis=0)[:count]
    losses = rng.random(count)
    predictor = Predictor(designs, losses)
    assert np.allclose(predictor(designs), losses)
    assert np.isfinite(predictor(random_designs(5, 8, (2, 3, 4), rng))).all()


def test_front_and_subset():
    rng = np.random.default_rng(0)
    losses, sizes = rng.random(40), rng.integers(0, 12, 40) / 12
    expected = {i for i in range(40) if not any(
        (losses[j] <= losses[i] and sizes[j] <= sizes[i]) and (losses[j] < losses[i] or sizes[j] < sizes[i])
        for j in range(40))}
    assert set(non_dominated(losses, sizes).tolist()) == expected
    candidates, taken = np.array([2.0, 2.05, 2.1, 2.5, 2.52, 3.0, 3.45, 3.5, 3.55]), np.array([2.0, 4.0])
    best = min(itertools.combinations(range(9), 3),
               key=lambda c: np.diff(np.sort(np.concatenate([candidates[list(c)], taken]))).std())
    chosen = spread_subset(candidates, taken, 3, population=30, generations=30, seed=0)
    assert tuple(chosen.tolist()) == best
    assert spread_subset(candidates, taken, 20, population=4, generations=2, seed=0).tolist() == list(range(9))


def test_whole_method_bytes_and_cost(tiny_llama, tmp_path):
    windows = _windows(4, 32, 128)
    own = {name: m.weight.detach().clone() for name, m in linear_modules(tiny_llama).items()}
    shapes = {name: tuple(w.shape) for name, w in own.items()}
    cost = CostRecord()
    found = amq.search(tiny_llama, windows, group_size=32, cost=cost, **FEW)
    assert all(torch.equal(m.weight, own[n]) for n, m in linear_modules(tiny_llama).items()), "the model is untouched"
    counts = {row["stage"]: row for row in cost.counts()}
    assert list(counts) == ["proxy quantization", "sensitivity", "search", "prediction"]
    assert counts["search"]["units"] == 6 + 2 * 3 and counts["search"]["full_units"] == 10_250
    assert counts["search"]["evaluations"] == 12 * 2 and counts["search"]["unit_scale"] == 128 * 2048 / 16
    assert counts["sensitivity"]["evaluations"] == (14 + 1) * 2
    assert len(found.bits) == 12 + int((~found.frozen).sum())

    found.save(tmp_path / "search.json")
    outcome = amq.quantize(tiny_llama, windows, 4.0, group_size=32, found=tmp_path / "search.json")
    Search.load(tmp_path / "search.json").save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "search.json").read_bytes()
    total = sum(n * k for n, k in shapes.values())
    bits = {name: int(outcome.plan[name].bits[0, 0]) for name in shapes}
    used = sum(bits[name] * n * k for name, (n, k) in shapes.items())
    assert outcome.bpw == pytest.approx(used / total + 1) and outcome.bpw <= 4.0
    assert {bits[n] for n, f in zip(found.names, found.frozen, strict=True) if f} <= {4}
    groups = {name: -(-k // 32) for name, (_, k) in shapes.items()}
    expected = sum(n * groups[name] * (32 * bits[name] // 8 + 4) + 1 for name, (n, _) in shapes.items())
    assert outcome.stored_bytes == expected
    sizes = tensor_sizes(save_checkpoint(tiny_llama, tmp_path / "c"))
    sizes = sizes[sizes.module.isin(list(shapes)) & sizes.part.isin(["planes", "alpha", "beta"])]
    assert sizes.bytes.sum() + len(shapes) == outcome.stored_bytes
    assert outcome.notes["knobs"] == {**FEW, "seed": 0, "group_size": 32, "tolerance": 0.005}
    assert outcome.notes["search_shared"] and [r["stage"] for r in outcome.cost.rows()] == ["quantization"]


def test_half_precision_models_keep_their_dtype(tiny_llama):
    model = tiny_llama.bfloat16().train()
    found = amq.search(model, _windows(4, 32, 128), group_size=32, **FEW)
    assert np.isfinite(found.divergences).all() and (found.divergences > 0).all()
    assert model.training and all(m.weight.dtype == torch.bfloat16 for m in linear_modules(model).values())


def test_same_seed_same_result(tiny_llama):
    windows, twin = _windows(4, 32, 128), copy.deepcopy(tiny_llama)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    first = amq.quantize(tiny_llama, windows, 4.0, group_size=32, seed=3, **FEW)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    second = amq.quantize(twin, windows, 4.0, group_size=32, seed=3, **FEW)
    assert first.plan.hash == second.plan.hash and first.notes == second.notes
    assert first.cost.counts() == second.cost.counts()
    with torch.no_grad():
        assert torch.equal(tiny_llama(windows).logits, twin(windows).logits)


def test_bad_input(tiny_llama, toy, tmp_path):
    windows = _windows(4, 32, 128)
    for options, message in [({"bpw": 2.5}, "bpw"), ({"bpw": 6.0}, "bpw"), ({"n_windows": 0}, "n_windows"),
                             ({"population": 1}, "population"), ({"iterations": -1}, "iterations")]:
        with pytest.raises(SfmpError, match=message):
            amq.quantize(tiny_llama, windows, **{"bpw": 4.0, "group_size": 32, **FEW, **options})
    with pytest.raises(SfmpError, match="windows"):
        amq.search(tiny_llama, windows[0], **FEW)
    other = amq.search(toy[0], toy[1], group_size=32, **FEW)
    with pytest.raises(SfmpError, match="of this model"):
        amq.quantize(tiny_llama, windows, 4.0, group_size=32, found=other)
    with pytest.raises(SfmpError, match="found: expected a search with seed 1.*found one with seed 0"):
        amq.quantize(toy[0], toy[1], 4.0, group_size=32, found=other, seed=1)
    assert other.knobs["n_tokens"] == 8 and amq.search(toy[0], toy[1], group_size=32, **{
        **FEW, "n_windows": 9, "n_tokens": 99}).knobs.items() >= {"n_windows": 3, "n_tokens": 16}.items()
    (tmp_path / "a.json").write_text('{"format_version": 1}')
    with pytest.raises(SfmpError, match="Search.save"):
        Search.load(tmp_path / "a.json")


@pytest.mark.parametrize("part, altered", [
    ("bits", lambda bits: bits[:-1]), ("bits", lambda bits: [bits[0][:-1], *bits[1:]]),
    ("bits", lambda bits: [[*bits[0], 2], bits[1][:-1], *bits[2:]]), ("bits", lambda bits: [row[:2] for row in bits]),
    ("divergences", lambda values: values[:-1])])
def test_an_altered_search_is_refused(toy, tmp_path, part, altered):
    path = tmp_path / "search.json"
    amq.search(toy[0], toy[1], group_size=32, **FEW).save(path)
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, part: altered(data[part])}))
    with pytest.raises(SfmpError, match=r"search\.json: expected.*search again"):
        Search.load(path)


def test_logits_that_are_not_finite_name_the_design(toy):
    model = copy.deepcopy(toy[0])
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(SfmpError, match="design 244 .bits of layers.0 and on., full precision.*finite"):
        amq.search(model, toy[1], group_size=32, **FEW)
