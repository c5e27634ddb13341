"""The trainable block-mixed grid: forward as stored, gradients by their definition, nothing lost in packing."""

import numpy as np
import pytest
import torch
from torch import nn

from sfmp.baselines.fake_quant import FakeQuantLinear, storable
from sfmp.pack import pack
from sfmp.quantize import decode, encode
from sfmp.spec import MatrixPlan, SfmpError

GROUP, ROWS = 32, 3


def layer(seed=0, shape=(8, 75), levels=(1, 2, 3, 8), permuted=True, shift=0.0):
    """FakeQuantLinear with ragged edges and parameters moved away from round-to-nearest; its plan."""
    rng = np.random.default_rng(seed)
    linear = nn.Linear(shape[1], shape[0])
    linear.weight.data = torch.from_numpy(rng.normal(shift, 1.0, shape).astype(np.float32))
    linear.bias.data = torch.from_numpy(rng.normal(size=shape[0]).astype(np.float32))
    bits = rng.choice(levels, (-(-shape[0] // ROWS), -(-shape[1] // GROUP))).astype(np.uint8)
    perms = [rng.permutation(n) if permuted else np.arange(n) for n in shape]
    matrix = MatrixPlan(*perms, bits)
    fake = FakeQuantLinear(linear, matrix, group_size=GROUP, block_rows=ROWS)
    with torch.no_grad():  # narrower ranges, so that some weights are clipped; zeros between integers
        fake.scales.mul_(torch.from_numpy(rng.uniform(0.6, 0.9, fake.scales.shape).astype(np.float32)))
        fake.zeros.add_(torch.from_numpy(rng.uniform(-0.4, 0.4, fake.zeros.shape).astype(np.float32)))
    return fake, matrix


def stored_numbers(fake, row, column):
    """(step, zero used, value of code 0, highest code) of one weight in permuted order, by hand."""
    group, bits = column // GROUP, int(fake.block_bits[row // ROWS, column // GROUP])
    scale = 2 * float(np.float16(np.float32(fake.scales[row, group].item()) / 2))
    zero = fake.zeros[row, group].item()
    zero = zero if bits == 1 else float(np.round(zero))
    top = 2**bits - 1
    beta = float(np.float16(np.float32(scale) * np.float32(top / 2 - zero)))
    return scale, zero, beta - scale / 2 * top, top


def naive_weight(fake, matrix):
    """Quantized weight in natural order, one weight at a time."""
    natural = np.zeros((fake.out_features, fake.in_features))
    for row in range(fake.out_features):
        for column in range(fake.in_features):
            step, _, base, top = stored_numbers(fake, row, column)
            code = min(max(round((fake.weight[row, column].item() - base) / step), 0), top)
            natural[matrix.row_perm[row], matrix.col_perm[column]] = base + code * step
    return natural


@pytest.mark.parametrize("permuted", [True, False])
def test_forward_is_the_stored_grid(permuted):
    fake, matrix = layer(permuted=permuted)
    weight = fake.quantized_weight().detach()
    np.testing.assert_allclose(weight.numpy(), naive_weight(fake, matrix), rtol=1e-6, atol=1e-6)
    x = torch.randn(5, 75, generator=torch.Generator().manual_seed(1))
    expected = x.numpy() @ naive_weight(fake, matrix).T + fake.bias.detach().numpy()
    np.testing.assert_allclose(fake(x).detach().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_forward_equals_encode_and_decode():
    fake, _ = layer(shape=(6, 64), permuted=False)
    scales, zeros = storable(fake.scales.detach(), fake.zeros.detach(), fake.bits)
    parts = fake.weight.detach().reshape(6, 2, GROUP)
    expected = decode(encode(parts, scales, zeros, fake.bits), scales, zeros, fake.bits)
    assert torch.equal(fake.quantized_weight().detach(), expected.reshape(6, 64))


def test_starts_from_round_to_nearest():
    rng = np.random.default_rng(0)
    linear = nn.Linear(64, 4, bias=False)
    linear.weight.data = torch.from_numpy(rng.normal(size=(4, 64)).astype(np.float32))
    matrix = MatrixPlan(np.arange(4), np.arange(64), np.full((1, 2), 4, np.uint8))
    fake = FakeQuantLinear(linear, matrix, group_size=32, block_rows=4)
    step = (linear.weight.reshape(4, 2, 32).amax(-1) - linear.weight.reshape(4, 2, 32).amin(-1)) / 15
    error = (fake.quantized_weight() - linear.weight).abs().reshape(4, 2, 32).amax(-1)
    assert bool((error <= 0.55 * step).all()) and bool((error > 0.3 * step).all())


def surrogate(weight, scale, zero, residual, clipped_to):
    """What straight-through rounding differentiates: rounding adds a constant, a clipped code is a constant."""
    code = weight / scale + zero + residual if clipped_to is None else clipped_to
    return scale * (code - zero)


def test_gradients_are_those_of_straight_through_rounding():
    fake, matrix = layer(seed=3)
    rng = np.random.default_rng(4)
    up = rng.normal(size=(fake.out_features, fake.in_features)).astype(np.float32)
    (fake.quantized_weight() * torch.from_numpy(up)).sum().backward()
    by_weight = np.zeros_like(up, dtype=float)
    by_scale, by_zero = np.zeros(fake.scales.shape), np.zeros(fake.zeros.shape)
    clipped = 0
    for row in range(fake.out_features):
        for column in range(fake.in_features):
            scale, zero, _, top = stored_numbers(fake, row, column)
            weight, group = fake.weight[row, column].item(), column // GROUP
            nearest = round(weight / scale + zero)
            residual = nearest - (weight / scale + zero)
            clipped_to = None if 0 <= nearest <= top else 0 if nearest < 0 else top
            clipped += clipped_to is not None
            gradient = up[matrix.row_perm[row], matrix.col_perm[column]]
            here = (weight, scale, zero)
            for slot, target in ((0, by_weight), (1, by_scale), (2, by_zero)):
                step = 1e-6 * max(1.0, abs(here[slot]))
                high, low = ([v + sign * step * (i == slot) for i, v in enumerate(here)] for sign in (1, -1))
                slope = (surrogate(*high, residual, clipped_to) - surrogate(*low, residual, clipped_to)) / (2 * step)
                target[(row, column) if slot == 0 else (row, group)] += gradient * slope
    assert clipped > 10
    np.testing.assert_allclose(fake.weight.grad.numpy(), by_weight, atol=1e-4)
    # beta is rounded to fp16: the place of a weight on the grid may differ by a thousandth of a step
    np.testing.assert_allclose(fake.scales.grad.numpy(), by_scale, rtol=5e-3, atol=2e-2)
    np.testing.assert_allclose(fake.zeros.grad.numpy(), by_zero, rtol=1e-4, atol=1e-4)


def test_freezing_changes_no_number_and_leaves_the_scales():
    fake, _ = layer(seed=5)
    before = fake.quantized_weight().detach().clone()
    fake.freeze()
    fake.freeze()  # a second time changes nothing
    assert torch.equal(fake.quantized_weight().detach(), before)
    assert [name for name, _ in fake.named_parameters()] == ["scales", "bias"]
    fake.quantized_weight().sum().backward()
    codes, zeros = fake.codes.double().numpy(), fake.zeros.double().numpy()
    for group in range(zeros.shape[1]):
        part = codes[:, group * GROUP: (group + 1) * GROUP]
        expected = (part - zeros[:, group, None]).sum(1)
        np.testing.assert_allclose(fake.scales.grad[:, group].numpy(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_packed_is_what_was_trained(shift):
    fake, matrix = layer(seed=6, shift=shift)
    fake.freeze()
    with torch.no_grad():
        fake.scales.mul_(1.003)  # as if trained: no fp16 number any more
    q = fake.quantized()
    packed = pack(q.codes, q.scales, q.zeros, q.bits, group_size=GROUP, block_rows=ROWS,
                  row_perm=matrix.row_perm, col_perm=matrix.col_perm)
    torch.testing.assert_close(packed.dequantize(), fake.quantized_weight().detach(), rtol=1e-6, atol=2e-6)
    codes, scales, zeros = packed.unpack()
    whole = fake.bits > 1
    assert torch.equal(codes, q.codes) and torch.equal(scales, q.scales)
    assert torch.equal(zeros[whole], q.zeros[whole])


def test_steps_stay_positive_and_representable():
    scales = torch.tensor([[-1.0, 0.0, 1e-12, 0.3337]])
    stored, zeros = storable(scales, torch.tensor([[0.4, 1.5, 2.5, -0.7]]), torch.tensor([[2.0, 2.0, 1.0, 4.0]]))
    assert bool((stored > 0).all()) and torch.equal(stored, 2 * (stored / 2).half().float())
    assert zeros.tolist() == [[0.0, 2.0, 2.5, -1.0]]


def test_weights_that_cannot_be_quantized_are_refused():
    linear = nn.Linear(32, 2)
    linear.weight.data[0, 0] = torch.nan
    matrix = MatrixPlan(np.arange(2), np.arange(32), np.full((1, 1), 2, np.uint8))
    with pytest.raises(SfmpError, match="NaN"):
        FakeQuantLinear(linear, matrix, group_size=32, block_rows=2)
