"""FakeQuantLinear: a linear layer on the block-mixed grid whose weights, steps and zeros can be trained.

The forward pass computes with exactly the numbers a checkpoint stores (codes; alpha and beta in float16), so
nothing is lost when a trained layer is packed.  The backward pass treats every rounding as the identity:

    w_hat = s (q - z),   q = clamp(round(w / s + z), 0, 2**b - 1)

    inside the range   dw_hat/dw = 1    dw_hat/ds = q - (w / s + z)    dw_hat/dz = 0
    clipped            dw_hat/dw = 0    dw_hat/ds = q - z              dw_hat/dz = -s

Source: METHOD.md sections 1.8 and 2.8; EfficientQAT (arXiv 2407.11062), section on block-wise training.
"""

from __future__ import annotations

import torch
from torch import nn

from sfmp.quantize import SMALLEST_SCALE, Quantized, column_chunks, encode, quantize, row_bits, stored_grid


def storable(scales, zeros, bits):
    """Steps and zeros that a checkpoint can hold, nearest to the trained ones.

    Parameters
    ----------
    scales, zeros : Tensor float32 [N, groups]
        Trained numbers, not rounded.
    bits : Tensor float32 [N, groups]

    Returns
    -------
    scales, zeros : Tensor float32 [N, groups]
        Positive steps that are fp16 numbers, their halves too; integers, except in 1-bit groups, whose zeros
        are real numbers (see :class:`sfmp.quantize.Quantized`).
    """
    scales = 2.0 * (scales.clamp_min(SMALLEST_SCALE) * 0.5).to(torch.float16).to(torch.float32)
    return scales, torch.where(bits == 1, zeros, torch.round(zeros))


class _OnGrid(torch.autograd.Function):
    """Weights rounded to the stored grid, with the straight-through gradients of the module docstring."""

    @staticmethod
    def forward(ctx, weight, scales, zeros, bits, group_size):
        scales, zeros = storable(scales, zeros, bits)
        step, base, top = stored_grid(scales, zeros, bits)
        position, codes, rounded = torch.empty_like(weight), torch.empty_like(weight), torch.empty_like(weight)
        for column, group, count, width in column_chunks(weight.shape[1], group_size):
            shape = (len(weight), count, width)
            origin, unit, most = base[:, group, None], step[:, group, None], top[:, group, None]
            place = (weight[:, column].reshape(shape) - origin).div_(unit)
            code = torch.minimum(torch.round(place).clamp_min_(0.0), most)
            position[:, column] = place.reshape(len(weight), -1)
            codes[:, column] = code.reshape(len(weight), -1)
            rounded[:, column] = torch.addcmul(origin, code, unit).reshape(len(weight), -1)
        ctx.save_for_backward(position, codes, scales, zeros)
        ctx.group_size = group_size
        return rounded

    @staticmethod
    def backward(ctx, gradient):
        position, codes, scales, zeros = ctx.saved_tensors
        inside = torch.round(position) == codes
        weight_gradient = gradient * inside
        scale_gradient, zero_gradient = torch.empty_like(scales), torch.empty_like(zeros)
        for column, group, count, width in column_chunks(gradient.shape[1], ctx.group_size):
            shape = (len(gradient), count, width)
            place, code, whole, within = (
                t[:, column].reshape(shape) for t in (position, codes, gradient, weight_gradient)
            )
            clipped = whole - within
            scale, zero = scales[:, group], zeros[:, group]
            # q - z where clipped and q - place inside, summed over the group
            slope = (clipped * (code - zero[..., None])).add_(within * (code - place))
            scale_gradient[:, group] = slope.sum(-1)
            zero_gradient[:, group] = -scale * clipped.sum(-1)
        return weight_gradient, scale_gradient, zero_gradient, None, None


class _StraightThrough(torch.autograd.Function):
    """The stored number forward, the gradient of the trained one backward."""

    @staticmethod
    def forward(ctx, trained, stored):
        return stored.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class _Gather(torch.autograd.Function):
    """``matrix[rows][:, columns]``; the backward pass gathers too, where autograd would scatter."""

    @staticmethod
    def forward(ctx, matrix, rows, columns):
        ctx.save_for_backward(rows, columns)
        return matrix[rows].index_select(1, columns)

    @staticmethod
    def backward(ctx, gradient):
        rows, columns = (torch.argsort(p) for p in ctx.saved_tensors)
        return gradient[rows].index_select(1, columns), None, None


class FakeQuantLinear(nn.Module):
    """Linear layer that computes with quantized weights and can be trained.

    Parameters
    ----------
    linear : nn.Linear
        Its weight is copied, its bias (never trained here) is shared.
    matrix : MatrixPlan
        Permutations, and the bits of every block.
    group_size, block_rows : int

    Attributes
    ----------
    weight : Parameter float32 [N, K]
        Permuted order; None once `freeze` has replaced it by codes.
    scales : Parameter float32 [N, groups]
    zeros : Parameter float32 [N, groups]; an integer buffer once frozen

    Raises
    ------
    SfmpError
        If the weight cannot be quantized (see :func:`sfmp.quantize.quantize`).

    Notes
    -----
    Starts from round-to-nearest.  Source: METHOD.md 1.5, 1.8.
    """

    def __init__(self, linear: nn.Linear, matrix, *, group_size: int, block_rows: int):
        super().__init__()
        device = linear.weight.device
        rows, columns = (torch.as_tensor(p, device=device) for p in (matrix.row_perm, matrix.col_perm))
        weight = linear.weight.detach().to(torch.float32)[rows][:, columns].contiguous()
        start = quantize(weight, matrix.bits, group_size=group_size, block_rows=block_rows)
        self.block_bits, self.group_size, self.block_rows = start.bits, int(group_size), int(block_rows)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight)
        self.scales, self.zeros = nn.Parameter(start.scales), nn.Parameter(start.zeros)
        self.bias = linear.bias
        self.register_buffer("codes", None)
        self.register_buffer("bits", row_bits(start.bits, len(weight), block_rows, device))
        self.register_buffer("to_natural_rows", torch.argsort(rows))
        self.register_buffer("to_natural_columns", torch.argsort(columns))
        self._permuted = not (_is_identity(rows) and _is_identity(columns))

    def quantized_weight(self) -> torch.Tensor:
        """Weights on the stored grid, natural order, float32 [N, K]; differentiable."""
        if self.codes is None:
            weight = _OnGrid.apply(self.weight, self.scales, self.zeros, self.bits, self.group_size)
        else:
            weight = self._from_codes()
        if not self._permuted:
            return weight
        return _Gather.apply(weight, self.to_natural_rows, self.to_natural_columns)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.quantized_weight().to(x.dtype), bias)

    def freeze(self) -> None:
        """Fix codes and zeros at what the forward pass uses now; only the scales stay trainable."""
        if self.codes is not None:
            return
        with torch.no_grad():
            scales, zeros = storable(self.scales, self.zeros, self.bits)
            codes = torch.empty(self.weight.shape, dtype=torch.uint8, device=self.weight.device)
            for column, group, count, width in column_chunks(self.in_features, self.group_size):
                part = self.weight[:, column].reshape(self.out_features, count, width)
                code = encode(part, scales[:, group], zeros[:, group], self.bits[:, group])
                codes[:, column] = code.reshape(self.out_features, -1).to(torch.uint8)
            del self.zeros
            self.register_buffer("zeros", zeros)
            self.weight, self.codes = None, codes

    def quantized(self) -> Quantized:
        """Codes, storable scales and zeros of a frozen layer, permuted order."""
        scales, zeros = storable(self.scales.detach(), self.zeros, self.bits)
        return Quantized(self.codes, scales, zeros, self.block_bits, self.group_size, self.block_rows)

    def _from_codes(self):
        scales, _ = storable(self.scales.detach(), self.zeros, self.bits)
        step, base, _ = stored_grid(scales, self.zeros, self.bits)
        step = _StraightThrough.apply(self.scales, step)
        base = _StraightThrough.apply(-self.scales * self.zeros, base)
        parts = []
        for column, group, count, width in column_chunks(self.in_features, self.group_size):
            part = self.codes[:, column].reshape(self.out_features, count, width).to(torch.float32)
            values = torch.addcmul(base[:, group, None], part, step[:, group, None])
            parts.append(values.reshape(self.out_features, -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _is_identity(permutation: torch.Tensor) -> bool:
    return torch.equal(permutation, torch.arange(len(permutation), device=permutation.device))
