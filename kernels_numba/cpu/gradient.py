"""Derivatives of a product on the CPU: backward, forward-mode, and under torch.func's transforms."""

from __future__ import annotations

import torch


class Product(torch.autograd.Function):
    """The product with derivatives for x and bias; the weight is quantized and has none.

    Product.apply(x, bias, packed, multiply), where multiply(x, bias, packed) is the product without derivatives.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, bias, packed, multiply):
        return multiply(x, bias, packed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        bias, ctx.packed = inputs[1:3]
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        ctx.dtype = output.dtype

    @staticmethod
    def backward(ctx, grad):
        for_x = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = (grad.float() @ ctx.packed.dequantize()).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            shape, dtype = ctx.bias
            for_bias = grad.float().reshape(-1, grad.shape[-1]).sum(0).view(shape).to(dtype)
        return for_x, for_bias, None, None

    @staticmethod
    def jvp(ctx, x, bias, *_):
        change = 0 if x is None else x.float() @ ctx.packed.dequantize().T
        change = change if bias is None else change + bias.float()
        return change.to(ctx.dtype)
