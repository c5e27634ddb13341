"""One matrix of a checkpoint published by SFMP's authors ("QuantLinear"): its tensors, checked, as a PackedMatrix.

What is known of the format (METHOD.md 1.4, 1.5, 1.6, 1.9), for a layer with weight [N, K], groups of g columns and
blocks of N/B rows:

    codes            two 4-bit codes a byte at any bit-width, of the permuted matrix
    scales, zeros    float16 [K/g, N]; w = (code − zero)·scale, 0 <= zero <= 2^b − 1, an integer
    block_bitwidth   int8 [K/g, B], 1..4
    in_reorder       int32 [K]: x' = x[in_reorder], so it is the column permutation
    out_reorder      int32 [N]: y = y'[out_reorder], so it is the inverse of the row permutation
    bias             optional; taken to be in natural order

Not known, because METHOD.md does not say, and therefore fields of `CodeLayout`: the name of the codes' tensor; its axes
(told from the shapes of all matrices together, `code_axes`); which half of a byte comes first. Wrong axes are caught,
because 2- and 3-bit blocks then hold codes they cannot have. A wrong half is not: it exchanges neighbours of one block,
so evaluate what was converted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch

from sfmp.checks import SfmpError, check_permutation
from sfmp.pack import pack
from sfmp.packed import PackedMatrix

PARTS = ("scales", "zeros", "block_bitwidth", "in_reorder", "out_reorder")
MOST_BITS = 4
AXES = ("[N, K/2]", "[N/2, K]", "[K, N/2]", "[K/2, N]")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_WORDS = {torch.uint8: 1, torch.int8: 1, torch.int16: 2, torch.int32: 4}


@dataclasses.dataclass(frozen=True)
class CodeLayout:
    """How the codes lie.

    Attributes
    ----------
    name : str, last component of the tensor's name
    low_first : bool, whether the low half of a byte (or word) holds the code of lower index
    axes : one of `AXES`, or None to tell it from the shape
        ``[N, K/2]``: rows first, codes of two neighbouring columns in a byte; the others alike. A word of four bytes
        holds eight codes instead of two.
    """

    name: str = "qweight"
    low_first: bool = True
    axes: str | None = None


def code_axes(shape, dtype: torch.dtype, rows: int, columns: int) -> set[str]:
    """Return which of `AXES` give a tensor of this shape and type for a matrix [rows, columns].

    Examples
    --------
    >>> sorted(code_axes((4, 3), torch.uint8, 4, 6)), sorted(code_axes((4, 2), torch.uint8, 4, 4))
    (['[N, K/2]'], ['[K, N/2]', '[N, K/2]'])
    """
    each = 2 * _WORDS.get(dtype, 1)
    expected = {"[N, K/2]": (rows, columns / each), "[N/2, K]": (rows / each, columns),
                "[K, N/2]": (columns, rows / each), "[K/2, N]": (columns / each, rows)}
    return {key for key, wanted in expected.items() if tuple(shape) == wanted}


def is_quantized(module: str, names, layout: CodeLayout) -> bool:
    """Return whether a module has the tensors of a QuantLinear among `names`."""
    return all(f"{module}.{part}" in names for part in (layout.name, *PARTS))


def packed_matrix(name: str, tensors: Mapping[str, torch.Tensor], layout: CodeLayout) -> PackedMatrix:
    """Return the same matrix in our format, with the same codes, scales, zeros and order.

    Parameters
    ----------
    name : str
        Of the module, for messages.
    tensors : mapping
        By last component: the codes, `PARTS`, optionally ``bias``.
    layout : CodeLayout

    Returns
    -------
    PackedMatrix
        ``unpack()`` gives codes and zeros back, and scales where they are float16 of at least 2^-13 (we store scale/2);
        a weight then differs from (code − zero)·scale by the rounding of beta to float16 only.

    Raises
    ------
    SfmpError
        Shapes that do not fit each other, no permutations, zeros that are no integers of their block, codes their
        block cannot have, or scales our format cannot hold.

    Notes
    -----
    Source: METHOD.md 1.5, 1.9.
    """
    for key in PARTS:
        axes, dtype = 1 if key.endswith("reorder") else 2, tensors[key].dtype
        _check(f"{name}.{key}", tensors[key].ndim == axes, f"{axes} axes", f"shape {list(tensors[key].shape)}")
        whole = key != "scales" and dtype in _INTEGERS
        fitting = whole or key in ("scales", "zeros") and dtype in _FLOATS
        _check(f"{name}.{key}", fitting, "floating numbers" if key in ("scales", "zeros") else "integers", dtype)
    rows, columns = len(tensors["out_reorder"]), len(tensors["in_reorder"])
    bits = tensors["block_bitwidth"].numpy().astype(np.int64)
    groups, row_blocks = bits.shape
    _check(f"{name}.block_bitwidth", groups and row_blocks and columns % groups == 0 and rows % row_blocks == 0,
           f"a number of blocks that divides {rows} rows and {columns} columns", list(bits.shape))
    _check(f"{name}.block_bitwidth", bits.min() >= 1 and bits.max() <= MOST_BITS, f"1..{MOST_BITS} bits",
           f"{bits.min()}..{bits.max()}")
    for key in ("scales", "zeros"):
        _check(f"{name}.{key}", tuple(tensors[key].shape) == (groups, rows), f"[{groups}, {rows}] (groups, rows)",
               list(tensors[key].shape))
    scales, zeros = (tensors[key].float().numpy().T for key in ("scales", "zeros"))
    top = ((1 << bits) - 1).repeat(rows // row_blocks, axis=1).T  # [N, groups]
    whole = np.isfinite(zeros) & (zeros == np.round(zeros)) & (zeros >= 0) & (zeros <= top)
    _check(f"{name}.zeros", whole.all(), "integers 0..2^bits − 1", _worst(zeros, ~whole))
    positive = np.isfinite(scales) & (scales > 0)
    _check(f"{name}.scales", positive.all(), "positive finite numbers", _worst(scales, ~positive))
    inverse = check_permutation(f"{name}.out_reorder", tensors["out_reorder"].numpy(), rows)
    codes = _codes(f"{name}.{layout.name}", tensors[layout.name], rows, columns, layout)
    try:
        return pack(codes, scales, zeros, bits.T, group_size=columns // groups, block_rows=rows // row_blocks,
                    row_perm=np.argsort(inverse), bias=tensors.get("bias"),
                    col_perm=check_permutation(f"{name}.in_reorder", tensors["in_reorder"].numpy(), columns))
    except SfmpError as error:
        raise SfmpError(f"{name}: {error}; if it is a QuantLinear checkpoint of SFMP, try other --axes") from error


def _codes(name, stored, rows, columns, layout) -> np.ndarray:
    """The codes, uint8 [N, K]."""
    _check(name, stored.dtype in _WORDS and stored.ndim == 2, "integers of two axes", f"{stored.dtype} "
           f"{list(stored.shape)}")
    each = 2 * _WORDS[stored.dtype]  # codes in one word
    found = code_axes(stored.shape, stored.dtype, rows, columns)
    wanted = f"{each} codes a word of a {rows} x {columns} matrix with axes {layout.axes or 'that its shape tells'}"
    _check(name, layout.axes in found if layout.axes else len(found) == 1, wanted,
           f"shape {list(stored.shape)}, which fits {' and '.join(sorted(found)) or 'none'}")
    axes = layout.axes or found.pop()
    words = stored.contiguous().numpy()
    words = words.view(f"<u{words.dtype.itemsize}").astype(np.uint32)
    shifts = np.arange(each, dtype=np.uint32) * 4
    codes = (words[..., None] >> (shifts if layout.low_first else shifts[::-1])) & 15  # [a, b, each]
    if axes.endswith("/2]"):
        codes = codes.reshape(len(codes), -1)
    else:
        codes = codes.transpose(0, 2, 1).reshape(-1, codes.shape[1])
    return np.ascontiguousarray(codes if axes.startswith("[N") else codes.T).astype(np.uint8)


def _worst(values, wrong):
    row, group = np.argwhere(wrong)[0] if wrong.any() else (0, 0)
    return f"{values[row, group]} at row {row}, group {group} ({int(wrong.sum())} such)"


def _check(name, right, wanted, found):
    if not right:
        raise SfmpError(f"{name}: expected {wanted}, found {found}; is this a QuantLinear checkpoint of SFMP?")
