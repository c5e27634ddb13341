"""merge: packed matrices one below the other, as one packed matrix; no code is decoded."""

from __future__ import annotations

import math
from itertools import accumulate

import torch

from sfmp.checks import SfmpError
from sfmp.packed import PackedMatrix, permutation_dtype

STRIP_ROWS = 32  # row blocks of a multiple of it fill what the kernels work on


def common_rows(matrices) -> int | None:
    """Rows of the largest row block that divides those of all matrices, and where they meet; None if it is too small.

    Blocks are cut only into multiples of `STRIP_ROWS`.

    Parameters
    ----------
    matrices : list of PackedMatrix
    """
    sizes = [matrix.block_rows for matrix in matrices]
    block = math.gcd(*sizes, *(matrix.shape[0] for matrix in matrices[:-1]))
    return block if block % STRIP_ROWS == 0 or set(sizes) == {block} else None


def merge(matrices: list[PackedMatrix]) -> PackedMatrix:
    """Return the matrices one below the other, as one.

    Parameters
    ----------
    matrices : list of PackedMatrix
        Of equal column order and group size, on one device. Where some have a bias, the others get zeros.

    Raises
    ------
    SfmpError
        Column orders or group sizes differ, or the row blocks do not fit.

    Examples
    --------
    >>> from sfmp.bench.random_model import random_packed
    >>> one = random_packed(64, 128, 3)
    >>> merge([one, one]).dequantize().equal(one.dequantize().repeat(2, 1))
    True
    """
    first, block = matrices[0], common_rows(matrices)
    if any(matrix.group_size != first.group_size or not torch.equal(matrix.col_perm, first.col_perm)
           for matrix in matrices):
        raise SfmpError("matrices: expected one column order and group size, found several; quantize with "
                        "QuantSpec(shared_columns=True)")
    if block is None:
        raise SfmpError(f"matrices: expected row blocks with a common divisor that is a multiple of {STRIP_ROWS}, "
                        f"found blocks of {[matrix.block_rows for matrix in matrices]} rows in matrices of "
                        f"{[matrix.shape[0] for matrix in matrices]}; quantize with equal block_rows")
    rows = list(accumulate((matrix.shape[0] for matrix in matrices), initial=0))
    with torch.inference_mode(False), torch.no_grad():  # a later forward may need gradients
        cut = [_cut(matrix, block) for matrix in matrices]
        planes = [words for of_group in zip(*(words for words, _ in cut), strict=True) for words in of_group]
        perms = [matrix.row_perm.long() + start for matrix, start in zip(matrices, rows[:-1], strict=True)]
        order = torch.cat(perms).to(getattr(torch, permutation_dtype(rows[-1]).__name__))
        biases = [matrix.bias for matrix in matrices]
        if any(bias is not None for bias in biases):
            zeros = (matrix.alpha.new_zeros(matrix.shape[0]) for matrix in matrices)
            bias = torch.cat([zero if bias is None else bias for bias, zero in zip(biases, zeros, strict=True)])
        else:
            bias = None
        return PackedMatrix(
            torch.cat(planes), *(torch.cat([getattr(matrix, key) for matrix in matrices], dim=1)
                                 for key in ("alpha", "beta")),
            torch.cat([bits for _, bits in cut], dim=1), order, first.col_perm.clone(), bias,
            (rows[-1], first.shape[1]), first.group_size, block)


def _cut(matrix: PackedMatrix, block: int):
    """Words of each group with row blocks of `block` rows, list of [words], and their bits, [groups, row blocks]."""
    starts, size = matrix.block_offsets().tolist(), matrix.block_rows
    words = []
    heights = [-(-min(size, matrix.shape[0] - first) // block) * block for first in range(0, matrix.shape[0], size)]
    for group in range(matrix.groups):
        pieces = []
        for number, height in enumerate(heights, group * matrix.row_blocks):
            stored = matrix.planes[starts[number] : starts[number + 1]].view(-1, size)
            pieces += [piece.reshape(-1) for piece in stored[:, :height].split(block, dim=1)]
        words.append(torch.cat(pieces))
    times = torch.tensor([height // block for height in heights], device=matrix.device)
    return words, matrix.block_bits.repeat_interleave(times, dim=1)
