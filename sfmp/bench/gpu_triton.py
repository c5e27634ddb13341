"""A plain matrix-vector product in Triton that dequantizes integers of 2 or 4 bits: what a day's work gives.

Imported only where triton is installed. A word holds 32/bits codes of one row and one group; code j of word w belongs
to column j · words + w of the group, so that the activations of one j lie beside each other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

CONFIGS = [triton.Config({"ROWS": rows, "STEP": step}, num_warps=warps)
           for rows, step, warps in ((4, 8, 4), (8, 8, 4), (16, 4, 4), (16, 8, 8), (32, 2, 4), (32, 4, 8))]


@triton.jit
def multiply(words, scales, zeros, x, y, count, GROUPS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
             ROWS: tl.constexpr, STEP: tl.constexpr):
    """y [count] = Σ scale · (code − zero) · x; words [count, GROUPS · words], scales and zeros [count, GROUPS]."""
    PER: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = GROUP // PER
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = (row < count)[:, None]
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, GROUPS, STEP):
        word = first * WORDS + tl.arange(0, STEP * WORDS)
        group = word // WORDS
        inside = there & (group < GROUPS)[None, :]
        packed = tl.load(words + row[:, None] * (GROUPS * WORDS) + word[None, :], mask=inside, other=0)
        column = group * GROUP + word % WORDS
        dots = tl.zeros((ROWS, STEP * WORDS), tl.float32)
        sums = tl.zeros((STEP * WORDS,), tl.float32)
        for j in tl.static_range(PER):
            value = tl.load(x + column + j * WORDS, mask=group < GROUPS, other=0.0).to(tl.float32)
            dots += ((packed >> (BITS * j)) & ((1 << BITS) - 1)).to(tl.float32) * value[None, :]
            sums += value
        place = row[:, None] * GROUPS + group[None, :]
        scale = tl.load(scales + place, mask=inside, other=0.0).to(tl.float32)
        zero = tl.load(zeros + place, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(scale * (dots - zero * sums[None, :]), axis=1)
    tl.store(y + row, total, mask=row < count)


_tuned = triton.autotune(CONFIGS, key=["count", "GROUPS"])(multiply)


def pack(codes: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """Codes uint8 [N, K] → int32 words [N, K · bits / 32]."""
    per = 32 // bits
    fields = codes.view(len(codes), -1, per, group_size // per).long()
    words = (fields << (torch.arange(per, device=codes.device) * bits)[:, None]).sum(2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).view(len(codes), -1)


def product(x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int,
            group_size: int) -> torch.Tensor:
    """x [1, K] times the dequantized weight: [1, N], in the dtype of x."""
    count, groups = scales.shape
    y = x.new_empty(1, count)
    _tuned[lambda meta: (triton.cdiv(count, meta["ROWS"]),)](words, scales, zeros, x, y, count, GROUPS=groups,
                                                             BITS=bits, GROUP=group_size)
    return y
