"""One product with the look-up kernel: panels, shares and launches, on a device or in the simulator.

Arrays are what Numba takes: NumPy arrays in the simulator, device arrays (anything with ``__cuda_array_interface__``)
on a device; half-precision numbers travel as uint16.
"""

from __future__ import annotations

import numpy as np

from kernels_numba.gpu.lut_layout import LutLayout

ARRAYS = ("lines", "scales", "tile_bits", "tile_line", "tile_record", "segments", "columns", "block_tiles")
SUM_THREADS = 128


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


def choose_shares(layout: LutLayout, panels: int, blocks: int) -> int:
    """How many thread blocks share the tiles of a panel so that at least `blocks` run; never more than tiles."""
    tiles = int(np.diff(layout.block_tiles).max())
    return max(1, min(tiles, -(-blocks // panels)))


def multiply(arrays, x, y, partial, bias, *, shape, segment, kind, width, panels, shares, warps=8, stream=0):
    """Enqueue y = x Wᵀ + bias.

    Parameters
    ----------
    arrays : dict
        The arrays of `LutLayout` and ``panels``, `make_panels` of at most `lut.panel_strips` strips.
    x, y : [tokens · K], [tokens · N]
        Of `kind`; float16 and bfloat16 as uint16.
    partial : float32 [≥ shares · most tokens · strips · 16]
        Scratch of this call.
    bias : float32 [N]
    shape : (tokens, N, K)
    segment : int
    kind : str, one of `lut.KINDS`
    width : int, of the tables
    panels, shares, warps : int
        Grid of the look-up kernel, and warps of a block. The result depends on `shares` by rounding, on nothing else.
    stream
        What Numba takes for a stream.
    """
    from kernels_numba.gpu import lut

    tokens, out_features, in_features = shape
    rows, most = len(arrays["rows"]), lut.most_tokens(width)
    add = lut.make_sum(kind)
    given = [arrays[name] for name in ARRAYS]
    for first in range(0, tokens, most):
        count = min(most, tokens - first)
        sizes = [np.int32(size) for size in (in_features, out_features, rows, count, shares)]  # an int would be 64 bits
        kernel = lut.make_kernel(width, 1 if count == 1 else most, kind, segment, warps)
        kernel[(panels, shares), lut.LANES * warps, stream](
            *given, arrays["panels"], x[first * in_features :], partial, sizes[0], *sizes[2:4])
        add[-(-rows * count // SUM_THREADS), SUM_THREADS, stream](
            partial, arrays["rows"], bias, y[first * out_features :], *sizes[1:])


def scratch_size(layout: LutLayout, width: int, shares: int) -> int:
    """Elements of `partial` that `multiply` needs."""
    from kernels_numba.gpu import lut

    return shares * lut.most_tokens(width) * len(layout.rows)


def layout_arrays(layout: LutLayout, width: int) -> dict[str, np.ndarray]:
    """The arrays `multiply` takes, on the host."""
    from kernels_numba.gpu import lut

    arrays = {name: getattr(layout, name) for name in (*ARRAYS, "rows")}
    return {**arrays, "panels": make_panels(layout, lut.panel_strips(lut.most_tokens(width)))}


