"""The launch that writes a dequantized weight, whole or a panel of it, for torch to multiply with.

A caller multiplies  x[:, columns(layout)]  with a workspace transposed, a panel at a time where memory is short.
"""

from __future__ import annotations

import numpy as np

from kernels_numba.gpu.launches import Launch, Plan
from kernels_numba.gpu.mma_layout import MmaLayout
from kernels_numba.gpu.mma_run import ARRAYS
from sfmp.checks import SfmpError

WORKSPACE = "workspace"  # name of the array that the launch writes, uint32
STRIP_ROWS = 32


def columns(layout: MmaLayout) -> np.ndarray:
    """Natural column of every column of a workspace, int64 [`layout.length`]; −1 where x has to be zero."""
    return layout.columns[: layout.length].astype(np.int64)


def rows(layout: MmaLayout, first_strip: int, strips: int) -> np.ndarray | None:
    """Natural row of every row of a panel, int64 [32 · strips], −1 for zero rows; None for the whole matrix.

    The whole matrix has its rows in natural order.
    """
    if strips == len(layout.strip_chunk):
        return None
    return layout.rows[STRIP_ROWS * first_strip :][: STRIP_ROWS * strips].astype(np.int64)


def workspace_shape(layout: MmaLayout, strips: int) -> tuple[int, int]:
    """Shape of a workspace: [N, length] for the whole matrix, [32 · strips, length] for a panel."""
    whole = strips == len(layout.strip_chunk)
    return layout.shape[0] if whole else STRIP_ROWS * strips, layout.length


def plan(layout: MmaLayout, kind: str, first_strip: int = 0, strips: int | None = None) -> Plan:
    """Return the launch that writes the weights of some strips of 32 rows.

    It names `WORKSPACE`, of `workspace_shape`, row after row, two weights of `kind` in a uint32, that of the even
    column in the low half: memory of a float16 or bfloat16 tensor. Every element is written. Columns are permuted, see
    `columns`; rows are natural for the whole matrix and those of `rows` for a panel.

    Parameters
    ----------
    layout : MmaLayout
    kind : {"float16", "bfloat16"}
    first_strip, strips : int
        Of the matrix; all strips by default.

    Raises
    ------
    SfmpError
        Strips that the matrix does not have.
    """
    from kernels_numba.gpu import dequantize

    count = len(layout.strip_chunk)
    strips = count - first_strip if strips is None else strips
    if not (0 <= first_strip and 0 < strips <= count - first_strip):
        raise SfmpError(f"strips: expected a range within {count}, found {strips} from {first_strip}; check panels")
    tiles = int(np.diff(layout.block_tiles).max())
    arguments = (*ARRAYS, WORKSPACE, first_strip, int(strips == count), layout.length, layout.table_tiles,
                 layout.most_strips)
    return Plan({}, (Launch(dequantize.make_kernel, (layout.widths, kind, layout.segment), "uuiiiiiunnnnn", arguments,
                            (strips, -(-tiles // dequantize.WARPS)), 32 * dequantize.WARPS),))
