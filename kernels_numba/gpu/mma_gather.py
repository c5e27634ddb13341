"""Activations in permuted order: what a lane gathers, and a kernel that gathers for all strips.

A warp takes 128 permuted columns of one token, a lane four of them. float16 numbers go as they are. bfloat16 numbers
are scaled by a power of two per segment, so that the largest is just below 2^14: float16 then holds them all but those
below 2^-28 of the largest, and none can overflow.
"""

from __future__ import annotations

import functools

from numba import cuda, types

from kernels_numba.gpu.primitives import (
    bfloat_value,
    device,
    float_bits,
    float_value,
    half_bits,
    half_low,
    load_line_kept,
    shuffle_xor,
    store_shared,
    store_shared_pair,
)

ARRANGE_WARPS = 8

INT, U, L, F = types.int32, types.uint32, types.int64, types.float32


@device
def read_columns(columns, part, parts, lane, names, slot):
    """Natural columns of the lane in part `part` of 128, −1 where there is none."""
    for i in range(4):
        names[4 * slot + i] = INT(-1)
    if part < parts:
        c0, c1, c2, c3 = load_line_kept(columns, (part * 128 + 4 * lane) * 4)
        names[4 * slot], names[4 * slot + 1] = INT(c0), INT(c1)
        names[4 * slot + 2], names[4 * slot + 3] = INT(c2), INT(c3)


@device
def read_numbers(x, base, names, name_slot, held, slot):
    """Bits of the numbers of those columns, 0 where there is none."""
    for i in range(4):
        name = names[4 * name_slot + i]
        bits = U(x[base + max(name, INT(0))])
        held[4 * slot + i] = bits if name >= 0 else U(0)


@functools.cache
def packer(kind: str, segment: int):
    """Device function (held, slot) → two words of float16, their sum over the segment, what one of them stands for."""
    lanes = segment // 4

    @device
    def pack_halves(held, slot):
        a, b, c, d = held[4 * slot], held[4 * slot + 1], held[4 * slot + 2], held[4 * slot + 3]
        total = (half_low(a) + half_low(b)) + (half_low(c) + half_low(d))
        for mask in (1, 2, 4, 8, 16):
            if mask < lanes:
                total += shuffle_xor(total, INT(mask))
        return U(a | U(b << U(16))), U(c | U(d << U(16))), total, F(1)

    @device
    def pack_bfloats(held, slot):
        most = F(0)
        for i in range(4):
            most = max(most, abs(bfloat_value(types.uint16(held[4 * slot + i]))))
        for mask in (1, 2, 4, 8, 16):
            if mask < lanes:
                most = max(most, shuffle_xor(most, INT(mask)))
        exponent = INT(U(float_bits(most) >> U(23)))  # biased
        exponent = min(max(exponent, INT(28)), INT(254))
        factor, unit = float_value(U(U(267 - exponent) << U(23))), float_value(U(U(exponent - 13) << U(23)))
        for i in range(4):
            held[4 * slot + i] = U(half_bits(F(bfloat_value(types.uint16(held[4 * slot + i])) * factor)))
        low, high, total, one = pack_halves(held, slot)
        return low, high, F(total * unit), unit

    return pack_bfloats if kind == "bfloat16" else pack_halves


@functools.cache
def make_arrange(kind: str, segment: int):
    """Return the kernel that writes arranged uint32 [tokens, length/2], two float16 a word, and sums of segments.

    totals and units float32 [tokens, length/segment] are Σx of a segment and, for bfloat16 only, what one stands for;
    length is that of `MmaLayout.columns`. Grid: (length/128 in blocks of `ARRANGE_WARPS` warps) × tokens.
    """
    pack, lanes, per_part = packer(kind, segment), segment // 4, 128 // segment
    scaled = kind == "bfloat16"

    @cuda.jit
    def arrange(x, columns, arranged, totals, units, in_features, length):
        names = cuda.local.array(4, INT)
        held = cuda.local.array(4, U)
        thread, token = INT(cuda.threadIdx.x), INT(cuda.blockIdx.y)
        lane, part, parts = thread & 31, INT(cuda.blockIdx.x) * ARRANGE_WARPS + (thread >> 5), length // 128
        if part < parts:
            read_columns(columns, part, parts, lane, names, 0)
            read_numbers(x, L(token) * in_features, names, 0, held, 0)
            low, high, total, unit = pack(held, 0)
            at = L(token) * (length // 2) + part * 64 + 2 * lane
            arranged[at], arranged[at + 1] = low, high
            if lane % lanes == 0:
                place = token * (length // segment) + part * per_part + lane // lanes
                totals[place] = total
                if scaled:
                    units[place] = unit

    return arrange


def row_bytes(length: int) -> int:
    """Bytes from token to token in shared memory; lanes of two tokens read from different banks."""
    return 2 * length + 64


def shared_bytes(kind: str, tokens: int, segment: int, length: int) -> int:
    """Shared memory that `gatherer` fills."""
    sums = length // segment * 4 * (2 if kind == "bfloat16" else 1)
    return tokens * (row_bytes(length) + sums)


@functools.cache
def gatherer(kind: str, tokens: int, segment: int, warps: int):
    """Device function that gathers all activations of 1, 2, 4 or 8 tokens into shared memory, by a block of warps.

    Its caller gives the address of `shared_bytes`, a multiple of 16, and room for 16 numbers of a lane twice, and waits
    for all warps. Returns shared addresses: float16 [tokens][`row_bytes`], totals and units as of `make_arrange`. Where
    there are fewer tokens the last one stands for those that are missing.
    """
    pack, lanes, per_part = packer(kind, segment), segment // 4, 128 // segment
    scaled = kind == "bfloat16"
    parts_at_once, tokens_at_once = max(1, 4 // tokens), min(tokens, 4)  # 16 loads of a lane are on their way
    rounds = tokens // tokens_at_once

    @device
    def put(address, totals, units, part, token, lane, length, held, slot):
        low, high, total, unit = pack(held, slot)
        store_shared_pair(U(address + U(token * (2 * length + 64) + part * 256 + 8 * lane)), low, high)
        if lane % lanes == 0:
            place = U(4 * (token * (length // segment) + part * per_part + lane // lanes))
            store_shared(U(totals + place), total)
            if scaled:
                store_shared(U(units + place), unit)

    @device
    def gather(x, columns, unused, address, names, held, warp, lane, in_features, length, count):
        totals = U(address + U(tokens * (2 * length + 64)))
        units = U(totals + U(tokens * 4 * (length // segment)))
        parts = length // 128
        for first in range(warp, parts, warps * parts_at_once):
            for i in range(parts_at_once):
                read_columns(columns, first + i * warps, parts, lane, names, i)
            for group in range(rounds):
                for i in range(parts_at_once):
                    for j in range(tokens_at_once):
                        token = min(group * tokens_at_once + j, count - 1)
                        read_numbers(x, L(token) * in_features, names, i, held, i * tokens_at_once + j)
                for i in range(parts_at_once):
                    part = first + i * warps
                    if part < parts:
                        for j in range(tokens_at_once):
                            put(address, totals, units, part, group * tokens_at_once + j, lane, length, held,
                                i * tokens_at_once + j)
        return address, totals, units

    return gather
