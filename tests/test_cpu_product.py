"""Products on the CPU: every mode against float64, any shape, dtype, thread count and kind of activation."""

import os
import threading

import naive
import numpy as np
import pytest
import torch
from cases import affine_case, packed_case
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels_numba
from kernels_numba.cpu import drive, launch, product, targets, threads
from sfmp.linear import SFMPLinear
from sfmp.pack import pack
from sfmp.spec import SfmpError

REASON = kernels_numba.available()["cpu"]
pytestmark = [pytest.mark.cpu, pytest.mark.skipif(not REASON.startswith("yes"), reason=REASON)]
MODES = targets.MODES.get(targets.detect()[0], ())
TOPS = {"lut16": 32700, "lut8": 127}  # largest entries of the tables
LIMITS = {"lut16": 1e-4, "lut8": 2e-2, "exact": 1e-5}


def _x(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _multiply(x, packed, mode=None):
    return kernels_numba.matmul(x, packed, backend="cpu", mode=mode)


def _error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


SHAPES = {"rows": st.integers(1, 40), "cols": st.integers(1, 300),
          "group_size": st.sampled_from((32, 64, 96, 128, 256)), "block_rows": st.integers(1, 40)}


@given(st.integers(0, 1 << 30), st.fixed_dictionaries(SHAPES), st.integers(1, 3), st.sampled_from((1e-6, 1.0, 1e4)))
@settings(max_examples=25)
def test_error_stays_within_what_rounded_tables_allow(seed, shape, tokens, size):
    case = affine_case(seed, **shape, bias=seed % 2 == 0)
    packed = pack(**case)
    x = np.random.default_rng(seed).normal(size=(tokens, shape["cols"])).astype(np.float32) * np.float32(size)
    weight, magnitude = naive.affine_weight(**case)
    expected = x.astype(np.float64) @ weight.T + (0 if case["bias"] is None else case["bias"])
    rounding = 2e-6 * (np.abs(x) @ (magnitude + np.abs(weight)).T + np.abs(expected)) + 1e-30
    for mode in MODES:
        allowed = rounding
        if mode in TOPS:
            columns = np.gcd(shape["group_size"], 128)
            allowed = allowed + naive.table_error(x, magnitude, case["col_perm"], columns, TOPS[mode])
        found = _multiply(x, packed, mode)
        assert found.dtype == np.float32 and (np.abs(found - expected) <= allowed).all(), mode


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("mode", MODES)
def test_relative_error_of_a_layer(mode, group_size):
    """Gaussian activations and scales like a quantized layer's: the accuracy each mode promises."""
    case = affine_case(1, 300, 1100, group_size, 64, levels=(2, 3, 4))
    levels = ((1 << case["bits"].astype(int)) - 1).repeat(64, axis=0)[:300]
    case["zeros"] = np.round(levels / 2 + np.random.default_rng(0).normal(size=levels.shape) / 3).astype(np.float32)
    packed = pack(**case)
    x = _x(4, 1100)
    expected = x.double() @ packed.dequantize().double().T
    assert 0 < _error(_multiply(x, packed, mode), expected) < LIMITS[mode]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("mode", MODES)
def test_every_bit_width(mode, bits):
    packed = packed_case(bits, rows=50, cols=200, group_size=128, block_rows=32, levels=(bits,))
    x = _x(2, 200, seed=bits)
    assert _error(_multiply(x, packed, mode), x.double() @ packed.dequantize().double().T) < LIMITS[mode]


def test_extreme_codes_do_not_overflow():
    """All codes 255 and all activations equal: the largest sums that can occur."""
    for sign in (1, -1):
        case = affine_case(0, 16, 512, 128, 16, levels=(8,))
        case["codes"][:] = 255 if sign == 1 else 0
        packed = pack(**case)
        x = torch.full((1, 512), 3.0)
        expected = x.double() @ packed.dequantize().double().T
        for mode in MODES:
            assert torch.allclose(_multiply(x, packed, mode).double(), expected, rtol=1e-4), mode


@pytest.mark.parametrize("mode", MODES)
def test_one_column_at_a_time_is_the_weight(mode):
    packed = packed_case(1)
    weight = packed.dequantize()
    for column in (0, 31, 57, 99):
        found = _multiply(torch.eye(100)[column], packed, mode)
        assert torch.allclose(found, weight[:, column], rtol=0, atol=float(LIMITS[mode] * weight.abs().max()))


@pytest.mark.parametrize("shape", [(100,), (1, 100), (7, 100), (2, 3, 100), (0, 100), (70, 2, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_leading_dimensions_and_dtype(shape, dtype):
    packed = packed_case(0, bias=True)
    x = _x(*shape, dtype=dtype)
    found = _multiply(x, packed)
    expected = x.double() @ packed.dequantize().double().T + packed.bias
    assert found.dtype == dtype and found.shape == expected.shape
    rounding = max(torch.finfo(dtype).eps, 1e-4)
    assert torch.allclose(found.double(), expected, rtol=rounding, atol=rounding * 20)


def test_bfloat16_and_float16_results_are_rounded_once_to_nearest():
    packed = packed_case(0, bias=True)
    for dtype in (torch.bfloat16, torch.float16):
        x = _x(50, 100, dtype=dtype)
        assert torch.equal(_multiply(x, packed), _multiply(x.float(), packed).to(dtype))


def test_arrays_and_layers_and_strides():
    packed = packed_case(0, bias=True)
    x = _x(6, 100)
    y = _multiply(x, packed)
    frozen = x.numpy().copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(_multiply(frozen, packed), y.numpy())
    assert torch.equal(_multiply(x, SFMPLinear(packed)), y)
    assert torch.equal(_multiply(x.T.contiguous().T, packed), y)
    assert torch.equal(_multiply(x.repeat(1, 2)[:, :100], packed), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_bias_of_any_dtype_may_change_in_place(dtype):
    packed = packed_case(0, bias=True)
    packed.bias = packed.bias.to(dtype)
    x = _x(2, 100)
    with_bias = _multiply(x, packed)
    packed.bias.mul_(2)
    assert torch.allclose(_multiply(x, packed) - with_bias, packed.bias.float() / 2, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_thread_counts_give_identical_bits(mode, tokens):
    packed = packed_case(2, rows=1500, cols=5000, group_size=128, block_rows=512, bias=True)
    x = _x(tokens, 5000)
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 2, 1):
            torch.set_num_threads(count)
            if threads.count() != count:
                pytest.skip(f"needs {count} threads, Numba has {threads.count()} here")
            results.append(_multiply(x, packed, mode))
            x = x.clone()
            _multiply(-x, packed, mode)  # so that the tables are built again
        assert all(torch.equal(results[0], other) for other in results[1:])
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_python_threads_do_not_disturb_each_other():
    cases = [(packed_case(seed, rows=300, cols=700), _x(3, 700, seed=seed)) for seed in range(4)]
    expected = [_multiply(x, packed) for packed, x in cases]
    wrong = []

    def work(number):
        packed, x = cases[number]
        wrong.extend(number for _ in range(50) if not torch.equal(_multiply(x, packed), expected[number]))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("mode", MODES)
def test_activations_without_tables_propagate_as_in_torch(mode, value):
    packed = packed_case(0, bias=True)
    x = _x(3, 100)
    x[1, 17] = value
    expected = torch.nn.functional.linear(x, packed.dequantize(), packed.bias)
    torch.testing.assert_close(_multiply(x, packed, mode), expected, rtol=1e-5, atol=1e-4, equal_nan=True)
    x[1, 17] = 0
    expected = torch.nn.functional.linear(x, packed.dequantize(), packed.bias)
    assert _error(_multiply(x, packed, mode), expected) < LIMITS[mode]


@pytest.mark.parametrize("mode", MODES)
def test_zero_and_tiny_activations(mode):
    packed = packed_case(0, bias=True)
    assert torch.equal(_multiply(torch.zeros(2, 100), packed, mode), packed.bias.expand(2, -1))
    assert torch.equal(_multiply(torch.full((1, 100), 1e-40), packed, mode), packed.bias[None])


def test_tables_are_shared_and_never_stale():
    first, other = packed_case(0), packed_case(5)
    same = packed_case(7, rows=60)
    same.col_perm = first.col_perm
    x = _x(2, 100)

    def built():
        return int(product._local.job[: drive.JOB_BYTES].view(np.int64)[drive.BUILT]) > 0

    def check(packed, mode=MODES[0]):
        expected = x.double() @ packed.dequantize().double().T
        assert _error(_multiply(x, packed, mode), expected) < LIMITS[mode]
        return built()

    assert check(first) and not check(first) and not check(same)
    assert check(other), "another column order needs tables of its own"
    assert check(first) and all(check(first, mode) for mode in MODES[1:]) and check(first) == (len(MODES) > 1)
    x[1, 3] += 1
    assert check(same), "activations changed in place"
    x = x[:1].clone()
    assert check(same) and not check(first)
    x = x.clone()
    assert not check(first), "the same numbers elsewhere in memory"


def test_gradient_flows_to_the_input():
    packed = packed_case(0, bias=True)
    x = _x(2, 100).requires_grad_()
    _multiply(x, packed).square().sum().backward()
    again = x.detach().clone().requires_grad_()
    torch.nn.functional.linear(again, packed.dequantize(), packed.bias).square().sum().backward()
    assert _error(x.grad, again.grad) < 1e-4
    with torch.no_grad():
        assert not _multiply(x, packed).requires_grad


def test_operator_is_registered_as_torch_expects():
    packed = packed_case(0, bias=True)
    weight = product.weight(packed)
    arguments = (_x(2, 100), weight.image, packed.bias, 40, weight.tile_columns, weight.target, MODES[0])
    torch.library.opcheck(torch.ops.sfmp.cpu_linear.default, arguments)
    with torch.device("meta"):
        shape = torch.ops.sfmp.cpu_linear(torch.empty(5, 1, 100), torch.empty(9), None, 40, 32, "any", MODES[0]).shape
    assert shape == (5, 1, 40)


def test_inference_mode_leaves_nothing_that_training_cannot_use():
    packed = packed_case(0)
    with torch.inference_mode():
        first = _multiply(_x(1, 100), packed)
    x = _x(1, 100).requires_grad_()
    y = _multiply(x, packed)
    y.sum().backward()
    assert torch.equal(y, first) and x.grad is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes_the_same():
    packed = packed_case(0, rows=300, cols=700)
    x = _x(2, 700)
    expected = _multiply(-x, packed)
    _multiply(x, packed)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(_multiply(-x, packed), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(("x", "message"), [
    (torch.zeros(2, 99), r"floating \[..., 100\]"),
    (torch.zeros(2, 100, dtype=torch.int64), "found torch.int64"),
    (np.zeros((2, 100), np.int32), "found int32"),
    (torch.tensor(1.0), r"found torch.float32 \[\]"),
    (torch.zeros(2, 100, device="meta"), "x: expected device cpu"),
])
def test_bad_activations_are_one_clear_error(x, message):
    with pytest.raises(SfmpError, match=message):
        _multiply(x, packed_case(0))


def test_bad_mode():
    with pytest.raises(SfmpError, match="mode: expected one of lut16"):
        _multiply(_x(1, 100), packed_case(0), "mma")


@pytest.mark.parametrize("tokens", [*range(2, 18), 64, 65, 67, 75])
@pytest.mark.parametrize("mode", MODES)
def test_tokens_do_not_depend_on_each_other(mode, tokens, monkeypatch):
    """Whatever share of a pass a token gets, its result has the bits of a product of its own."""
    monkeypatch.setattr(launch, "least_crossover", lambda *_: 1000)
    packed = packed_case(0, rows=70, cols=300, group_size=64, block_rows=48, bias=True)
    x = _x(tokens, 300)
    together = _multiply(x, packed, mode)
    assert torch.equal(together, torch.cat([_multiply(x[i : i + 1], packed, mode) for i in range(tokens)]))
