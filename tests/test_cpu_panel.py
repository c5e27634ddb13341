"""Many tokens: panels hold the dequantized weight bit by bit, and the launch table decides when they are used."""

import numpy as np
import pytest
import torch
from cases import packed_case
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels_numba
from kernels_numba.cpu import launch, layout, panel, product, targets

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(targets.detect()[0] is None, reason=targets.detect()[1])]
MODES = targets.MODES.get(targets.detect()[0], ())


def _x(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _through_panels(x, packed, threads=1, rounded=False):
    image = product.weight(packed).image.numpy()
    return panel.multiply(x, image, packed.bias, threads, rounded, lambda size: np.zeros(size, np.uint8))


@given(st.integers(0, 1 << 30), st.integers(1, 120), st.integers(1, 300), st.sampled_from((32, 64, 128, 256)),
       st.integers(1, 70), st.integers(1, 200))
@settings(max_examples=20)
def test_panels_hold_the_dequantized_weight(seed, rows, cols, group_size, block_rows, panel_rows):
    packed = packed_case(seed, rows=rows, cols=cols, group_size=group_size, block_rows=block_rows)
    image = product.weight(packed).image.numpy()
    covered = [strip for first, last, *_ in panel.strips_of_panels(image, panel_rows) for strip in range(first, last)]
    assert covered == list(range(image[: 8 * layout.HEADER].view(np.int64)[layout.STRIPS]))
    assert torch.equal(_through_panels(torch.eye(cols), packed).T, packed.dequantize())


def test_rounded_panels_hold_bfloat16(monkeypatch):
    packed = packed_case(3, rows=200, cols=300, group_size=128, block_rows=64)
    monkeypatch.setattr(panel, "fast_bfloat16", lambda: True)
    found = _through_panels(torch.eye(300), packed, rounded=True)
    assert torch.equal(found.T, packed.dequantize().bfloat16().float())


def test_several_panels_threads_and_bias(monkeypatch):
    packed = packed_case(0, rows=500, cols=300, group_size=128, block_rows=100, bias=True)
    x = _x(80, 300)
    whole = _through_panels(x, packed)
    expected = x.double() @ packed.dequantize().double().T + packed.bias
    assert float((whole - expected).norm() / expected.norm()) < 1e-6
    monkeypatch.setattr(panel, "PANEL_ROWS", 64)
    assert len(panel.strips_of_panels(product.weight(packed).image.numpy(), 64)) > 5
    for threads in (1, 2):
        torch.testing.assert_close(_through_panels(x, packed, threads), whole)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_accuracy_of_a_mode_holds_across_the_crossover(mode, dtype, monkeypatch):
    packed = packed_case(0, rows=300, cols=512, group_size=128, block_rows=100, levels=(2, 3, 4), bias=True)
    x = _x(40, 2, 512).to(dtype)
    limit = {"lut16": 1e-4, "lut8": 2e-2, "exact": 1e-5}[mode] + torch.finfo(dtype).eps
    expected = x.double() @ packed.dequantize().double().T + packed.bias
    calls = []
    monkeypatch.setattr(panel, "strips_of_panels", lambda *a, f=panel.strips_of_panels: calls.append(1) or f(*a))
    for crossover in (1, 1e9):
        monkeypatch.setattr(launch, "crossover", lambda *_, value=crossover: value)
        monkeypatch.setattr(launch, "least_crossover", lambda *_, value=crossover: value)
        y = kernels_numba.matmul(x, packed, backend="cpu", mode=mode)
        assert y.dtype == dtype and y.shape == (40, 2, 300)
        assert float((y.double() - expected).norm() / expected.norm()) < limit
    assert len(calls) == 1


def test_activations_that_are_not_finite_pass_through_panels_as_in_torch(monkeypatch):
    monkeypatch.setattr(launch, "crossover", lambda *_: 1)
    monkeypatch.setattr(launch, "least_crossover", lambda *_: 1)
    packed = packed_case(0, bias=True)
    x = _x(3, 100)
    x[0, 5], x[1, 7], x[1, 9] = float("nan"), float("inf"), -float("inf")
    found = kernels_numba.matmul(x, packed, backend="cpu", mode="exact")
    expected = torch.nn.functional.linear(x, packed.dequantize(), packed.bias)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_mean_bits_of_an_image():
    packed = packed_case(0, rows=160, cols=512, group_size=128, block_rows=32)
    assert layout.mean_bits(product.weight(packed).image.numpy()) == pytest.approx(packed.wbits)


def test_launch_table_is_complete_and_interpolated(monkeypatch):
    for target, modes in targets.MODES.items():
        for mode in modes:
            least = launch.least_crossover(target, mode)
            assert 1 <= launch.singles(target, mode) < least <= launch.crossover(target, mode, 3)
    table = {"targets": {"avx2": {"modes": {"lut8": {"singles": 2, "crossover": {"2": None, "4": 60, "8": 20}}}}}}
    monkeypatch.setattr(launch, "table", lambda: table)
    found = [launch.crossover(target, "lut8", bits) for target in ("avx2", "neon") for bits in (1, 2, 3, 4, 6, 8)]
    assert found == pytest.approx([np.inf, np.inf, 120, 60, 30, 20] * 2)
