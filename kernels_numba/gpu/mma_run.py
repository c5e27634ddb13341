"""One product with the tensor-core kernel: which launches, over which arrays."""

from __future__ import annotations

import numpy as np

from kernels_numba.gpu.launches import Launch, Plan
from kernels_numba.gpu.mma_layout import MmaLayout
from sfmp.checks import SfmpError

ARRAYS = ("units", "scales", "tiles", "segments", "strip_chunk", "strip_record", "rows")
GATHERS = ("fused", "unfused")
MOST_BYTES = 99 << 10  # of shared memory of a block, on every capability since 8.0
LARGE_BYTES = 227 << 10  # on 9.0, where the caller asks for it
FUSED_TOKENS = 2  # where every strip gathers activations by default
FEW_STRIPS = 256  # fewer leave processors of a large device one block at most, which then has 16 warps
WARPS, MANY_WARPS = 8, 16
STAGES = (2, 3, 4)
MOST_BLOCKS = 65535  # of the second dimension of a grid


def layout_arrays(layout: MmaLayout) -> dict[str, np.ndarray]:
    """The arrays that the launches of `plan` name, on the host."""
    return {name: getattr(layout, name) for name in (*ARRAYS, "columns")}


def choose_warps(layout: MmaLayout, tokens: int, kind: str) -> int:
    """Warps of a block: 16 where strips are few and tiles of a strip are many, 8 elsewhere.

    A processor holds 16 warps of this kernel, or 8 if they need more registers. With one strip or none for each of some
    132 processors it is one block that has to have them all.
    """
    from kernels_numba.gpu import mma

    few = len(layout.strip_chunk) < FEW_STRIPS and np.diff(layout.block_tiles).max() >= 2 * MANY_WARPS
    return min(mma.resident_warps(layout.widths, tokens, kind, layout.segment), MANY_WARPS if few else WARPS)


def choose_stages(layout: MmaLayout, tokens: int, kind: str, warps: int) -> int:
    """Units that a warp has asked for ahead: 2, but up to 4 in `MOST_BYTES` where only half as many warps run."""
    from kernels_numba.gpu import mma

    if mma.resident_warps(layout.widths, tokens, kind, layout.segment) == mma.MANY_WARPS:
        return 2
    return max(stages for stages in STAGES
               if stages == 2 or shared_bytes(layout, tokens, kind, warps, stages, "unfused") <= MOST_BYTES)


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


def shared_bytes(layout: MmaLayout, tokens: int, kind: str, warps: int, stages: int, gather: str) -> int:
    """Shared memory of a block, all of which its launch asks for."""
    from kernels_numba.gpu import mma, mma_gather

    made_for = kernel_tokens(tokens, gather)
    size = 16 + warps * mma.ring_bytes(layout.widths, made_for, layout.segment, stages)  # 16 for aligning it
    if gather == "fused":
        size += mma_gather.shared_bytes(kind, made_for, layout.segment, len(layout.columns))
    return size


def plan(layout: MmaLayout, tokens: int, kind: str, *, warps: int | None = None,
         stages: int | None = None, gather: str | None = None) -> Plan:
    """Return the launches of y = x Wᵀ + bias, at most `mma.most_tokens` tokens each.

    Launches may need more than 48 KB of shared memory, which the driver gives on request only.

    Parameters
    ----------
    layout : MmaLayout
    tokens : int
    kind : str, one of `mma.KINDS`
        Of x [tokens, K] and y [tokens, N], whose bits are arrays of uint16; bias is float32 [N].
    warps : int, optional
        Of a block, at most those that a processor holds; `choose_warps`. The result depends on it by rounding.
    stages : {2, 3, 4}, optional
        Units that a warp has asked for ahead, `choose_stages`.
    gather : {"fused", "unfused"}, optional
        Whether every strip gathers the activations, which at most 8 tokens can, or a kernel of its own does. "fused"
        for 1 or 2 tokens that fit `MOST_BYTES`: each strip loads every activation one by one, which is little beside
        its weights for few tokens only, but it saves a launch.

    Raises
    ------
    SfmpError
        Activations that do not fit shared memory, more row blocks than a grid has, or an option that does not exist.
    """
    from kernels_numba.gpu import mma

    blocks = len(layout.block_tiles) - 1
    if blocks > MOST_BLOCKS:
        raise SfmpError(f"packed: expected at most {MOST_BLOCKS} row blocks for mode mma, found {blocks}; use mode lut "
                        "or larger block_rows")
    most = min(tokens, mma.most_tokens(layout.widths, layout.segment))
    warps = min(warps or choose_warps(layout, most, kind),
                mma.resident_warps(layout.widths, most, kind, layout.segment))
    stages = stages or choose_stages(layout, most, kind, warps)
    if gather is None:
        fits = tokens <= FUSED_TOKENS and shared_bytes(layout, tokens, kind, warps, stages, "fused") <= MOST_BYTES
        gather = "fused" if fits else "unfused"
    if gather not in GATHERS or stages not in STAGES:
        raise SfmpError(f"gather, stages: expected one of {GATHERS} and of {STAGES}, found {gather!r} and {stages!r}; "
                        "leave them out")
    return (_fused if gather == "fused" else _unfused)(layout, tokens, kind, warps, stages)


def _fused(layout, tokens, kind, warps, stages):
    from kernels_numba.gpu import mma

    out_features, in_features = layout.shape
    size = shared_bytes(layout, min(tokens, mma.FUSED_TOKENS), kind, warps, stages, "fused")
    if tokens > mma.FUSED_TOKENS or size > LARGE_BYTES:
        raise SfmpError(f"activations: expected at most {mma.FUSED_TOKENS} tokens in {LARGE_BYTES} bytes of shared "
                        f'memory, found {tokens} in {size}; use gather="unfused"')
    options = (layout.widths, kernel_tokens(tokens, "fused"), kind, layout.segment, warps, stages)
    arguments = (*ARRAYS, "columns", "x", "bias", "y", out_features, in_features, len(layout.columns),
                 layout.table_tiles, len(layout.strip_chunk), tokens)
    return Plan({}, (Launch(mma.make_fused, options, "uuiiiiiihfhnnnnnn", arguments, _grid(layout),
                            32 * warps, size),))


def _grid(layout):
    return layout.most_strips, len(layout.block_tiles) - 1


def _unfused(layout, tokens, kind, warps, stages):
    from kernels_numba.gpu import mma, mma_gather

    (out_features, in_features), length = layout.shape, len(layout.columns)
    most = mma.most_tokens(layout.widths, layout.segment)
    room = min(tokens, most)
    sums = room * length // layout.segment
    scratch = {"arranged": (room * length // 2, "u"), "totals": (sums, "f"), "factors": (sums, "f")}
    blocks = -(-length // (128 * mma_gather.ARRANGE_WARPS))
    launches = []
    for first in range(0, tokens, most):
        count = min(most, tokens - first)
        options = (layout.widths, kernel_tokens(count, "unfused"), kind, layout.segment, warps, stages)
        arguments = (*ARRAYS, *scratch, "bias", ("y", first * out_features), out_features, length, layout.table_tiles,
                     len(layout.strip_chunk), count)
        launches += [
            Launch(mma_gather.make_arrange, (kind, layout.segment), "hiuffnn",
                   (("x", first * in_features), "columns", *scratch, in_features, length), (blocks, count),
                   32 * mma_gather.ARRANGE_WARPS),
            Launch(mma.make_kernel, options, "uuiiiiiufffhnnnnn", arguments, _grid(layout), 32 * warps,
                   shared_bytes(layout, count, kind, warps, stages, "unfused"))]
    return Plan(scratch, tuple(launches))
