"""Group-affine codes: choose a range, quantize, dequantize; every block at its own bit-width.

All arrays of this module are in permuted order (rows by ``row_perm``, columns by ``col_perm``).  A group is
``group_size`` consecutive permuted columns of one row; it has one scale and one zero.  The reconstruction is
``W = (codes - zeros) * scales``, but what a checkpoint stores is the equivalent pair

    alpha = fp16(scale / 2),   beta = fp16(scale * ((2**b - 1) / 2 - zero)),
    W = alpha * (2 * codes - (2**b - 1)) + beta,

so codes are chosen, and errors measured, against the *stored* pair: what a search sees is what a kernel runs.

Source: METHOD.md sections 1.5, 1.9 and 1.12 (defects 9 and 10), DESIGN.md section 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sfmp.spec import SfmpError

# Zeros are recovered from the rounded beta.  With steps of at least max|w| / 512, |zero - (2**b - 1) / 2|
# stays below 640, so the rounding of beta (relative 2**-11) stays under a third of a step and integer zeros
# come back exactly.
RELATIVE_FLOOR = 1.0 / 512.0
# The smallest step whose half is still an fp16 number.
SMALLEST_SCALE = 2.0**-23


@dataclass(frozen=True)
class Quantized:
    """One quantized matrix in permuted order.

    Attributes
    ----------
    codes : Tensor uint8 [N, K]
        Integers in 0..2**b - 1 of the block they are in.
    scales : Tensor float32 [N, groups]
        Steps; each is an fp16 number, and so is its half.
    zeros : Tensor float32 [N, groups]
        Integers (of any sign and size up to 512 + 255) except in 1-bit blocks, where they are real numbers.
    bits : ndarray uint8 [row_blocks, groups]
        Bit-width of each block.
    group_size, block_rows : int
        Columns of a group; rows of a block.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bits: np.ndarray
    group_size: int
    block_rows: int


def column_chunks(columns: int, group_size: int):
    """Yield (column slice, group slice, groups, width): the whole groups, then the short last one if any."""
    whole, rest = divmod(columns, group_size)
    if whole:
        yield slice(0, whole * group_size), slice(0, whole), whole, group_size
    if rest:
        yield slice(whole * group_size, columns), slice(whole, whole + 1), 1, rest


def row_bits(bits, rows: int, block_rows: int, device=None) -> torch.Tensor:
    """Expand bits [row_blocks, groups] to one number per (row, group): float32 [rows, groups]."""
    table = torch.as_tensor(np.asarray(bits), device=device).to(torch.float32)
    return table.repeat_interleave(block_rows, dim=0)[:rows]


def group_parameters(weight, bits, lower=None, upper=None):
    """Scale and zero of every group from its extremes, or from a given clip range.

    Parameters
    ----------
    weight : Tensor float32 [..., width]
        The weights of each group, last axis inside the group.
    bits : Tensor float32 [...]
        Bit-width of each group.
    lower, upper : Tensor float32 [...], optional
        Range to represent instead of the minimum and maximum (clipping).

    Returns
    -------
    scales, zeros : Tensor float32 [...]
        Min-max affine parameters; a 1-bit group gets the two levels mean -/+ mean|w - mean| instead, because
        min-max would put both of its levels where almost no weight is.

    Raises
    ------
    SfmpError
        If a step overflows fp16.

    Notes
    -----
    Source: METHOD.md 1.5.  Zeros are integers but not clamped to 0..2**b - 1, so a group without a sign
    change keeps its whole range (defect 9 of METHOD 1.12); the floor of the step is relative (defect 10).
    """
    low = weight.amin(-1) if lower is None else lower
    high = weight.amax(-1) if upper is None else upper
    scales = _storable((high - low) / (torch.exp2(bits) - 1.0), torch.maximum(low.abs(), high.abs()))
    zeros = torch.round(-low / scales)
    single = bits == 1
    if bool(single.any()):
        inside = torch.minimum(torch.maximum(weight, low[..., None]), high[..., None])
        centre = inside.mean(-1)
        two_level = _storable(2.0 * (inside - centre[..., None]).abs().mean(-1), centre.abs())
        scales = torch.where(single, two_level, scales)
        zeros = torch.where(single, 0.5 - centre / scales, zeros)
    return scales, zeros


def _storable(scales, magnitude):
    """Raise tiny steps to the floor and round them so that scale and scale / 2 are both fp16 numbers."""
    scales = torch.maximum(scales, magnitude * RELATIVE_FLOOR).clamp_min(SMALLEST_SCALE)
    scales = 2.0 * (scales * 0.5).to(torch.float16).to(torch.float32)
    if bool((scales > torch.finfo(torch.float16).max).any()):
        raise SfmpError(
            f"a weight group is too wide for fp16: its largest weight is {float(magnitude.max()):.3g}, "
            "expected steps below 65504; check the checkpoint, or rescale the layer before quantizing"
        )
    return scales


def stored_affine(scales, zeros, bits_per_group):
    """The pair the checkpoint stores for each group.

    Parameters
    ----------
    scales, zeros : Tensor float32 [N, groups]
    bits_per_group : Tensor [N, groups] (or broadcastable to it)

    Returns
    -------
    alpha, beta : Tensor float16 [N, groups]
        ``alpha = scale / 2``, ``beta = scale * ((2**b - 1) / 2 - zero)``.

    Notes
    -----
    Source: METHOD.md 1.9 (exact conversion of affine codes to signed bit-planes).
    """
    alpha = (scales * 0.5).to(torch.float16)
    beta = (scales * ((torch.exp2(bits_per_group.to(torch.float32)) - 1.0) * 0.5 - zeros)).to(torch.float16)
    return alpha, beta


def encode(weight, scales, zeros, bits):
    """Nearest code of each weight [..., width] on the stored grid, as float32 integers [..., width]."""
    step, base, top = stored_grid(scales, zeros, bits)
    codes = torch.round((weight - base[..., None]) / step[..., None])
    return torch.minimum(codes.clamp_min_(0.0), top[..., None])


def decode(codes, scales, zeros, bits):
    """Weights of codes [..., width] on the stored grid, float32."""
    step, base, _ = stored_grid(scales, zeros, bits)
    return torch.addcmul(base[..., None], codes, step[..., None])


def stored_grid(scales, zeros, bits):
    """Stored grid of each group, float32: step, value of code 0, highest code."""
    alpha, beta = stored_affine(scales, zeros, bits)
    top = torch.exp2(bits) - 1.0
    alpha = alpha.to(torch.float32)
    return 2.0 * alpha, beta.to(torch.float32) - alpha * top, top


def quantize(weight, bits, *, group_size, block_rows, lower=None, upper=None) -> Quantized:
    """Quantize a permuted matrix with one bit-width per block.

    Parameters
    ----------
    weight : Tensor or ndarray float32 [N, K]
        Weights in permuted order.
    bits : ndarray uint8 [ceil(N / block_rows), ceil(K / group_size)]
        Bit-width of each block, 1..8.
    group_size, block_rows : int
        Shape of a block; the last group and the last row block may be short.
    lower, upper : Tensor float32 [N, groups], optional
        Clip range of each group (both or neither).

    Returns
    -------
    Quantized

    Raises
    ------
    SfmpError
        If shapes disagree, a bit-width is outside 1..8, or the weights are not finite.

    Notes
    -----
    Source: METHOD.md 1.5.  Rounding is half to even, everything is float32 and elementwise, so equal inputs
    give equal codes.

    Examples
    --------
    >>> import numpy as np
    >>> weight = np.array([[0.0, 1.0, 2.0, 3.0]], np.float32)
    >>> q = quantize(weight, np.array([[2]]), group_size=4, block_rows=1)
    >>> q.codes.tolist(), dequantize(q).tolist()
    ([[0, 1, 2, 3]], [[0.0, 1.0, 2.0, 3.0]])
    """
    weight = torch.as_tensor(weight).detach().to(torch.float32)
    bits = check_bits(bits, weight, group_size, block_rows)
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise SfmpError(
            f"{bad} of {weight.numel()} weights are NaN or infinite, expected finite ones; "
            "repair the checkpoint"
        )
    if (lower is None) != (upper is None):
        raise SfmpError("clip range: expected both lower and upper or neither, found only one of them")
    rows, columns = weight.shape
    per_row = row_bits(bits, rows, block_rows, weight.device)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    scales, zeros = torch.empty_like(per_row), torch.empty_like(per_row)
    for column, group, count, width in column_chunks(columns, group_size):
        part = weight[:, column].reshape(rows, count, width)
        clip = (None, None) if lower is None else (lower[:, group], upper[:, group])
        scale, zero = group_parameters(part, per_row[:, group], *clip)
        codes[:, column] = encode(part, scale, zero, per_row[:, group]).reshape(rows, -1).to(torch.uint8)
        scales[:, group], zeros[:, group] = scale, zero
    return Quantized(codes, scales, zeros, bits, int(group_size), int(block_rows))


def dequantize(quantized: Quantized) -> torch.Tensor:
    """Weights float32 [N, K] in permuted order, computed from the stored fp16 pair (see the module)."""
    rows, columns = quantized.codes.shape
    per_row = row_bits(quantized.bits, rows, quantized.block_rows, quantized.codes.device)
    weight = torch.empty(rows, columns, dtype=torch.float32, device=quantized.codes.device)
    for column, group, count, width in column_chunks(columns, quantized.group_size):
        part = quantized.codes[:, column].reshape(rows, count, width).to(torch.float32)
        values = decode(part, quantized.scales[:, group], quantized.zeros[:, group], per_row[:, group])
        weight[:, column] = values.reshape(rows, -1)
    return weight


def check_bits(bits, weight, group_size, block_rows) -> np.ndarray:
    """Validate a bit map against a matrix [N, K]; returns it as uint8 [row_blocks, groups]."""
    if weight.ndim != 2:
        raise SfmpError(f"weight: expected a matrix [N, K], found shape {tuple(weight.shape)}")
    if group_size < 1 or block_rows < 1:
        raise SfmpError(f"group_size, block_rows: expected at least 1, found {group_size}, {block_rows}")
    bits = bits.detach().cpu().numpy() if isinstance(bits, torch.Tensor) else np.asarray(bits)
    expected = (-(-weight.shape[0] // block_rows), -(-weight.shape[1] // group_size))
    if bits.shape != expected:
        raise SfmpError(
            f"bits: expected shape {expected} for a {tuple(weight.shape)} weight with block_rows="
            f"{block_rows} and group_size={group_size}, found {bits.shape}; make the plan for this matrix"
        )
    if bits.size and not (1 <= bits.min() and bits.max() <= 8):
        raise SfmpError(f"bits: expected bit-widths within 1..8, found {int(bits.min())}..{int(bits.max())}")
    return bits.astype(np.uint8)
