"""Tables of signed sums in shared memory: how the warps of a block write them and how a lane looks up.

Entry e of the tables of lane l is word 32·e + l, so a lane reads its own bank only.
"""

from __future__ import annotations

import functools

from numba import types

from kernels_numba.gpu.primitives import (
    device,
    load_entry_0,
    load_entry_1,
    load_entry_2,
    load_entry_3,
    load_shared,
)
from kernels_numba.gpu.records import LANES

ENTRIES = {2: 16, 4: 32, 6: 68, 8: 256}  # of all tables of a lane

U, F = types.uint32, types.float32


@device
def signed(x, positive):
    """x or −x."""
    return x if positive else -x


@device
def fill_2(tables, at, x0, x1):
    """Write the 4 signed sums of two activations, one every 32 words."""
    for entry in range(4):
        tables[at + LANES * entry] = signed(x0, entry & 1) + signed(x1, entry & 2)


@device
def fill_4(tables, at, x0, x1, x2, x3, more):
    """Write the 16 signed sums of four activations, added to one number."""
    for high in range(4):
        base = more + (signed(x2, high & 1) + signed(x3, high & 2))
        for low in range(4):
            tables[at + LANES * (4 * high + low)] = base + (signed(x0, low & 1) + signed(x1, low & 2))


@functools.cache
def builder(width: int, warps: int):
    """Device function that writes the tables of one lane and token; the warps of the block share the entries."""

    @device
    def build_8(tables, at, warp, x):
        for high in range(warp, 16, warps):
            base = (signed(x[4], high & 1) + signed(x[5], high & 2)) + (signed(x[6], high & 4) + signed(x[7], high & 8))
            fill_4(tables, at + LANES * 16 * high, x[0], x[1], x[2], x[3], base)

    @device
    def build_6(tables, at, warp, x):
        for high in range(warp, 4, warps):
            base = signed(x[4], high & 1) + signed(x[5], high & 2)
            fill_4(tables, at + LANES * 16 * high, x[0], x[1], x[2], x[3], base)
        if warp == warps - 1:
            fill_2(tables, at + LANES * 64, x[6], x[7])

    @device
    def build_4(tables, at, warp, x):
        if warp == 0:
            fill_4(tables, at, x[0], x[1], x[2], x[3], F(0))
        if warp == warps - 1:
            fill_4(tables, at + LANES * 16, x[4], x[5], x[6], x[7], F(0))

    @device
    def build_2(tables, at, warp, x):
        if warp == 0:
            fill_2(tables, at, x[0], x[1])
            fill_2(tables, at + LANES * 4, x[2], x[3])
        if warp == warps - 1:
            fill_2(tables, at + LANES * 8, x[4], x[5])
            fill_2(tables, at + LANES * 12, x[6], x[7])

    return {8: build_8, 6: build_6, 4: build_4, 2: build_2}[width]


@functools.cache
def finder(width: int):
    """Device function (address of a lane's tables, word, byte of it) → signed sum that the byte selects.

    Bytes are literal numbers in the kernel, so that a choice by them costs nothing.
    """

    @device
    def entry(address, word, shift, mask):
        """An entry is 128 bytes from the next: an index is cut out where it stands, 7 places up."""
        moved = U(word >> U(shift - 7)) if shift >= 7 else U(word << U(7 - shift))
        return load_shared(U(address + U(moved & U(mask << 7))))

    @device
    def find_8(address, word, byte):
        if byte == 0:
            return load_entry_0(address, word)
        if byte == 1:
            return load_entry_1(address, word)
        if byte == 2:
            return load_entry_2(address, word)
        return load_entry_3(address, word)

    @device
    def find_6(address, word, byte):
        return entry(address, word, 8 * byte, 63) + entry(U(address + U(128 * 64)), word, 8 * byte + 6, 3)

    @device
    def find_4(address, word, byte):
        return entry(address, word, 8 * byte, 15) + entry(U(address + U(128 * 16)), word, 8 * byte + 4, 15)

    @device
    def find_2(address, word, byte):
        low = entry(address, word, 8 * byte, 3) + entry(U(address + U(128 * 4)), word, 8 * byte + 2, 3)
        third = entry(U(address + U(128 * 8)), word, 8 * byte + 4, 3)
        return low + (third + entry(U(address + U(128 * 12)), word, 8 * byte + 6, 3))

    return {8: find_8, 6: find_6, 4: find_4, 2: find_2}[width]
