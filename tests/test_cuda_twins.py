"""Python twins of the instructions, against torch and against the register maps of the PTX manual."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kernels_numba.gpu import twins


def _warp(function):
    """Results of 32 threads that run function(lane) together."""
    manager, found = SimpleNamespace(), [None] * 32

    def run(lane):
        found[lane] = function(lane)

    threads = [threading.Thread(target=run, args=(lane,)) for lane in range(32)]
    for lane, thread in enumerate(threads):
        thread.thread_id, thread._manager = lane, manager
        thread.start()
    for thread in threads:
        thread.join()
    return found


def _word(low, high):
    return np.array([low, high], np.float16).view(np.uint32)[0]


def test_tensor_core_tile():
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(16, 16)), rng.normal(size=(16, 8)), rng.normal(size=(16, 8)).astype(np.float32)
    a, b = a.astype(np.float16), b.astype(np.float16)

    def product(lane):
        g, t = lane >> 2, lane & 3
        registers = [_word(*a[row, column : column + 2]) for row, column in
                     ((g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8))]
        registers += [_word(b[2 * t, g], b[2 * t + 1, g]), _word(b[2 * t + 8, g], b[2 * t + 9, g])]
        return twins.multiply_tiles(*registers, c[g, 2 * t], c[g, 2 * t + 1], c[g + 8, 2 * t], c[g + 8, 2 * t + 1])

    expected = a.astype(float) @ b.astype(float) + c
    for lane, found in enumerate(_warp(product)):
        g, t = lane >> 2, lane & 3
        np.testing.assert_allclose(found, [*expected[g, 2 * t : 2 * t + 2], *expected[g + 8, 2 * t : 2 * t + 2]],
                                   rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mask", [1, 8, 16])
def test_lanes_exchange(mask):
    assert _warp(lambda lane: twins.shuffle_xor(float(lane), mask)) == [float(lane ^ mask) for lane in range(32)]


def test_numbers_round_as_torch_does():
    values = np.random.default_rng(0).normal(size=300).astype(np.float32)
    values = np.concatenate([values, values * 1e-6, [0, -0.0, 65519, 1e6, np.inf, -np.inf, 1 + 2**-8, 1 + 3 * 2**-8]])
    tensor = torch.from_numpy(values.astype(np.float32))
    for function, kind in ((twins.half_bits, torch.float16), (twins.bfloat_bits, torch.bfloat16)):
        found = [function(value) for value in tensor.numpy()]
        assert found == tensor.to(kind).view(torch.uint16).tolist()
    assert np.isnan(twins.bfloat_value(twins.bfloat_bits(np.float32(np.nan))))
    for value in (1.5, -3.0, 2.0**-20):
        assert twins.bfloat_value(twins.bfloat_bits(np.float32(value))) == value
        assert twins.float_value(twins.float_bits(value)) == np.float32(value)
        assert twins.half_low(_word(value, 7)) == twins.half_high(_word(7, value)) == np.float16(value)


def test_codes_become_normal_numbers():
    code = np.uint32(11 << 4 | 6 << 20)  # 11 and 6 as float16 subnormals, 4 places up
    factor = _word(2.0**10, 2.0**10)
    assert twins.multiply_halves(code, factor) == _word(11 * 2.0**-10, 6 * 2.0**-10)


def test_loads_outside_memory_or_alignment_fail():
    array = np.arange(8, dtype=np.uint32)
    assert twins.load_line(array, 16) == (4, 5, 6, 7) and twins.load_word(array, 28) == 7
    for offset in (-16, 8, 32):
        with pytest.raises(IndexError, match="offset"):
            twins.load_line(array, offset)
