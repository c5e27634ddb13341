"""SFMPLinear on the CPU kernels: what it keeps between calls never outlives what it was made from."""

import copy

import numpy as np
import pytest
import torch
from cases import packed_case
from torch import nn

import kernels_numba
from kernels_numba.cpu import product, targets
from sfmp.linear import SFMPLinear, keep_dequantized

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(targets.detect()[0] is None, reason=targets.detect()[1])]


@pytest.fixture
def layer():
    layer = SFMPLinear(packed_case(0, bias=True))
    layer.backend = "cpu"
    return layer


def _x(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _expected(layer, x):
    return nn.functional.linear(x.double(), layer.dequantize().double(), layer.bias.double())


def _close(layer, x, limit=1e-4):
    expected = _expected(layer, x)
    return float((layer(x).double() - expected).norm() / expected.norm()) < limit


def test_later_calls_skip_the_checks_and_agree_with_the_first(layer, monkeypatch):
    x = _x(2, 3, 100)
    first = layer(x)
    monkeypatch.setattr(product, "matmul", None)
    assert torch.equal(layer(x), first) and _close(layer, x[0])
    assert _close(layer, _x(1, 100, dtype=torch.bfloat16), 1e-2)


def test_other_kinds_of_activations_take_the_long_way(layer):
    x = _x(4, 100)
    with torch.no_grad():
        layer(x)
    assert layer(x.double()).dtype == torch.float64 and _close(layer, x.double())
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    assert torch.allclose(leaf.grad, layer.dequantize().sum(0).expand(4, -1), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"floating \[..., 100\]"):
        layer(_x(4, 99))
    with pytest.raises(ValueError, match="device cpu"):
        layer(x.to("meta"))


def test_changed_backend_and_mode_are_honoured(layer):
    x = _x(5, 100)
    results = {}
    for backend, mode in (("cpu", None), ("cpu", "exact"), ("reference", None), ("cpu", "exact"), ("cpu", None)):
        layer.backend, layer.mode = backend, mode
        assert torch.equal(results.setdefault((backend, mode), layer(x)), layer(x))
    modes = 1 if targets.detect()[0] == "generic" else 2  # whose default is exact
    assert len({tuple(y.flatten().tolist()) for y in results.values()}) == 1 + modes
    assert torch.equal(results["reference", None], nn.functional.linear(x, layer.dequantize(), layer.bias))


@pytest.mark.parametrize("change", [
    lambda layer: layer.to(torch.bfloat16),
    lambda layer: layer.double(),
    lambda layer: copy.deepcopy(layer),
    lambda layer: layer.bias.mul_(3) is None or layer,
    lambda layer: layer.load_state_dict(packed_case(9, bias=True, levels=(3,)).tensors()) and layer,
], ids=["bfloat16", "double", "copy", "bias in place", "state"])
def test_changed_layers_compute_with_what_they_hold(layer, change):
    layer = SFMPLinear(packed_case(0, bias=True, levels=(3,)))
    layer.backend = "cpu"
    x = _x(2, 100)
    layer(x)
    assert _close(change(layer), x)


def test_a_layer_that_moved_forgets_its_image(layer):
    layer(_x(1, 100))
    assert {"cpu", "ready"} <= set(layer._cache)
    assert not layer.to(torch.float16)._cache


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_is_this_backend_on_the_cpu(kind):
    layer = SFMPLinear(packed_case(0, bias=True))
    x = _x(3, 100, dtype=kind)
    expected = kernels_numba.matmul(x, layer.packed, backend="cpu")
    assert torch.equal(layer(x), expected) and torch.equal(layer(x), expected)
    assert torch.equal(kernels_numba.matmul(x, layer.packed), expected)


def test_auto_is_the_reference_where_that_is_asked_for_or_better():
    layer = SFMPLinear(packed_case(0, bias=True))
    x = _x(3, 100)
    reference = nn.functional.linear(x, layer.dequantize(), layer.bias)
    fast = layer(x)
    assert not torch.equal(fast, reference)
    with keep_dequantized(layer):
        assert torch.equal(layer(x), reference), "kept weights are there to be used"
    assert torch.equal(layer(x), fast)
    wide = nn.functional.linear(x.double(), layer.dequantize().double(), layer.bias.double())
    assert torch.equal(layer(x.double()), wide), "float64 is not computed in float32 unless asked"
    array = x.numpy()
    np.testing.assert_array_equal(kernels_numba.matmul(array, layer.packed), fast.numpy())
    assert kernels_numba.matmul(array.astype(np.float64), layer.packed).dtype == np.float64
    assert torch.allclose(kernels_numba.matmul(x, layer.packed, mode="lut"), reference, rtol=1e-4, atol=1e-3)


def test_auto_says_when_no_backend_has_the_mode():
    with pytest.raises(ValueError, match="mode: expected one of exact, lut"):
        kernels_numba.matmul(_x(1, 100), packed_case(0), mode="mma")
