"""merge: what comes out is the matrices one below the other, whatever their row blocks and biases."""

import pytest
import torch
from cases import affine_case, packed_case

from sfmp import SfmpError
from sfmp.bench.random_model import random_packed
from sfmp.merge import merge
from sfmp.pack import pack
from sfmp.packed import PackedMatrix


def _pair(seed, rows, cols=100, blocks=(32, 32), bias=(False, False), group_size=32):
    """Two random matrices of one column order."""
    cases = [affine_case(seed + number, count, cols, group_size, block_rows, bias=with_bias)
             for number, (count, block_rows, with_bias) in enumerate(zip(rows, blocks, bias, strict=True))]
    cases[1]["col_perm"] = cases[0]["col_perm"]
    return [pack(**case) for case in cases]


@pytest.mark.parametrize(("rows", "blocks"), [((64, 40), (32, 32)), ((96, 64), (96, 64)), ((64, 100), (512, 64)),
                                              ((48, 16), (16, 16)), ((40,) * 2, (40, 40)), ((64, 33), (64, 512))])
@pytest.mark.parametrize("bias", [(False, False), (True, True), (False, True)])
def test_a_merged_matrix_is_its_matrices_one_below_the_other(rows, blocks, bias):
    pair = _pair(3, rows, blocks=blocks, bias=bias)
    merged = merge(pair)
    again = PackedMatrix.from_tensors("merged", merged.tensors(), shape=(sum(rows), 100), group_size=32,
                                      block_rows=merged.block_rows)
    assert torch.equal(again.dequantize(), torch.cat([each.dequantize() for each in pair]))
    if any(bias):
        halves = merged.bias.split(rows)
        for half, each in zip(halves, pair, strict=True):
            assert torch.equal(half, torch.zeros(len(half)) if each.bias is None else each.bias)
    else:
        assert merged.bias is None
    counted = [each.wbits * each.shape[0] for each in pair]
    assert merged.wbits == pytest.approx(sum(counted) / sum(rows), rel=1e-12)


def test_many_rows_need_wider_indices():
    tall = random_packed(40960, 32, 4.0, group_size=32, block_rows=512)
    merged = merge([tall, tall])
    assert merged.row_perm.dtype == torch.int32 and tall.row_perm.dtype == torch.uint16
    assert torch.equal(merged.dequantize(), tall.dequantize().repeat(2, 1))


def test_what_does_not_fit_is_refused():
    with pytest.raises(SfmpError, match=r"multiple of 32, found blocks of \[16, 32\] rows in matrices of \[64, 64"):
        merge(_pair(0, (64, 64), blocks=(16, 32)))
    with pytest.raises(SfmpError, match="expected one column order and group size, found several"):
        merge([packed_case(0), packed_case(1)])
