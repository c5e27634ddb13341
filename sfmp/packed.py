"""PackedMatrix: the stored form of one quantized matrix, and the account of its bytes (DESIGN §4,
format_version 1).

The codes of a block with b bits are cut into b planes (`sfmp.planes`). The weight is

    W ≈ alpha · Σ_k 2^k (2·plane_k − 1) + beta,      alpha = scale/2,   beta = scale((2^b − 1)/2 − zero)

so a kernel needs look-ups and additions only. Ragged edges are padded with zero bits; padded rows have no
alpha and no beta, which every backend reads as alpha = beta = 0. The layout is kernel-neutral: a backend
repacks the planes once and keeps its own form in ``PackedMatrix.cache``.
"""

from __future__ import annotations

import dataclasses
import operator

import numpy as np
import torch

from sfmp.planes import block_offsets, unpack_planes
from sfmp.spec import BlockGrid, SfmpError

TENSORS = ("planes", "alpha", "beta", "block_bits", "row_perm", "col_perm")  # stored, and the bias


@dataclasses.dataclass(eq=False)
class PackedMatrix:
    """One quantized matrix exactly as it is stored.

    Attributes
    ----------
    planes : int32 [words], all blocks one after the other
    alpha, beta : float16 [groups, N], permuted rows
    block_bits : uint8 [groups, row_blocks], each 1..8
    row_perm, col_perm : uint16 where it fits, else int32, [N] and [K]; ``W[row_perm][:, col_perm]`` is stored
    bias : floating [N], natural order, or None
    shape : (N, K) = (out_features, in_features)
    group_size, block_rows : int
    cache : dict, what a backend derived from the tensors: neither saved nor copied; read it through `derived`
    """

    planes: torch.Tensor
    alpha: torch.Tensor
    beta: torch.Tensor
    block_bits: torch.Tensor
    row_perm: torch.Tensor
    col_perm: torch.Tensor
    bias: torch.Tensor | None
    shape: tuple[int, int]
    group_size: int
    block_rows: int
    cache: dict = dataclasses.field(default_factory=dict, repr=False, init=False)

    @classmethod
    def from_tensors(cls, name, tensors, *, shape, group_size, block_rows, plane_words=None) -> PackedMatrix:
        """Build from stored tensors, after checking all of them.

        Parameters
        ----------
        name : str
            Used in messages, e.g. ``model.layers.0.mlp.up_proj``.
        tensors : mapping
            The names of `TENSORS` and optionally ``bias``.
        shape, group_size, block_rows, plane_words
            What the configuration says about this matrix.

        Raises
        ------
        SfmpError
            A tensor is missing or has a wrong dtype, size or value; the message names it.
        """
        from sfmp.checkpoint import check_tensors

        check_tensors(name, tensors, shape, group_size, block_rows, plane_words)
        stored = (tensors[key] for key in TENSORS)
        return cls(*stored, tensors.get("bias"), tuple(shape), group_size, block_rows)

    def __getstate__(self):
        return {**self.__dict__, "cache": {}}

    def derived(self) -> dict:
        """Return the cache, without what was derived from a tensor that was replaced or changed in place since.

        Inference tensors do not count their changes, and changes through ``.data`` are not counted: clear the cache
        after those.
        """
        self.cache = current_cache(self.cache, tuple(getattr(self, key) for key in TENSORS))
        return self.cache

    def source(self) -> tuple[tuple[torch.Tensor, ...], int | None]:
        """Return (stored tensors, how often all of them were changed in place or None if some do not count it)."""
        tensors = tuple(getattr(self, key) for key in TENSORS)
        return tensors, None if any(t.is_inference() for t in tensors) else sum(t._version for t in tensors)

    @property
    def grid(self) -> BlockGrid:
        return BlockGrid(*self.shape, self.block_rows, self.group_size)

    @property
    def groups(self) -> int:
        return self.grid.groups

    @property
    def row_blocks(self) -> int:
        return self.grid.row_blocks

    @property
    def device(self) -> torch.device:
        return self.planes.device

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the stored tensors by name; the bias only if there is one."""
        found = {key: getattr(self, key) for key in TENSORS}
        return found if self.bias is None else {**found, "bias": self.bias}

    def block_offsets(self) -> torch.Tensor:
        """Return the first word of each block and the total: int64 [groups·row_blocks + 1], in storage
        order."""
        return block_offsets(self.block_bits, self.group_size, self.block_rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, bias included."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def wbits(self) -> float:
        """Mean code bits over the real (unpadded) weights."""
        bits = self.block_bits.cpu().numpy().T
        return float((self.grid.weights * bits).sum() / (self.shape[0] * self.shape[1]))

    @property
    def bpw(self) -> float:
        """Bits per weight as the paper counts them: ``wbits`` + 32/group_size (METHOD §1.5)."""
        return self.wbits + 32 / self.group_size

    @property
    def bpw_stored(self) -> float:
        """Bits per weight from every stored byte: padding, bit map and permutations included, bias
        excluded."""
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return 8 * (self.nbytes - bias) / (self.shape[0] * self.shape[1])

    def unpack(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (codes uint8 [N, K], scales f32 [N, groups], zeros f32 [N, groups]), all in permuted order.

        Codes are exact; scales are exact where half of them is a float16. A zero is the integer that gives
        the stored ``beta``, within the rounding of alpha and beta, if there is one, else the real quotient
        (1-bit blocks have real zeros, so there only an integer that gives ``beta`` exactly is taken).

        Raises
        ------
        SfmpError
            alpha = 0 with beta ≠ 0, which no scale and zero express.
        """
        rows, columns = self.shape
        scales, beta = 2 * self.alpha.float(), self.beta.float()
        lost = (scales == 0) & (beta != 0)
        if lost.any():
            raise SfmpError(f"alpha: {int(lost.sum())} groups have alpha = 0 but beta ≠ 0, expected beta = 0 "
                            "there, because no scale and zero give that weight; use dequantize(), which "
                            "needs none")
        middle = self._levels() / 2
        zeros = middle - torch.where(scales == 0, 0, beta / torch.where(scales == 0, 1, scales))
        integer = zeros.round()
        value = scales * (middle - integer)
        rounding = _half_ulp(self.alpha) * 2 * (middle - integer).abs() + _half_ulp(self.beta)
        fits = (value.half() == self.beta) | ((middle > 0.5) & ((value - beta).abs() <= rounding))
        zeros = torch.where(fits, integer, zeros)
        zeros = torch.where(scales == 0, 0, zeros)
        return self._codes()[:rows, :columns].contiguous(), scales.T.contiguous(), zeros.T.contiguous()

    def dequantize(self) -> torch.Tensor:
        """Return W, float32 [N, K], natural order, on the device of the planes.

        alpha times an integer of at most 9 bits is exact in float32, so a weight carries one rounding: adding
        beta.
        """
        cache = self.derived()
        if "dequantize" not in cache:
            with torch.inference_mode(False):
                cache["dequantize"] = _inverse(self.row_perm), _inverse(self.col_perm), self._levels().T
        inverse_row, inverse_col, levels = cache["dequantize"]
        rows, columns = self.shape
        codes, alpha, beta = self._codes()[:rows], self.alpha.T.float(), self.beta.T.float()
        if inverse_row is not None:  # rows move as bytes, before they become floats
            codes = codes.index_select(0, inverse_row)
            alpha, beta, levels = alpha[inverse_row], beta[inverse_row], levels[inverse_row]
        weight = codes.view(rows, self.groups, self.group_size).float()
        weight.mul_(2).sub_(levels.unsqueeze(-1))  # Σ_k 2^k (2·plane_k − 1)
        weight.mul_(alpha.unsqueeze(-1)).add_(beta.unsqueeze(-1))
        weight = weight.view(rows, -1)
        if inverse_col is None:
            return weight[:, :columns].contiguous()
        return weight.index_select(1, inverse_col)

    def _codes(self) -> torch.Tensor:
        return unpack_planes(self.planes, self.block_bits, self.group_size, self.block_rows)

    def _levels(self) -> torch.Tensor:
        """2^b − 1 of each group and row, float32 [groups, N]."""
        levels = torch.exp2(self.block_bits.float()) - 1
        return levels.repeat_interleave(self.block_rows, dim=1)[:, : self.shape[0]]


def current_cache(cache: dict, tensors: tuple[torch.Tensor, ...]) -> dict:
    """Return the cache if it was filled from these tensors as they are now; else without what was derived.

    Changed tensors empty the cache, for all who share it. Other tensors get a cache of their own. What was asked for
    ("keep") stays.
    """
    now = tuple(map(version, tensors))
    before, versions = cache.get("source", (tensors, now))
    same = all(map(operator.is_, before, tensors))
    if not same or versions != now:
        asked = {key: cache[key] for key in ("keep",) if key in cache}
        cache = cache if same else {}
        cache.clear()
        cache.update(asked)
    cache["source"] = tensors, now
    return cache


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; 0 for inference tensors, which do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def _half_ulp(half: torch.Tensor) -> torch.Tensor:
    """Bound on the error of rounding a number to this float16, float32."""
    return (half.float().abs() * 2**-11).clamp_min(2**-25)


def permutation_dtype(size: int) -> type:
    """Return the stored type of a permutation of `size` indices: uint16 where every index fits, else
    int32."""
    return np.uint16 if size <= 1 << 16 else np.int32


def _inverse(perm: torch.Tensor) -> torch.Tensor | None:
    """The inverse permutation as int64, None for the identity."""
    perm = perm.long()
    inverse = torch.argsort(perm)
    return None if torch.equal(inverse, torch.arange(len(perm), device=perm.device)) else inverse
