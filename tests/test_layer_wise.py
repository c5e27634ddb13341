"""Layer-wise oracle: bits per matrix against a greedy walk written out, bytes, errors, determinism."""

import copy

import numpy as np
import pytest
import torch

from sfmp.accounting import tensor_sizes
from sfmp.baselines import layer_wise
from sfmp.hf import save_checkpoint
from sfmp.salience import fisher_salience, linear_modules
from sfmp.spec import QuantSpec, SfmpError

SHAPES = {"a": (64, 32), "b": (32, 32), "c": (128, 96), "d": (32, 64)}


def _windows(count=4, length=32, vocabulary=128):
    return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(1))


def _loss(salience, bits):
    return sum(salience[n].sum() / (2 ** bits[n] - 1) ** 2 for n in bits)


def _greedy(salience, shapes, levels, budget):
    """Raise the matrix that gains most per bit until that step does not fit; then the best that does fit."""
    bits = dict.fromkeys(shapes, levels[0])
    room = budget - sum(levels[0] * n * k for n, k in shapes.values())
    prefix, filled = True, []
    while True:
        steps = []
        for name, (n, k) in shapes.items():
            if bits[name] < levels[-1]:
                up = levels[levels.index(bits[name]) + 1]
                gain = _loss(salience, bits) - _loss(salience, {**bits, name: up})
                steps.append((gain / ((up - bits[name]) * n * k), name, up, (up - bits[name]) * n * k))
        if prefix and steps and max(steps)[3] > room:
            prefix = False
        steps = [s for s in steps if s[3] <= room]
        if not steps:
            return bits, filled
        _, name, up, price = max(steps)
        bits[name], room = up, room - price
        if not prefix:
            filled.append(name)


@pytest.mark.parametrize("bpw", [3.0, 3.2, 3.5, 3.75, 4.1, 4.9, 5.0])
def test_bits_equal_a_greedy_walk(bpw):
    total = sum(n * k for n, k in SHAPES.values())
    for seed in range(12):
        rng = np.random.default_rng(seed)
        salience = {n: rng.random(s) * rng.lognormal(0, 2) for n, s in SHAPES.items()}
        spec = QuantSpec(bpw=bpw, group_size=32, block_rows=128, levels=(2, 3, 4), reorder="none")
        bits, filled = layer_wise.allocate_layers(salience, SHAPES, spec)
        assert (bits, filled) == _greedy(salience, SHAPES, [2, 3, 4], spec.budget_bits(total))
        used = sum(bits[name] * n * k for name, (n, k) in SHAPES.items())
        assert used <= (bpw - 1) * total + 1e-6


def test_what_fits_is_used():
    # The big matrix is the most salient per bit and never fits; the small one does.
    salience = {"big": np.full((128, 96), 9.0), "small": np.ones((32, 32))}
    spec = QuantSpec(bpw=3.5, group_size=32, block_rows=128, levels=(2, 3, 4), reorder="none")
    bits, filled = layer_wise.allocate_layers(salience, {n: s.shape for n, s in salience.items()}, spec)
    assert bits == {"big": 2, "small": 4} and filled == ["small", "small"]


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_one_width_per_matrix_and_bytes(tiny_llama, tmp_path, method):
    salience = fisher_salience(tiny_llama, _windows())
    shapes = {n: m.weight.shape for n, m in linear_modules(tiny_llama).items()}
    outcome = layer_wise.quantize(tiny_llama, _windows(), 3.9, group_size=32, salience=salience, method=method)
    assert outcome.model is tiny_llama
    assert all(len(np.unique(m.bits)) == 1 and len(m.bits) == 1 for m in outcome.plan.values())
    total = sum(n * k for n, k in shapes.values())
    bits = {name: int(outcome.plan[name].bits[0, 0]) for name in shapes}
    used = sum(bits[name] * n * k for name, (n, k) in shapes.items())
    assert outcome.bpw == pytest.approx(used / total + 1) and outcome.bpw <= 3.9 and len(set(bits.values())) > 1
    # 172 columns are padded to 6 groups of 32 in the planes and in the affine pairs; one byte of bit map each
    groups = {name: -(-k // 32) for name, (_, k) in shapes.items()}
    expected = sum(n * groups[name] * (32 * bits[name] // 8 + 4) + 1 for name, (n, _) in shapes.items())
    assert outcome.stored_bytes == expected
    sizes = tensor_sizes(save_checkpoint(tiny_llama, tmp_path / "c"))
    sizes = sizes[sizes.module.isin(list(shapes)) & sizes.part.isin(["planes", "alpha", "beta"])]
    assert sizes.bytes.sum() + len(shapes) == outcome.stored_bytes


def test_deterministic_and_computes_its_own_salience(tiny_llama):
    twin = copy.deepcopy(tiny_llama)
    first = layer_wise.quantize(tiny_llama, _windows(), 3.6, group_size=32, method="rtn")
    second = layer_wise.quantize(twin, _windows(), 3.6, group_size=32, method="rtn")
    assert first.plan.hash == second.plan.hash and first.notes == second.notes
    assert [r["stage"] for r in first.cost.rows()] == ["salience", "allocation", "quantization"]
    assert first.cost.counts() == second.cost.counts()
    with torch.no_grad():
        assert torch.equal(tiny_llama(_windows()).logits, twin(_windows()).logits)


@pytest.mark.parametrize(("options", "message"), [
    ({"bpw": 2.5}, "bpw"), ({"bpw": 9.0}, "bpw"), ({"salience": "fishy"}, "fishy"), ({"salience": {}}, "entry"),
    ({"salience": "negative"}, "finite"),
])
def test_bad_input(tiny_llama, options, message):
    if options.get("salience") == "negative":
        options = {"salience": {n: -torch.ones(m.weight.shape) for n, m in linear_modules(tiny_llama).items()}}
    with pytest.raises(SfmpError, match=message):
        layer_wise.quantize(tiny_llama, _windows(), **{"bpw": 3.5, "group_size": 32, **options})


