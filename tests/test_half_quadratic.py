"""Half-quadratic codes against a slow oracle, and against the rounding they start from."""

import numpy as np
import pytest
import torch

from sfmp.baselines.half_quadratic import half_quadratic
from sfmp.spec import SfmpError


def _oracle(weight, bits, group_size, lp_norm=0.7, beta=10.0, kappa=1.01, iterations=20):
    """Published iteration in float64, entry by entry; all groups stop together, a short last group on its own."""
    rows, columns = weight.shape
    whole = columns // group_size * group_size
    if 0 < whole < columns:
        parts = weight[:, :whole], weight[:, whole:]
        return np.hstack([_oracle(p, bits, group_size, lp_norm, beta, kappa, iterations) for p in parts])
    width = min(group_size, columns)
    groups = [weight[i, j : j + width].astype(np.float64) for i in range(rows) for j in range(0, columns, width)]
    top = 2**bits - 1
    inverse = [min(top / max(g.max() - g.min(), 1e-300), 2e4) for g in groups]
    zeros = [-g.min() * s for g, s in zip(groups, inverse, strict=True)]
    history = []
    for _ in range(iterations + 1):
        rebuilt, updated, cost = [], [], 0.0
        for group, scale, zero in zip(groups, inverse, zeros, strict=True):
            row, shift = [], 0.0
            for value in group:
                code = min(max(np.round(value * scale + zero), 0), top)
                back = (code - zero) / scale
                error = value - back
                cost += abs(error) ** lp_norm
                kept = 0.0
                if error:
                    kept = np.sign(error) * max(abs(error) - abs(error) ** (lp_norm - 1) / beta, 0)
                shift += code - (value - kept) * scale
                row.append(back)
            rebuilt.append(row)
            updated.append(shift / len(group))
        if history and cost >= history[-1][0]:
            break
        history.append((cost, rebuilt))
        zeros, beta = updated, beta * kappa
    return np.array(history[-1][1]).reshape(rows, columns)


def _cost(weight, rebuilt):
    return float((weight - rebuilt).abs().double().pow(0.7).sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("scale", "columns"), [(0.02, 64), (1.0, 64), (20.0, 64), (1.0, 80)])
def test_equals_the_oracle(bits, scale, columns):
    # float32 values: at 20 times the scale the soft threshold is active, at 0.02 it removes everything
    weight = (np.random.default_rng(bits).standard_t(4, (6, columns)) * scale).astype(np.float32)
    result = half_quadratic(torch.from_numpy(weight), bits, 32).numpy()
    assert np.allclose(result, _oracle(weight, bits, 32), atol=1e-4 * scale)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_better_than_rounding(bits):
    weight = torch.from_numpy(np.random.default_rng(0).standard_t(4, (32, 256)).astype(np.float32)) * 0.02
    rounded = half_quadratic(weight, bits, 128, iterations=0)
    groups = weight.reshape(32, 2, 128)
    low, step = groups.amin(-1, keepdim=True), (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True))
    step = step / (2**bits - 1)
    plain = (low + ((groups - low) / step).round() * step).reshape(32, 256)
    assert torch.allclose(rounded, plain, atol=1e-6)
    assert _cost(weight, half_quadratic(weight, bits, 128)) < 0.999 * _cost(weight, plain)


def test_never_worse_than_rounding_and_exact_where_it_can_be():
    for seed in range(20):
        weight = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, 32)).astype(np.float32)) ** 3
        better, plain = (half_quadratic(weight, 3, 32, iterations=n) for n in (20, 0))
        assert _cost(weight, better) <= _cost(weight, plain) * (1 + 1e-6)
    constant = torch.full((3, 64), 0.7)
    assert torch.allclose(half_quadratic(constant, 2, 32), constant)
    assert half_quadratic(torch.zeros(1, 8), 2, 32).abs().max() == 0


def test_any_dtype_gives_float32_and_leaves_the_weight_alone():
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = weight.clone()
    assert half_quadratic(weight, 4, 32).dtype == torch.float32
    assert torch.equal(weight, before)


@pytest.mark.parametrize(("weight", "bits", "message"), [
    (torch.zeros(4), 2, "matrix"), (torch.full((2, 32), torch.nan), 2, "NaN"), (torch.zeros(2, 32), 0, "bits"),
])
def test_bad_input(weight, bits, message):
    with pytest.raises(SfmpError, match=message):
        half_quadratic(weight, bits, 32)
