"""The two references every kernel is tested against: dequantize-and-multiply in torch, and bit-serial LUT in
NumPy.

`lut_matmul` is the paper's algorithm, written for reading: the signed sums of ``table_width`` activations are
tabulated once per activation group, each plane word is cut into table indices, and the weight is never formed
(METHOD §1.9).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from sfmp.checks import SfmpError
from sfmp.planes import WORD

TABLE_WIDTHS = (1, 2, 4, 8, 16)


def matmul(x, packed, mode: str = "exact"):
    """Return x Wᵀ + bias with the dequantized weight; see `kernels_numba.matmul`.

    On the CPU the product is taken in float32 (float64 for float64 x) and rounded once to the dtype of x. On
    other devices W is rounded to the dtype of x first, since their half-precision products accumulate in
    float32 anyway.
    """
    if isinstance(x, np.ndarray):
        return matmul(torch.from_numpy(x), packed, mode).numpy()
    rows, columns = packed.shape
    if x.ndim == 0 or x.shape[-1] != columns or not x.is_floating_point():
        raise SfmpError(f"x: expected floating [..., {columns}], found {x.dtype} {list(x.shape)}; check "
                        "in_features")
    if x.device != packed.device:
        raise SfmpError(f"x: expected device {packed.device} like the weight, found {x.device}; move one of "
                        "them")
    if mode == "lut":
        flat = lut_matmul(x.detach().float().cpu().reshape(-1, columns).numpy(), packed)
        return torch.from_numpy(flat).to(x).reshape(*x.shape[:-1], rows)
    cache = packed.derived()
    weight = cache.get("weight")
    if weight is None:
        keep = cache.get("keep", False)
        with torch.inference_mode(torch.is_inference_mode_enabled() and not keep):
            weight = packed.dequantize()
        if keep:
            cache["weight"] = weight
    dtype = x.dtype
    if x.device.type == "cpu":
        dtype = torch.promote_types(x.dtype, torch.float32)
    bias = None if packed.bias is None else packed.bias.to(dtype)
    return torch.nn.functional.linear(x.to(dtype), weight.to(dtype), bias).to(x.dtype)


@dataclasses.dataclass(frozen=True)
class LutCounts:
    """Work of one `lut_matmul`, for all rows of x together.

    Attributes
    ----------
    tables, table_entries : tables built and their entries in all
    lookups : table reads, one per plane, row, and ``table_width`` columns
    multiplications : by alpha·2^k and beta
    dense_multiplications : what the product with the dequantized weight takes
    """

    tables: int
    table_entries: int
    lookups: int
    multiplications: int
    dense_multiplications: int


def lut_matmul(x, packed, table_width: int = 8, *, dtype=np.float32, counts: bool = False):
    """Multiply without ever forming the weight: tables of signed sums, plane words as indices.

    y[n] = Σ_groups alpha[n] Σ_k 2^k Σ_tables T[index of plane k] + beta[n] Σ x, then the bias.

    Parameters
    ----------
    x : float [M, K]
        Natural order; NumPy array or CPU tensor.
    packed : PackedMatrix
    table_width : int
        Activations per table, one of `TABLE_WIDTHS`; a table has 2^table_width entries.
    dtype
        Of tables, sums and y: float32 shows what a kernel computes, float64 the exact answer, float16 half
        tables.
    counts : bool
        Also return `LutCounts`.

    Returns
    -------
    y : dtype [M, N], or (y, LutCounts)

    Raises
    ------
    SfmpError
        Wrong shape of x or an unsupported table width.

    Notes
    -----
    Source: METHOD.md 1.9. Padded columns meet x = 0 and add nothing.
    """
    if table_width not in TABLE_WIDTHS:
        raise SfmpError(f"table_width: expected one of {TABLE_WIDTHS} (a divisor of {WORD}), found "
                        f"{table_width!r}")
    x = np.asarray(x)
    rows, columns = packed.shape
    if x.ndim != 2 or x.shape[1] != columns:
        raise SfmpError(f"x: expected [M, {columns}], found {list(x.shape)}; flatten the leading dimensions")
    block_rows, group_size = packed.block_rows, packed.group_size
    bits = packed.block_bits.cpu().numpy()
    starts = packed.block_offsets().cpu().numpy().reshape(-1)
    planes = packed.planes.cpu().numpy()
    alpha, beta = (t.cpu().numpy().astype(dtype) for t in (packed.alpha, packed.beta))
    permuted = np.zeros((len(x), packed.groups * group_size), dtype)
    permuted[:, :columns] = x[:, packed.col_perm.cpu().numpy()]
    y = np.zeros((len(x), rows), dtype)  # permuted rows
    lookups = multiplications = 0
    for group in range(packed.groups):
        tables = signed_sums(permuted[:, group * group_size :][:, :group_size], table_width)
        total = tables[..., -1].sum(axis=1, dtype=dtype)  # the all-ones entries add up to Σ x of the group
        for block in range(packed.row_blocks):
            first = block * block_rows
            height = min(block_rows, rows - first)
            width = int(bits[group, block])
            start = starts[group * packed.row_blocks + block]
            words = planes[start:][: group_size // WORD * width * block_rows]
            index = table_indices(words.reshape(-1, width, block_rows)[..., :height], table_width)
            read = tables[:, np.arange(len(index))[:, None, None], index]  # [M, tables, planes, rows]
            weights = (2.0 ** np.arange(width)).astype(dtype)
            sums = (read.sum(axis=1, dtype=dtype) * weights[:, None]).sum(axis=1, dtype=dtype)
            part = slice(first, first + height)
            y[:, part] += alpha[group, part] * sums + beta[group, part] * total[:, None]
            lookups += read.size
            multiplications += len(x) * height * (width + 1)
    natural = np.empty_like(y)
    natural[:, packed.row_perm.cpu().numpy()] = y
    if packed.bias is not None:
        natural += packed.bias.detach().float().cpu().numpy().astype(dtype)
    if not counts:
        return natural
    made = len(x) * packed.groups * (group_size // table_width)
    return natural, LutCounts(made, made << table_width, lookups, multiplications, len(x) * rows * columns)


def signed_sums(x: np.ndarray, table_width: int) -> np.ndarray:
    """Tabulate Σ_t ±x_t of every ``table_width`` neighbours: [M, columns] → [M, columns/width, 2^width].

    Bit t of an index is the sign of x_t: 1 adds, 0 subtracts. Built by doubling, one addition per entry.

    Examples
    --------
    >>> signed_sums(np.array([[1.0, 10.0]]), 2).tolist()
    [[[-11.0, -9.0, 9.0, 11.0]]]
    """
    parts = x.reshape(len(x), x.shape[1] // table_width, table_width)
    tables = np.zeros((*parts.shape[:2], 1), x.dtype)
    for t in range(table_width):
        term = parts[:, :, t : t + 1]
        tables = np.concatenate([tables - term, tables + term], axis=2)
    return tables


def table_indices(words: np.ndarray, table_width: int) -> np.ndarray:
    """Cut plane words into table indices: int32 [W, planes, rows] → int64 [W·32/width, planes, rows]."""
    shifts = np.arange(0, WORD, table_width)
    parts = words.view(np.uint32)[:, None].astype(np.int64) >> shifts[:, None, None]
    parts &= (1 << table_width) - 1
    return parts.reshape(-1, *words.shape[1:])
