"""Pack codes into bit planes: the last step of quantization, checked on every input.

`PackedMatrix` is what comes out; see `sfmp.packed` for the stored form and `sfmp.planes` for the words.
"""

from __future__ import annotations

import numpy as np
import torch

from sfmp.checks import check_permutation, integer
from sfmp.packed import PackedMatrix, permutation_dtype
from sfmp.planes import MAX_BITS, WORD, pack_planes
from sfmp.quantize import stored_affine
from sfmp.spec import BlockGrid, SfmpError

__all__ = ["PackedMatrix", "pack"]


def pack(codes, scales, zeros, bits, *, group_size, block_rows, row_perm=None, col_perm=None,
         bias=None) -> PackedMatrix:
    """Pack codes into bit planes. Torch tensors or NumPy arrays; everything but the bias is in permuted
    order.

    Parameters
    ----------
    codes : integers [N, K]
        Each 0..2^bits − 1 of its block.
    scales, zeros : float [N, groups]
        W ≈ (codes − zeros)·scales.
    bits : integers [row_blocks, groups]
        1..8.
    group_size, block_rows : int
        Shape of a block; the last group and the last row block may be short.
    row_perm, col_perm : integers [N], [K]
        Identity if None.
    bias : float [N] or None
        Natural order; a tensor keeps its dtype.

    Returns
    -------
    PackedMatrix
        On the CPU.

    Raises
    ------
    SfmpError
        Shapes that do not fit each other, codes or bits out of range, values float16 cannot hold, no
        permutation.

    Notes
    -----
    Source: METHOD.md 1.9 (layout and affine conversion), DESIGN.md section 4.

    Examples
    --------
    >>> import numpy as np
    >>> one = np.ones((2, 1))
    >>> packed = pack(np.full((2, 32), 3), one, 0 * one, np.array([[2]]), group_size=32, block_rows=2)
    >>> packed.dequantize().unique().tolist(), packed.planes.tolist()
    ([3.0], [-1, -1, -1, -1])
    """
    codes, scales, zeros, bits = (_numpy(x) for x in (codes, scales, zeros, bits))
    _check_inputs(codes, scales, zeros, bits, group_size, block_rows)
    rows, columns = codes.shape
    row_blocks, groups = bits.shape
    stored_bits = np.ascontiguousarray(bits.T.astype(np.uint8))
    padded = np.zeros((row_blocks * block_rows, groups * group_size), np.uint8)
    padded[:rows, :columns] = codes
    planes = pack_planes(padded, stored_bits, group_size, block_rows)
    alpha, beta = _stored_affine(scales, zeros, bits, block_rows)
    return PackedMatrix(torch.from_numpy(planes), alpha, beta, torch.from_numpy(stored_bits),
                        _permutation("row_perm", row_perm, rows), _permutation("col_perm", col_perm, columns),
                        _bias(bias, rows), (rows, columns), int(group_size), int(block_rows))


def _check_inputs(codes, scales, zeros, bits, group_size, block_rows):
    integer("block_rows", block_rows, 1)
    if integer("group_size", group_size, WORD) % WORD:
        raise SfmpError(f"group_size: expected a multiple of {WORD} (columns of a word), found {group_size}; "
                        "choose e.g. 128")
    if codes.ndim != 2 or 0 in codes.shape or codes.dtype.kind not in "iu":
        raise SfmpError(f"codes: expected integers [N, K], found {codes.dtype} {list(codes.shape)}; pass the "
                        "codes of one matrix")
    grid = BlockGrid(*codes.shape, block_rows, group_size)
    per_group = (grid.out_features, grid.groups)
    expected = {"scales": (scales, per_group), "zeros": (zeros, per_group), 
                "bits": (bits, grid.weights.shape)}
    for key, (array, shape) in expected.items():
        if array.shape != shape:
            raise SfmpError(f"{key}: expected shape {list(shape)} for codes {list(codes.shape)}, group_size "
                            f"{group_size} and block_rows {block_rows}, found {list(array.shape)}; give one "
                            "value per "
                            + ("block" if key == "bits" else "row and group"))
    if bits.dtype.kind not in "iu" or bits.min() < 1 or bits.max() > MAX_BITS:
        raise SfmpError(f"bits: expected integers 1..{MAX_BITS}, found {bits.dtype} "
                        f"{bits.min()}..{bits.max()}; correct the plan")
    largest = ((1 << bits.astype(np.int64)) - 1).astype(np.uint8)
    largest = largest.repeat(block_rows, axis=0)[: len(codes)].repeat(group_size, axis=1)[:, : codes.shape[1]]
    wrong = (codes < 0) | (codes > largest)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise SfmpError(f"codes: expected 0..2^bits − 1, found {codes[row, column]} at [{row}, {column}] "
                        f"where the block has {bits[row // block_rows, column // group_size]} bits "
                        f"({wrong.sum()} such codes); clamp the codes to their block")


def _stored_affine(scales, zeros, bits, block_rows):
    """alpha, beta: float16 [groups, N]."""
    rows = len(scales)
    per_row = np.repeat(bits.astype(np.float32), block_rows, axis=0)[:rows]
    numbers = (torch.from_numpy(np.ascontiguousarray(a, dtype=np.float32)) for a in (scales, zeros, per_row))
    alpha, beta = stored_affine(*numbers)
    lost = ~(alpha.isfinite() & beta.isfinite())
    if lost.any():
        row, group = lost.nonzero()[0].tolist()
        raise SfmpError("scales, zeros: expected scale/2 and scale·((2^b − 1)/2 − zero) finite in float16, "
                        f"found scale {scales[row, group]} and zero {zeros[row, group]} at row {row}, group "
                        f"{group}; such a weight cannot be stored: rescale or skip the layer")
    # .contiguous() would return the transpose of a single row as it is, with a stride that .view(uint8) refuses.
    return tuple(half.T.clone(memory_format=torch.contiguous_format) for half in (alpha, beta))


def _permutation(key, perm, size):
    perm = np.arange(size) if perm is None else check_permutation(key, _numpy(perm), size)
    return torch.from_numpy(perm.astype(permutation_dtype(size)))


def _bias(bias, rows):
    if bias is None:
        return None
    if isinstance(bias, torch.Tensor):
        bias = bias.detach().cpu().clone()
    else:
        bias = torch.tensor(bias, dtype=torch.float32)
    if bias.shape != (rows,) or not bias.is_floating_point() or not bias.isfinite().all():
        raise SfmpError(f"bias: expected {rows} finite floating values, found {bias.dtype} "
                        f"{list(bias.shape)}; pass the bias of the layer")
    return bias


def _numpy(x) -> np.ndarray:
    if not isinstance(x, torch.Tensor):
        return np.asarray(x)
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
