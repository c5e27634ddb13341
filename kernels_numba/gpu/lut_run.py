"""One product with the look-up kernel: panels, shares and launches, on a device or in the simulator."""

from __future__ import annotations

import numpy as np

from kernels_numba.gpu.launches import Launch, Plan
from kernels_numba.gpu.lut_layout import LutLayout
from kernels_numba.gpu.records import LANES

ARRAYS = ("lines", "scales", "tile_bits", "tile_line", "tile_record", "segments", "columns", "block_tiles")
PANELS = (16, 32)  # most strips of a panel, see `lut.panel_strips`
SUM_THREADS = 128


def default_width(tokens: int) -> int:
    """Table width for a number of tokens: the widest whose tables for one token, or for 8, fit 48 KB.

    Examples
    --------
    >>> [default_width(tokens) for tokens in (1, 2, 40)]
    [8, 4, 4]
    """
    return 8 if tokens == 1 else 4


def make_panels(layout: LutLayout, strips: int) -> np.ndarray:
    """Cut row blocks into panels of at most `strips` strips.

    Returns
    -------
    int32 [panels · 4]
        Row block, first strip in the row block, strips, first strip of the row block in the matrix.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> make_panels(SimpleNamespace(block_strips=[0, 3, 4]), 2).tolist()
    [0, 0, 2, 0, 0, 2, 1, 0, 1, 0, 1, 3]
    """
    panels = []
    for block, (start, end) in enumerate(zip(layout.block_strips[:-1], layout.block_strips[1:], strict=True)):
        for first in range(0, end - start, strips):
            panels += [block, first, min(strips, end - start - first), start]
    return np.array(panels, np.int32)


def panel_count(layout: LutLayout, strips: int) -> int:
    """How many panels `make_panels` makes."""
    return int((-(-np.diff(layout.block_strips) // strips)).sum())


def choose_shares(layout: LutLayout, panels: int, blocks: int) -> int:
    """How many thread blocks share the tiles of a panel so that at least `blocks` run; never more than tiles."""
    tiles = int(np.diff(layout.block_tiles).max())
    return max(1, min(tiles, -(-blocks // panels)))


def plan(layout: LutLayout, tokens: int, kind: str, *, shares: int | None = None, blocks: int = 1,
         width: int | None = None, warps: int = 8) -> Plan:
    """Return what y = x Wᵀ + bias launches: look-ups and sums, for at most 8 tokens at a time.

    Parameters
    ----------
    layout : LutLayout
    tokens : int, at least 1
    kind : str, one of `kinds.KINDS`: of x [tokens · K] and y [tokens · N]
    shares : int or None
        Thread blocks that share the tiles of a panel; None takes `choose_shares` for `blocks`. The result depends on
        it by rounding, on nothing else.
    blocks : int
        Thread blocks that should run at least.
    width : int or None
        Of the tables: 2, 4, 6 or 8; `default_width` if None.
    warps : int
        Of a block.
    """
    from kernels_numba.gpu import lut

    width = width or default_width(tokens)
    rows, most = len(layout.rows), lut.most_tokens(width)
    out_features, in_features = layout.shape
    number = "f" if kind == "float32" else "h"
    steps, size = [], 0
    for first in range(0, tokens, most):
        count = min(most, tokens - first)
        tables = 1 if count == 1 else most
        strips = lut.panel_strips(tables)
        panels = panel_count(layout, strips)
        parts = shares or choose_shares(layout, panels, blocks)
        steps += [
            Launch(lut.make_kernel, (width, tables, kind, layout.segment, warps), f"uuiiiiiii{number}fnnn",
                   (*ARRAYS, f"panels_{strips}", ("x", first * in_features), "partial", in_features, rows, count),
                   (panels, parts), LANES * warps),
            Launch(lut.make_sum, (kind,), f"fif{number}nnnn",
                   ("partial", "rows", "bias", ("y", first * out_features), out_features, rows, count, parts),
                   (-(-rows * count // SUM_THREADS), 1), SUM_THREADS)]
        size = max(size, parts * count * rows)
    return Plan({"partial": (size, "f")}, tuple(steps))


def layout_arrays(layout: LutLayout) -> dict[str, np.ndarray]:
    """The arrays of a matrix that launches name, on the host."""
    arrays = {name: getattr(layout, name) for name in (*ARRAYS, "rows")}
    return {**arrays, **{f"panels_{strips}": make_panels(layout, strips) for strips in PANELS}}

