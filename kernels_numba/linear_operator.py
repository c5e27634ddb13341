"""What torch is told about an operator that multiplies by a packed weight: shapes, work, batches.

The operator takes (x, image, bias, rows, *rest): x [..., K], an opaque tensor of the weight, bias [rows] or None.
"""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from sfmp.checks import SfmpError


def readable_bias(bias, rows: int, device, kinds):
    """The bias as kernels read it: contiguous, of a dtype in `kinds`, else float32.

    Raises
    ------
    SfmpError
        Wrong device, size or layout.
    """
    if bias is None:
        return None
    if bias.device != device:
        raise SfmpError(f"bias: expected device {device} like x, found {bias.device}; move it")
    if bias.numel() != rows or bias.layout != torch.strided:
        raise SfmpError(f"bias: expected a dense [{rows}], found {bias.layout} {list(bias.shape)}; check out_features")
    return (bias if bias.dtype in kinds else bias.float()).reshape(-1).contiguous()


def describe(library, name: str, kinds) -> None:
    """Register shapes for tracing, a formula for ``torch.utils.flop_counter`` and a rule for ``torch.vmap``.

    Parameters
    ----------
    library : torch.library.Library that defines sfmp::name
    name : str
    kinds : dtypes of a bias that are read as they are
    """
    packet = getattr(torch.ops.sfmp, name)
    operator = packet.default

    @torch.library.register_fake(f"sfmp::{name}", lib=library)
    def fake(x, image, bias, rows, *rest):
        readable_bias(bias, rows, x.device, kinds)
        return x.new_empty((*x.shape[:-1], rows))

    @register_flop_formula(packet)
    def flops(x, image, bias, rows, *_, **__):
        """From the shapes: as for the dequantized weight."""
        return 2 * math.prod(x) * rows

    @torch.library.register_vmap(f"sfmp::{name}", lib=library)
    def batched(info, where, x, image, bias, *rest):
        """One product for the whole batch, whose dimension becomes the first of x."""
        if where[1] is not None:
            raise SfmpError("image: expected one weight for the whole batch, found a batch of weights; loop over them")
        if where[0] is None:
            x = x.expand(info.batch_size, *x.shape)
        else:
            x = x.movedim(where[0], 0)
        if where[2] is None:
            return operator(x, image, bias, *rest), 0
        y, bias = operator(x, image, None, *rest), bias.movedim(where[2], 0)
        return y + bias.view(len(bias), *[1] * (y.dim() - 2), -1).to(y.dtype), 0
