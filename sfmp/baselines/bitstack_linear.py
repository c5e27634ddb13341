"""BitStackLinear: a linear layer whose weight is a stack of levels, each sign bits times a product of low rank.

    W[n, c] = sum over levels l of  sign_l[n, c] * (left_l @ right_l)[n, c]

Like the publication's, the layer infers by dequantizing and multiplying. Source: METHOD.md section 2.5.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from sfmp.checks import SfmpError
from sfmp.linear import StoredLinear


def pack_signs(positive: torch.Tensor) -> torch.Tensor:
    """Pack bool [..., K] into uint8 [..., ceil(K / 8)]: column c is bit c % 8 of byte c // 8, padding is zero."""
    bits = positive.cpu().numpy()
    return torch.from_numpy(np.packbits(bits, axis=-1, bitorder="little")).to(positive.device)


def unpack_signs(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Return float32 [..., columns] of +1 and -1 from bits packed by `pack_signs`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[..., None] >> shifts) & 1
    return bits.flatten(-2)[..., :columns].to(torch.float32) * 2 - 1


class BitStackLinear(StoredLinear):
    """Drop-in for ``nn.Linear``: y = x Wᵀ + bias with W the sum of the loaded levels.

    Parameters
    ----------
    signs : uint8 [levels, N, ceil(K / 8)]
        A set bit is +1.
    left : float16 [levels, N, k]
    right : float16 [levels, k, K]
    bias : floating [N], optional
    in_features : int
        K; the packed bits alone leave it open.

    Notes
    -----
    x is [..., K] in any floating dtype; y has the dtype of x. On the CPU the product is taken in float32
    (float64 for float64 x), on other devices in the dtype of x, as `SFMPLinear` does.
    """

    stored = ("signs", "left", "right")

    def __init__(self, signs, left, right, bias=None, *, in_features: int):
        super().__init__()
        self.levels, self.out_features, self.rank = left.shape
        self.in_features = in_features
        for key, tensor in zip(self.stored, (signs, left, right), strict=True):
            self.register_buffer(key, tensor)
        self.register_buffer("bias", bias)
        self._cache = {}

    @classmethod
    def empty(cls, out_features, in_features, *, levels, rank, bias=False, device=None) -> BitStackLinear:
        """Return a layer with unset buffers of the right dtypes and sizes, for a checkpoint loader to fill."""
        shapes = layout(out_features, in_features, levels, rank, bias)
        empty = {key: torch.empty(shape, dtype=dtype, device=device) for key, (dtype, shape) in shapes.items()}
        return cls(empty["signs"], empty["left"], empty["right"], empty.get("bias"), in_features=in_features)

    def dequantize(self) -> torch.Tensor:
        """Return W, float32 [N, K]: the levels summed from the first to the last."""
        weight = torch.zeros(self.out_features, self.in_features, device=self.signs.device)
        for signs, left, right in zip(self.signs, self.left, self.right, strict=True):
            weight += unpack_signs(signs, self.in_features) * (left.float() @ right.float())
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 0 or x.shape[-1] != self.in_features or not x.is_floating_point():
            raise SfmpError(f"x: expected floating [..., {self.in_features}], found {x.dtype} {list(x.shape)}; "
                            "check in_features")
        dtype = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return nn.functional.linear(x.to(dtype), self._weight().to(dtype), bias).to(x.dtype)

    def _weight(self):
        weight = self._cache.get("weight")
        if weight is None:
            keep = self._cache.get("keep", False)
            with torch.inference_mode(torch.is_inference_mode_enabled() and not keep):
                weight = self.dequantize()
            if keep:
                self._cache["weight"] = weight
        return weight

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, "
                f"bias={self.bias is not None}, levels={self.levels}, rank={self.rank}")


def layout(out_features: int, in_features: int, levels: int, rank: int, bias: bool = False) -> dict[str, tuple]:
    """Return the (dtype, shape) of each stored tensor; the dtype of a bias is the model's (None)."""
    shapes = {"signs": (torch.uint8, (levels, out_features, -(-in_features // 8))),
              "left": (torch.float16, (levels, out_features, rank)),
              "right": (torch.float16, (levels, rank, in_features))}
    return {**shapes, "bias": (None, (out_features,))} if bias else shapes


def level_bytes(out_features: int, in_features: int, rank: int) -> int:
    """Bytes of one level: a bit per weight, rows padded to whole bytes, and two float16 factors.

    For K a multiple of 8 that is 1 + 16 k (N + K) / (N K) bits per weight (METHOD.md section 2.5).
    """
    return out_features * -(-in_features // 8) + 2 * rank * (out_features + in_features)
