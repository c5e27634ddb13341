"""The quantizer against a per-group oracle, through the numbers a checkpoint stores."""

import naive
import numpy as np
import pytest
import torch

from sfmp.pack import pack
from sfmp.quantize import dequantize, quantize, row_bits, stored_affine
from sfmp.spec import SfmpError


def _case(rows, columns, group_size, block_rows, seed, levels=(1, 2, 3, 4, 8)):
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((rows, columns)).astype(np.float32) * 0.05
    shape = (-(-rows // block_rows), -(-columns // group_size))
    return weight, generator.choice(levels, shape).astype(np.uint8)


@pytest.mark.parametrize(
    "rows, columns, group_size, block_rows", [(8, 64, 32, 4), (7, 70, 32, 3), (5, 20, 32, 8)]
)
def test_matches_the_oracle_group_by_group(rows, columns, group_size, block_rows):
    weight, bits = _case(rows, columns, group_size, block_rows, seed=1)
    got = dequantize(quantize(weight, bits, group_size=group_size, block_rows=block_rows)).numpy()
    expected = naive.quantize_blocks(weight, bits, group_size, block_rows)
    # The oracle is float64: an element may sit on the edge between two codes, so compare the error it makes.
    assert np.allclose(np.abs(got - weight), np.abs(expected - weight), atol=2e-5)
    assert np.mean(np.isclose(got, expected, atol=1e-6)) > 0.999


@pytest.mark.parametrize("bit", [2, 3, 4, 5, 8])
def test_error_is_at_most_half_a_step(bit):
    weight, _ = _case(16, 128, 64, 16, seed=2)
    q = quantize(weight, np.full((1, 2), bit), group_size=64, block_rows=16)
    steps = q.scales.numpy().repeat(64, axis=1)
    # Integer zeros may shift the ends of the grid by half a step, and fp16 rounding by a little more.
    assert (np.abs(dequantize(q).numpy() - weight) <= 0.51 * steps + 1e-6).all()
    assert int(q.codes.max()) == 2**bit - 1 or bit == 8


def test_groups_without_sign_change_keep_their_range():
    """Defect 9 of METHOD 1.12: a clamped zero would saturate an all-positive group at max - min."""
    weight = np.linspace(0.9, 1.2, 32, dtype=np.float32)[None]
    restored = dequantize(quantize(weight, np.array([[4]]), group_size=32, block_rows=1)).numpy()
    assert np.abs(restored - weight).max() < 0.3 / 15


@pytest.mark.parametrize("value", [0.0, 5.0, -3.7, 1e-6, 1e-4])
def test_constant_groups_come_back(value):
    weight = np.full((2, 32), value, np.float32)
    for bit in (1, 2, 8):
        restored = dequantize(quantize(weight, np.array([[bit]]), group_size=32, block_rows=2)).numpy()
        assert np.abs(restored - weight).max() <= abs(value) / 400 + 1.2e-7


def test_tiny_groups_are_not_flattened():
    """Defect 10 of METHOD 1.12: an absolute floor of 1e-5 would quantize this group to a constant."""
    weight = np.linspace(-4e-6, 4e-6, 32, dtype=np.float32)[None]
    restored = dequantize(quantize(weight, np.array([[4]]), group_size=32, block_rows=1)).numpy()
    assert np.corrcoef(restored, weight)[0, 1] > 0.99


def test_one_bit_is_the_mean_and_the_mean_deviation():
    weight, _ = _case(4, 64, 32, 4, seed=3)
    restored = dequantize(quantize(weight, np.array([[1, 1]]), group_size=32, block_rows=4)).numpy()
    groups = weight.reshape(4, 2, 32)
    centre = groups.mean(-1, keepdims=True)
    deviation = np.abs(groups - centre).mean(-1, keepdims=True)
    expected = np.where(groups > centre, centre + deviation, centre - deviation).reshape(4, 64)
    assert np.allclose(restored, expected, atol=1e-4)


def test_one_bit_beats_min_max_levels():
    weight, _ = _case(32, 128, 128, 32, seed=4)
    one = dequantize(quantize(weight, np.array([[1]]), group_size=128, block_rows=32)).numpy()
    low, high = weight.min(1, keepdims=True), weight.max(1, keepdims=True)
    minmax = np.where(weight > (low + high) / 2, high, low)
    assert np.square(one - weight).sum() < 0.5 * np.square(minmax - weight).sum()


def test_clip_range_limits_the_grid():
    weight, _ = _case(4, 32, 32, 4, seed=5)
    lower, upper = np.full((4, 1), -0.03, np.float32), np.full((4, 1), 0.03, np.float32)
    q = quantize(weight, np.array([[3]]), group_size=32, block_rows=4,
                 lower=torch.tensor(lower), upper=torch.tensor(upper))
    restored, step = dequantize(q).numpy(), 0.06 / 7
    assert np.abs(restored).max() <= 0.03 + step / 2 + 1e-5
    assert np.abs(weight).max() > 0.06


def test_survives_packing_exactly():
    weight, bits = _case(37, 100, 32, 16, seed=6, levels=(2, 3, 4, 8))
    weight[3] = 5.0
    weight[4] = np.abs(weight[4]) + 0.3
    q = quantize(weight, bits, group_size=32, block_rows=16)
    packed = pack(q.codes, q.scales, q.zeros, q.bits, group_size=32, block_rows=16)
    codes, scales, zeros = packed.unpack()
    assert np.array_equal(np.asarray(codes), q.codes.numpy())
    assert np.array_equal(np.asarray(scales), q.scales.numpy())
    assert np.array_equal(np.asarray(zeros), q.zeros.numpy())
    assert np.array_equal(np.asarray(packed.dequantize()), dequantize(q).numpy())


def test_stored_pair_is_finite_and_exact_for_scales():
    weight, bits = _case(9, 64, 32, 4, seed=7)
    q = quantize(weight, bits, group_size=32, block_rows=4)
    alpha, beta = stored_affine(q.scales, q.zeros, row_bits(q.bits, 9, 4))
    assert torch.isfinite(alpha).all() and torch.isfinite(beta).all()
    assert torch.equal(2 * alpha.float(), q.scales)


def test_equal_inputs_give_equal_codes():
    weight, bits = _case(20, 96, 32, 8, seed=8)
    first, second = (quantize(weight, bits, group_size=32, block_rows=8) for _ in range(2))
    assert torch.equal(first.codes, second.codes) and torch.equal(first.zeros, second.zeros)


def test_errors_say_what_is_wrong():
    weight, bits = _case(8, 64, 32, 4, seed=9)
    with pytest.raises(SfmpError, match=r"expected shape \(2, 2\).*found \(1, 2\)"):
        quantize(weight, bits[:1], group_size=32, block_rows=4)
    with pytest.raises(SfmpError, match="within 1..8, found"):
        quantize(weight, np.full_like(bits, 9), group_size=32, block_rows=4)
    with pytest.raises(SfmpError, match="1 of 512 weights are NaN"):
        quantize(np.where(weight == weight[0, 7], np.nan, weight), bits, group_size=32, block_rows=4)
    with pytest.raises(SfmpError, match="too wide for fp16"):
        quantize(weight * 1e8, bits, group_size=32, block_rows=4)
    with pytest.raises(SfmpError, match="both lower and upper"):
        quantize(weight, bits, group_size=32, block_rows=4, lower=torch.zeros(8, 2))
