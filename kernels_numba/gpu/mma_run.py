"""One product with the tensor-core kernel: which launches, over which arrays."""

from __future__ import annotations

import numpy as np

from kernels_numba.gpu.launches import Launch, Plan
from kernels_numba.gpu.mma_layout import MmaLayout

ARRAYS = ("units", "scales", "tile_bits", "tile_chunk", "segments", "block_tiles", "strip_block", "strip_chunk",
          "strip_record", "rows")


def layout_arrays(layout: MmaLayout) -> dict[str, np.ndarray]:
    """The arrays that the launches of `plan` name, on the host."""
    return {name: getattr(layout, name) for name in (*ARRAYS, "columns")}


def token_tiles(tokens: int) -> int:
    """Tensor-core tiles of 8 tokens of one launch: 1, 2 or 4.

    Examples
    --------
    >>> [token_tiles(tokens) for tokens in (1, 8, 9, 17, 32)]
    [1, 1, 2, 4, 4]
    """
    return 1 if tokens <= 8 else 2 if tokens <= 16 else 4


def plan(layout: MmaLayout, tokens: int, kind: str, *, warps: int | None = None, gather: str | None = None) -> Plan:
    """Return the launches of y = x Wᵀ + bias, at most 32 tokens each.

    Parameters
    ----------
    layout : MmaLayout
    tokens : int
    kind : str, one of `mma.KINDS`
        Of x [tokens, K] and y [tokens, N], whose bits are arrays of uint16; bias is float32 [N].
    warps : int, optional
        Of a block. The result depends on it by rounding.
    gather : {"unfused"}, optional
        A kernel of its own writes activations in permuted order.
    """
    from kernels_numba.gpu import mma

    out_features, in_features = layout.shape
    length, warps = len(layout.columns), warps or mma.WARPS
    room = mma.TOKENS * token_tiles(min(tokens, mma.MOST_TOKENS))
    scratch = {"arranged": (room * length, "h"), "totals": (room * length // layout.segment, "f"),
               "factors": (room, "f")}
    launches = []
    for first in range(0, tokens, mma.MOST_TOKENS):
        count = min(mma.MOST_TOKENS, tokens - first)
        launches += [
            Launch(mma.make_arrange, (kind, layout.segment, warps), "hihffnn",
                   (("x", first * in_features), "columns", *scratch, in_features, length), (count, 1), 32 * warps),
            Launch(mma.make_kernel, (layout.widths, token_tiles(count), kind, layout.segment, warps),
                   "uuiiiiiiiihfffhnnn", (*ARRAYS, *scratch, "bias", ("y", first * out_features), out_features, length,
                                          count), (len(layout.strip_block), 1), 32 * warps)]
    return Plan(scratch, tuple(launches))
