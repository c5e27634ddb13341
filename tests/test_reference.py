"""The NumPy bit-serial oracle against the plain product, its counts, and the choice of backends."""

import numpy as np
import pytest
import torch
from cases import packed_case
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels_numba
from kernels_numba.reference import TABLE_WIDTHS, lut_matmul, signed_sums, table_indices
from sfmp.linear import SFMPLinear
from sfmp.spec import SfmpError


def _x(rows, cols=100, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, cols)).astype(np.float32)


@given(st.integers(0, 1 << 30), st.integers(1, 50), st.integers(1, 150), st.sampled_from((32, 64, 128)),
       st.integers(1, 20), st.sampled_from((1, 2, 4, 8)), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_lut_product_is_the_product(seed, rows, cols, group_size, block_rows, width, tokens):
    shape = {"rows": rows, "cols": cols, "group_size": group_size, "block_rows": block_rows}
    packed = packed_case(seed, **shape, bias=seed % 2 == 0)
    x = _x(tokens, cols, seed)
    bias = 0 if packed.bias is None else packed.bias.numpy()
    expected = x.astype(np.float64) @ packed.dequantize().double().numpy().T + bias
    size = (np.abs(x) @ packed.dequantize().abs().numpy().T).max(initial=1)
    found = lut_matmul(x, packed, width, dtype=np.float64)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2**-22 * size)


def test_every_table_width_and_float32():
    packed = packed_case(0)
    x = _x(3)
    exact = lut_matmul(x, packed, 1, dtype=np.float64)
    for width in TABLE_WIDTHS:
        np.testing.assert_allclose(lut_matmul(x, packed, width), exact, rtol=1e-4, atol=1e-3)
    half = lut_matmul(x, packed, 8, dtype=np.float16)
    assert half.dtype == np.float16 and 0 < np.abs(half - exact).max() < 1


def test_tables_are_all_signed_sums():
    x = _x(2, 12)
    tables = signed_sums(x, 4)
    for index in range(16):
        signs = [1 if index >> t & 1 else -1 for t in range(4)]
        expected = x.reshape(2, 3, 4) @ np.array(signs)
        np.testing.assert_allclose(tables[:, :, index], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", TABLE_WIDTHS)
def test_indices_hold_the_bits_of_the_words(width):
    words = np.random.default_rng(0).integers(-(1 << 31), 1 << 31, (2, 3, 5)).astype(np.int32)
    index = table_indices(words, width)
    for word, plane, row, t in np.ndindex(2, 3, 5, 32):
        found = index[word * (32 // width) + t // width, plane, row] >> (t % width) & 1
        assert found == (int(words[word, plane, row]) >> t) & 1


def test_counts_follow_from_the_shape():
    packed = packed_case(0, rows=48, cols=128, group_size=64, block_rows=16, levels=(3,))
    _, counts = lut_matmul(_x(5, 128), packed, 8, counts=True)
    assert counts.tables == 5 * 128 / 8 and counts.table_entries == counts.tables * 256
    assert counts.lookups == 5 * 48 * (128 / 8) * 3
    assert counts.multiplications == 5 * 48 * 2 * (3 + 1)
    assert counts.dense_multiplications == 5 * 48 * 128


def test_matmul_takes_arrays_layers_and_the_lut_mode():
    packed = packed_case(0, bias=True)
    x = _x(4)
    y = kernels_numba.matmul(torch.from_numpy(x), packed, backend="reference")
    assert torch.equal(kernels_numba.matmul(torch.from_numpy(x), SFMPLinear(packed), backend="reference"), y)
    np.testing.assert_array_equal(kernels_numba.matmul(x, packed, backend="reference"), y)
    lut = kernels_numba.matmul(torch.from_numpy(x).view(2, 2, 100), packed, mode="lut")
    assert lut.shape == (2, 2, 40)
    assert torch.allclose(lut.view(4, 40), y, rtol=1e-4, atol=1e-3)


def test_operands_of_another_kind_are_refused():
    with pytest.raises(SfmpError, match="packed: expected a PackedMatrix or an SFMPLinear, found ndarray"):
        kernels_numba.matmul(_x(1), _x(40))
    with pytest.raises(SfmpError, match="x: expected a tensor or an array, found list"):
        kernels_numba.matmul(_x(1).tolist(), packed_case(0))


def test_backends_say_whether_they_can_run():
    found = kernels_numba.available()
    assert set(found) == {"cuda", "cpu", "reference"}
    assert all(reason.startswith(("yes: ", "no: ")) for reason in found.values())


@pytest.mark.parametrize(("options", "message"), [
    ({"backend": "gpu"}, "backend: expected auto"),
    ({"backend": "reference", "mode": "mma"}, "mode: expected one of exact, lut"),
])
def test_unknown_backend_or_mode(options, message):
    with pytest.raises(SfmpError, match=message):
        kernels_numba.matmul(_x(1), packed_case(0), **options)


def test_a_backend_that_cannot_run_is_refused_with_its_reason():
    for backend, reason in kernels_numba.available().items():
        if reason.startswith("no"):
            with pytest.raises(SfmpError, match=backend):
                kernels_numba.matmul(_x(1), packed_case(0), backend=backend)


@pytest.mark.parametrize(("x", "width", "message"), [
    (_x(1), 3, "table_width"), (_x(1, 99), 8, "x: expected"), (_x(1)[0], 8, "x: expected"),
])
def test_lut_refusals(x, width, message):
    with pytest.raises(SfmpError, match=message):
        lut_matmul(x, packed_case(0), width)
