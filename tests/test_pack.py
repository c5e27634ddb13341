"""Packing: the layout word by word, exact round trips, the account of bytes, and refusals."""

import naive
import numpy as np
import pytest
import torch
from cases import affine_case, packed_case
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sfmp.pack import PackedMatrix, pack
from sfmp.packed import TENSORS
from sfmp.spec import SfmpError


@st.composite
def cases(draw, largest=90):
    group_size = draw(st.sampled_from((32, 64, 96, 128, 256)))
    levels = draw(st.sets(st.integers(1, 8), min_size=1))
    seed, rows, cols = (draw(st.integers(low, high)) for low, high in ((0, 1 << 30), (1, largest), (1, 300)))
    return affine_case(seed, rows, cols, group_size, draw(st.integers(1, 40)), sorted(levels))


@given(cases())
@settings(max_examples=40, deadline=None)
def test_round_trip(case):
    packed = pack(**case)
    codes, scales, zeros = packed.unpack()
    np.testing.assert_array_equal(codes, case["codes"])
    np.testing.assert_array_equal(scales, case["scales"])
    np.testing.assert_array_equal(zeros, case["zeros"])
    np.testing.assert_array_equal(packed.block_bits, case["bits"].T)
    np.testing.assert_array_equal(packed.row_perm.long(), case["row_perm"])
    np.testing.assert_array_equal(packed.col_perm.long(), case["col_perm"])


@given(cases(largest=30))
@settings(max_examples=10, deadline=None)
def test_planes_are_those_of_the_definition(case):
    expected = naive.plane_words(case["codes"], case["bits"], case["block_rows"], case["group_size"])
    np.testing.assert_array_equal(pack(**case).planes, expected)


@given(cases(largest=20))
@settings(max_examples=10, deadline=None)
def test_dequantize_is_the_definition(case):
    packed = pack(**case)
    stored = [getattr(packed, key).numpy() for key in TENSORS]
    expected = naive.stored_weight(*stored, case["block_rows"], case["group_size"])
    np.testing.assert_allclose(packed.dequantize(), expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max())


def test_dequantize_is_the_affine_map_in_natural_order():
    case = affine_case(3, 48, 96)
    spread = [case[key].repeat(32, axis=1)[:, :96].astype(np.float64) for key in ("zeros", "scales")]
    expected = np.empty((48, 96))
    expected[np.ix_(case["row_perm"], case["col_perm"])] = (case["codes"] - spread[0]) * spread[1]
    packed = pack(**case)
    found = packed.dequantize()
    assert found.dtype == torch.float32 and found.is_contiguous()
    rounding = 2**-11 * packed.beta.abs().max().item()  # beta alone is no float16
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1.001 * rounding)
    exact = {**case, "scales": np.full_like(case["scales"], 0.25), "zeros": np.zeros_like(case["zeros"])}
    expected[np.ix_(case["row_perm"], case["col_perm"])] = case["codes"] * 0.25
    np.testing.assert_array_equal(pack(**exact).dequantize(), expected)


def test_identity_permutations_by_default_and_torch_inputs():
    case = affine_case(5)
    case.pop("row_perm"), case.pop("col_perm")
    tensors = {key: torch.from_numpy(case[key]) for key in ("codes", "scales", "zeros", "bits")}
    packed, again = pack(**case), pack(**{**case, **tensors})
    assert packed.row_perm.dtype == torch.uint16 and packed.row_perm.tolist() == list(range(40))
    for key in TENSORS:
        assert torch.equal(getattr(packed, key), getattr(again, key))


def test_permutations_of_more_than_65536_columns_are_int32():
    zeros = np.zeros((1, 2049), np.float32)
    codes = np.zeros((1, 65537), np.uint8)
    packed = pack(codes, zeros + 1, zeros, zeros.astype(int) + 1, group_size=32, block_rows=1)
    assert packed.col_perm.dtype == torch.int32 and packed.row_perm.dtype == torch.uint16
    assert packed.dequantize().shape == (1, 65537)


def test_one_bit_zeros_need_not_be_integers():
    case = affine_case(1, levels=(1,))
    case["zeros"] = np.full_like(case["zeros"], 0.3125)
    np.testing.assert_allclose(pack(**case).unpack()[2], 0.3125, rtol=1e-3)


@given(cases(), st.floats(0.01, 10))
@settings(max_examples=40, deadline=None)
def test_integer_zeros_come_back_from_scales_that_are_no_float16(case, factor):
    case["scales"] = (case["scales"] * np.float32(factor) * np.pi).astype(np.float32)
    case["zeros"] = np.abs(case["zeros"]) % 4
    assume(1 not in case["bits"])  # real zeros are legal there, so only an exact fit is read as an integer
    codes, scales, zeros = pack(**case).unpack()
    np.testing.assert_array_equal(codes, case["codes"])
    np.testing.assert_array_equal(zeros, case["zeros"])
    np.testing.assert_allclose(scales, case["scales"], rtol=2**-10, atol=2**-23)


def test_every_byte_is_accounted():
    packed = packed_case(0, rows=40, cols=100, bias=True)
    widths, heights = np.array([32, 32, 32, 4]), np.array([16, 16, 8])
    code_bits = (packed.block_bits.numpy().astype(int) * np.outer(widths, heights)).sum()
    assert packed.wbits == pytest.approx(code_bits / 4000, rel=1e-12)
    assert packed.bpw == pytest.approx(packed.wbits + 1)
    words = packed.block_bits.sum().item() * 16
    sizes = {"planes": 4 * words, "alpha": 2 * 4 * 40, "beta": 2 * 4 * 40, "block_bits": 12, "row_perm": 80,
             "col_perm": 200, "bias": 160}
    assert {key: t.numel() * t.element_size() for key, t in packed.tensors().items()} == sizes
    assert packed.nbytes == sum(sizes.values())
    assert packed.bpw_stored == pytest.approx(8 * (packed.nbytes - 160) / 4000)
    assert packed.block_offsets()[-1] == packed.planes.numel() == words


def _with(case, key, index, value):
    changed = {**case, key: case[key].copy()}
    changed[key][index] = value
    return changed


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: _with(c, "codes", (0, 0), 8), r"codes: .*found 8 at \[0, 0\].*3 bits"),
    (lambda c: {**c, "codes": c["codes"].astype(np.float32)}, "codes: expected integers"),
    (lambda c: {**c, "codes": c["codes"].astype(np.int64) - 9}, "codes: .*found -"),
    (lambda c: {**c, "scales": c["scales"][:, :2]}, "scales: expected shape"),
    (lambda c: {**c, "zeros": c["zeros"].T}, "zeros: expected shape"),
    (lambda c: {**c, "bits": c["bits"].T}, "bits: expected shape"),
    (lambda c: _with(c, "bits", 0, 9), "bits: expected integers 1..8"),
    (lambda c: _with(c, "bits", 0, 0), "bits: expected integers 1..8"),
    (lambda c: _with(c, "scales", (1, 0), np.nan), "scale.*finite in float16.*row 1, group 0"),
    (lambda c: _with(c, "scales", (1, 0), 1e6), "scale.*finite in float16"),
    (lambda c: _with(c, "zeros", (1, 0), 1e9), "zero.*finite in float16"),
    (lambda c: {**c, "group_size": 48}, "group_size"),
    (lambda c: {**c, "group_size": None}, "group_size: expected an integer"),
    (lambda c: {**c, "block_rows": 0}, "block_rows"),
    (lambda c: {**c, "block_rows": 2.0}, "block_rows: expected an integer"),
    (lambda c: _with(c, "row_perm", 0, c["row_perm"][1]), "row_perm: expected a permutation"),
    (lambda c: {**c, "col_perm": c["col_perm"][:-1]}, "col_perm: expected a permutation"),
    (lambda c: {**c, "bias": np.zeros(3)}, "bias: expected 40"),
])
def test_bad_input_is_one_clear_error(change, message):
    case = affine_case(2, levels=(3,))
    pack(**case)
    with pytest.raises(SfmpError, match=message):
        pack(**change(case))


def test_alpha_zero_with_an_offset_dequantizes_but_does_not_unpack():
    packed = packed_case(0)
    packed.alpha.zero_()
    assert packed.dequantize().isfinite().all()
    with pytest.raises(SfmpError, match="alpha = 0"):
        packed.unpack()


def test_packing_is_not_a_view_of_its_input():
    case = affine_case(0)
    packed = pack(**case)
    before = packed.dequantize()
    for key in ("codes", "scales", "zeros", "bits", "row_perm", "col_perm"):
        case[key][:] = 1
    packed.cache.clear()
    assert torch.equal(packed.dequantize(), before)
    assert isinstance(packed, PackedMatrix)
