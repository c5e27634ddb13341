"""One product with the tensor-core kernel: which launches, over which arrays."""

from __future__ import annotations

import numpy as np

from kernels_numba.gpu.launches import Launch, Plan
from kernels_numba.gpu.mma_layout import MmaLayout
from sfmp.checks import SfmpError

ARRAYS = ("units", "scales", "tiles", "segments", "strip_chunk", "strip_record", "rows")
GATHERS = ("fused", "unfused")
STATIC_BYTES = 48 << 10  # of shared memory, what a block has without asking the driver for more
MOST_BYTES = 99 << 10  # what one may ask for on every capability since 8.0
FEW_STRIPS = 256  # fewer leave processors of a large device one block at most, which then has 16 warps
WARPS, MANY_WARPS = 8, 16


def layout_arrays(layout: MmaLayout) -> dict[str, np.ndarray]:
    """The arrays that the launches of `plan` name, on the host."""
    return {name: getattr(layout, name) for name in (*ARRAYS, "columns")}


def choose_warps(layout: MmaLayout, tokens: int) -> int:
    """Warps of a block: 16 where strips are few and tiles of a strip are many, 8 elsewhere.

    A processor holds 16 warps of this kernel, or 8 if they need more registers. With one strip or none for each of some
    132 processors it is one block that has to have them all.
    """
    from kernels_numba.gpu import mma

    most = mma.resident_warps(layout.widths, tokens, layout.segment)
    few = len(layout.strip_chunk) < FEW_STRIPS and layout.most_tiles >= 2 * MANY_WARPS
    return min(most, MANY_WARPS if few else WARPS)


def kernel_tokens(tokens: int, gather: str) -> int:
    """Tokens that the kernel for so many is made for.

    Examples
    --------
    >>> [kernel_tokens(tokens, "unfused") for tokens in (1, 2, 8, 9, 17, 32)]
    [1, 8, 8, 16, 32, 32]
    >>> [kernel_tokens(tokens, "fused") for tokens in (1, 2, 3, 5, 8)]
    [1, 2, 4, 8, 8]
    """
    return next(most for most in ((1, 2, 4, 8) if gather == "fused" else (1, 8, 16, 32)) if tokens <= most)


def fused_bytes(layout: MmaLayout, tokens: int, kind: str, warps: int) -> tuple[int, int]:
    """Shared memory of a block that gathers activations itself: all of it, and what its launch has to ask for."""
    from kernels_numba.gpu import mma, mma_gather

    made_for = kernel_tokens(tokens, "fused")
    asked = mma_gather.shared_bytes(kind, made_for, layout.segment, len(layout.columns))
    return asked + mma.reduced_bytes(made_for, warps), asked


def choose_gather(layout: MmaLayout, tokens: int, kind: str, warps: int) -> str:
    """ "fused" where the activations fit shared memory that needs no asking for, "unfused" elsewhere.

    Every strip gathers all activations, 2 bytes a number, beside 128·K/8 bytes of weights of 4 bits: that is cheap for
    few tokens, and it saves a launch.
    """
    fits = tokens <= 8 and fused_bytes(layout, tokens, kind, warps)[0] <= STATIC_BYTES
    return "fused" if fits else "unfused"


def plan(layout: MmaLayout, tokens: int, kind: str, *, warps: int | None = None, gather: str | None = None) -> Plan:
    """Return the launches of y = x Wᵀ + bias, at most 32 tokens each.

    Parameters
    ----------
    layout : MmaLayout
    tokens : int
    kind : str, one of `mma.KINDS`
        Of x [tokens, K] and y [tokens, N], whose bits are arrays of uint16; bias is float32 [N].
    warps : int, optional
        Of a block, `choose_warps`. The result depends on it by rounding.
    gather : {"fused", "unfused"}, optional
        Whether every block gathers the activations it needs, which takes at most 8 tokens and `MOST_BYTES`, or a kernel
        of its own does; `choose_gather`.

    Raises
    ------
    SfmpError
        Activations that do not fit shared memory, or an unknown way to gather them.
    """
    warps = warps or choose_warps(layout, tokens)
    gather = gather or choose_gather(layout, tokens, kind, warps)
    if gather not in GATHERS:
        raise SfmpError(f"gather: expected {' or '.join(GATHERS)}, found {gather!r}; leave it None")
    return (_fused if gather == "fused" else _unfused)(layout, tokens, kind, warps)


def _fused(layout, tokens, kind, warps):
    from kernels_numba.gpu import mma

    out_features, in_features = layout.shape
    total, asked = fused_bytes(layout, min(tokens, mma.FUSED_TOKENS), kind, warps)
    if tokens > mma.FUSED_TOKENS or total > MOST_BYTES:
        raise SfmpError(f"activations: expected at most {mma.FUSED_TOKENS} tokens in {MOST_BYTES} bytes of shared "
                        f'memory, found {tokens} in {total}; use gather="unfused"')
    options = (layout.widths, kernel_tokens(tokens, "fused"), kind, layout.segment, warps)
    arguments = (*ARRAYS, "columns", "x", "bias", "y", out_features, in_features, len(layout.columns),
                 layout.most_tiles, layout.most_strips, tokens)
    launch = Launch(mma.make_fused, options, "uuiiiiiihfhnnnnnn", arguments, (len(layout.strip_chunk), 1), 32 * warps,
                    asked)
    return Plan({}, (launch,))


def _unfused(layout, tokens, kind, warps):
    from kernels_numba.gpu import mma, mma_gather

    (out_features, in_features), length = layout.shape, len(layout.columns)
    room = min(tokens, mma.MOST_TOKENS)
    sums = room * length // layout.segment
    scratch = {"arranged": (room * length // 2, "u"), "totals": (sums, "f"), "factors": (sums, "f")}
    blocks = -(-length // (128 * mma_gather.ARRANGE_WARPS))
    launches = []
    for first in range(0, tokens, mma.MOST_TOKENS):
        count = min(mma.MOST_TOKENS, tokens - first)
        options = (layout.widths, kernel_tokens(count, "unfused"), kind, layout.segment, warps)
        arguments = (*ARRAYS, *scratch, "bias", ("y", first * out_features), out_features, length, layout.most_tiles,
                     layout.most_strips, count)
        launches += [
            Launch(mma_gather.make_arrange, (kind, layout.segment), "hiuffnn",
                   (("x", first * in_features), "columns", *scratch, in_features, length), (blocks, count),
                   32 * mma_gather.ARRANGE_WARPS),
            Launch(mma.make_kernel, options, "uuiiiiiufffhnnnnn", arguments, (len(layout.strip_chunk), 1), 32 * warps)]
    return Plan(scratch, tuple(launches))
