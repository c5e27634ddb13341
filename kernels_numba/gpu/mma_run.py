"""One product with the tensor-core kernel: arranged activations and launches, on a device or in the simulator.

Arrays are what Numba takes, see `lut_run`.
"""

from __future__ import annotations

import numpy as np

from kernels_numba.gpu.mma_layout import MmaLayout

ARRAYS = ("units", "scales", "tile_bits", "tile_chunk", "segments", "block_tiles", "strip_block", "strip_chunk",
          "strip_record", "rows")


def layout_arrays(layout: MmaLayout) -> dict[str, np.ndarray]:
    """The arrays `multiply` takes, on the host."""
    return {name: getattr(layout, name) for name in (*ARRAYS, "columns")}


def scratch_sizes(layout: MmaLayout, tokens: int) -> dict[str, tuple[int, type]]:
    """Elements and dtype of the scratch arrays that `multiply` needs."""
    from kernels_numba.gpu import mma

    room = mma.TOKENS * token_tiles(min(tokens, mma.MOST_TOKENS))
    length = len(layout.columns)
    return {"arranged": (room * length, np.uint16), "totals": (room * length // layout.segment, np.float32),
            "factors": (room, np.float32)}


def token_tiles(tokens: int) -> int:
    """Tensor-core tiles of 8 tokens of one launch: 1, 2 or 4.

    Examples
    --------
    >>> [token_tiles(tokens) for tokens in (1, 8, 9, 17, 32)]
    [1, 1, 2, 4, 4]
    """
    return 1 if tokens <= 8 else 2 if tokens <= 16 else 4


def multiply(arrays, x, y, scratch, bias, *, shape, segment, widths, kind, warps=8, stream=0):
    """Enqueue y = x Wᵀ + bias, at most 32 tokens at a time.

    Parameters
    ----------
    arrays : dict
        `layout_arrays`.
    x, y : uint16 [tokens · K], [tokens · N]
        Bits of `kind`.
    scratch : dict
        Arrays of `scratch_sizes`, of this call.
    bias : float32 [N]
    shape : (tokens, N, K)
    segment, widths
        Of the layout.
    kind : str, one of `mma.KINDS`
    warps : int
        Of a block. The result depends on it by rounding.
    stream
        What Numba takes for a stream.
    """
    from kernels_numba.gpu import mma

    tokens, out_features, in_features = shape
    length, strips = len(arrays["columns"]), len(arrays["strip_block"])
    buffers = [scratch[name] for name in ("arranged", "totals", "factors")]
    arrange = mma.make_arrange(kind, segment, warps)
    for first in range(0, tokens, mma.MOST_TOKENS):
        count = min(mma.MOST_TOKENS, tokens - first)
        sizes = [np.int32(size) for size in (in_features, out_features, length, count)]  # an int would be 64 bits
        arrange[count, 32 * warps, stream](x[first * in_features :], arrays["columns"], *buffers, sizes[0], sizes[2])
        kernel = mma.make_kernel(widths, token_tiles(count), kind, segment, warps)
        kernel[strips, 32 * warps, stream](
            *(arrays[name] for name in ARRAYS), *buffers, bias, y[first * out_features :], *sizes[1:])
