"""The look-up kernel: products by tables of signed sums of activations, one look-up per plane and byte.

A thread block multiplies one panel (up to `panel_strips` strips of 16 rows in one row block) with its share of the tiles
of 256 columns. For a tile, lane l of every warp owns columns 8l … 8l+7: its tables hold all signed sums ±x of those
columns, entry e of lane l at word 32·e + l of shared memory, so a lane reads its own bank only and no look-up waits for
another. A warp then takes a strip, and for every plane, highest first, doubles its 16 sums and adds one entry (width 8)
or several (narrower tables) per row. The 16 sums are added over lanes by halves; alpha and beta come in where a sum
covers its segment. Nothing is added in an order that depends on timing: shares are written side by side and
`add_shares` adds them in order, adds the bias, undoes the row permutation and rounds once.

Table widths: 8 is one table of 256 entries; 4 and 2 are two of 16 and four of 4; 6 does not divide the 8 columns of a
byte and is one of 64 and one of 4.

Source: CUDA.md section 5; METHOD 1.9. Differences: tables of ±x as everywhere in this package, sums over shares by a
second kernel in place of a counter, which two streams with one matrix would have to share.
"""

from __future__ import annotations

import functools

from numba import cuda, types

from kernels_numba.gpu.lut_layout import LANE_COLUMNS, LANES, LINE_BYTES, STRIP_ROWS
from kernels_numba.gpu.primitives import (
    bfloat_bits,
    bfloat_value,
    half_bits,
    half_high,
    half_low,
    load_line,
    load_line_kept,
    load_shared,
    load_word,
    shared_address,
    shuffle_xor,
)

ENTRIES = {2: 16, 4: 32, 6: 68, 8: 256}  # of all tables of a lane
SHARED_BYTES = 48 << 10  # what a block has without asking the driver for more
WARPS = 8
THREADS = WARPS * LANES
MASKS = {128: (8, 4, 2, 1), 64: (4, 2, 1, 8), 32: (2, 1, 4, 8)}  # lanes that add: first those of one segment
KINDS = ("float16", "bfloat16", "float32")  # of activations and results

I, U, L, F = types.int32, types.uint32, types.int64, types.float32


def panel_strips(tokens: int) -> int:
    """Most strips of a panel: their sums are kept in shared memory beside the tables."""
    return 32 if tokens <= 4 else 16


def shared_bytes(width: int, tokens: int) -> int:
    """Shared memory of a block: tables, sums of its rows, sums of the activations of a lane's segment."""
    return 4 * tokens * (ENTRIES[width] * LANES + panel_strips(tokens) * STRIP_ROWS + LANES)


def most_tokens(width: int) -> int:
    """Most tokens of one launch, at most 8: as many as have room for their tables."""
    return max(tokens for tokens in (1, 2, 4, 8) if shared_bytes(width, tokens) <= SHARED_BYTES)


@functools.cache
def reader(kind: str):
    """Device function (pointer, index) → float32; half-precision numbers are passed as uint16."""

    @cuda.jit(device=True)
    def read_half(pointer, index):
        return half_low(U(pointer[index]))

    @cuda.jit(device=True)
    def read_bfloat(pointer, index):
        return bfloat_value(pointer[index])

    @cuda.jit(device=True)
    def read_float(pointer, index):
        return pointer[index]

    return dict(zip(KINDS, (read_half, read_bfloat, read_float), strict=True))[kind]


@functools.cache
def writer(kind: str):
    """Device function (pointer, index, float32); half-precision numbers are passed as uint16."""

    @cuda.jit(device=True)
    def write_half(pointer, index, value):
        pointer[index] = half_bits(value)

    @cuda.jit(device=True)
    def write_bfloat(pointer, index, value):
        pointer[index] = bfloat_bits(value)

    @cuda.jit(device=True)
    def write_float(pointer, index, value):
        pointer[index] = value

    return dict(zip(KINDS, (write_half, write_bfloat, write_float), strict=True))[kind]


@cuda.jit(device=True)
def signed(x, positive):
    """x or −x."""
    return x if positive else -x


@cuda.jit(device=True)
def fill_2(tables, at, x0, x1):
    """Write the 4 signed sums of two activations, one every 32 words."""
    for entry in range(4):
        tables[at + LANES * entry] = signed(x0, entry & 1) + signed(x1, entry & 2)


@cuda.jit(device=True)
def fill_4(tables, at, x0, x1, x2, x3, more):
    """Write the 16 signed sums of four activations, added to one number."""
    for high in range(4):
        base = more + (signed(x2, high & 1) + signed(x3, high & 2))
        for low in range(4):
            tables[at + LANES * (4 * high + low)] = base + (signed(x0, low & 1) + signed(x1, low & 2))


@functools.cache
def builder(width: int):
    """Device function that writes the tables of one lane and token; the warps of the block share the entries."""

    @cuda.jit(device=True)
    def build_8(tables, at, warp, x):
        for high in range(warp, 16, WARPS):
            base = (signed(x[4], high & 1) + signed(x[5], high & 2)) + (signed(x[6], high & 4) + signed(x[7], high & 8))
            fill_4(tables, at + LANES * 16 * high, x[0], x[1], x[2], x[3], base)

    @cuda.jit(device=True)
    def build_6(tables, at, warp, x):
        if warp < 4:
            base = signed(x[4], warp & 1) + signed(x[5], warp & 2)
            fill_4(tables, at + LANES * 16 * warp, x[0], x[1], x[2], x[3], base)
        elif warp == 4:
            fill_2(tables, at + LANES * 64, x[6], x[7])

    @cuda.jit(device=True)
    def build_4(tables, at, warp, x):
        if warp == 0:
            fill_4(tables, at, x[0], x[1], x[2], x[3], F(0))
        elif warp == 1:
            fill_4(tables, at + LANES * 16, x[4], x[5], x[6], x[7], F(0))

    @cuda.jit(device=True)
    def build_2(tables, at, warp, x):
        if warp == 0:
            fill_2(tables, at, x[0], x[1])
            fill_2(tables, at + LANES * 4, x[2], x[3])
        elif warp == 1:
            fill_2(tables, at + LANES * 8, x[4], x[5])
            fill_2(tables, at + LANES * 12, x[6], x[7])

    return {8: build_8, 6: build_6, 4: build_4, 2: build_2}[width]


@functools.cache
def finder(width: int):
    """Device function (address of a lane's tables, word, first bit) → signed sum that a byte of the word selects.

    An entry is 128 bytes from the next, so an index is shifted by 7 places, and by no more than one instruction moves.
    """

    @cuda.jit(device=True)
    def field(word, shift, mask):
        moved = U(word >> U(shift - 7)) if shift >= 7 else U(word << U(7 - shift))
        return U(moved & U(mask << 7))

    @cuda.jit(device=True)
    def find_8(address, word, shift):
        return load_shared(U(address + field(word, shift, 255)))

    @cuda.jit(device=True)
    def find_6(address, word, shift):
        low = load_shared(U(address + field(word, shift, 63)))
        return low + load_shared(U(address + U(128 * 64) + field(word, shift + 6, 3)))

    @cuda.jit(device=True)
    def find_4(address, word, shift):
        low = load_shared(U(address + field(word, shift, 15)))
        return low + load_shared(U(address + U(128 * 16) + field(word, shift + 4, 15)))

    @cuda.jit(device=True)
    def find_2(address, word, shift):
        low = load_shared(U(address + field(word, shift, 3)))
        low += load_shared(U(address + U(128 * 4) + field(word, shift + 2, 3)))
        high = load_shared(U(address + U(128 * 8) + field(word, shift + 4, 3)))
        return low + (high + load_shared(U(address + U(128 * 12) + field(word, shift + 6, 3))))

    return {8: find_8, 6: find_6, 4: find_4, 2: find_2}[width]


@cuda.jit(device=True)
def halve(sums, count, lane, mask):
    """Add the sums of two lanes: each keeps `count` of them, the upper ones if its bit of the mask is set."""
    for i in range(count):
        upper, lower = sums[count + i], sums[i]
        kept, sent = (upper, lower) if lane & mask else (lower, upper)
        sums[i] = kept + shuffle_xor(sent, I(mask))


@cuda.jit(device=True)
def scale(sums, count, scales, offset, total):
    """sums ← alpha·sums + beta·Σx for the rows that a lane holds."""
    for i in range(count):
        word = load_word(scales, offset + L(4 * i))
        sums[i] = half_low(word) * sums[i] + half_high(word) * total


@functools.cache
def make_kernel(width: int, tokens: int, kind: str, segment: int):
    """Return the kernel for one table width, number of tokens, kind of activations and width of segments.

    Its arguments are the arrays of `LutLayout`, panels int32 [panels, 4] (row block, first strip in it, strips, first
    strip of all), x [tokens, K], partial float32 [shares, tokens, strips·16], K, strips·16 and the number of tokens,
    which may be less than the kernel has tables for. Grid: panels × shares; `THREADS` threads.
    """
    read, build, find = reader(kind), builder(width), finder(width)
    load = load_line if tokens == 1 else load_line_kept
    entries, strips = ENTRIES[width], panel_strips(tokens)
    table_size, sum_size, total_size = tokens * entries * LANES, tokens * strips * STRIP_ROWS, tokens * LANES
    held = 128 // segment  # rows a lane holds when its sums cover a segment
    lanes = segment // LANE_COLUMNS
    first_mask, second_mask, third_mask, fourth_mask = MASKS[segment]
    tile_segments = LANES // lanes

    @cuda.jit
    def lut(lines, scales, tile_bits, tile_line, tile_record, segments, columns, block_tiles, panels, x, partial,
            in_features, rows, count):
        tables = cuda.shared.array(table_size, F)
        sums = cuda.shared.array(sum_size, F)
        totals = cuda.shared.array(total_size, F)
        own = cuda.local.array(8, F)
        found = cuda.local.array(16, F)
        word = cuda.local.array(4, U)
        ahead = cuda.local.array(4, U)
        thread = I(cuda.threadIdx.x)
        lane, warp = I(thread & 31), I(thread >> 5)
        panel, share, shares = I(4 * cuda.blockIdx.x), I(cuda.blockIdx.y), I(cuda.gridDim.y)
        block, first, height, place = panels[panel], panels[panel + 1], panels[panel + 2], panels[panel + 3]
        begin, number = block_tiles[block], block_tiles[block + 1] - block_tiles[block]
        base = U(shared_address(tables) + U(4 * lane))
        for i in range(thread, sum_size, THREADS):
            sums[i] = F(0)
        for tile in range(begin + number * share // shares, begin + number * (share + 1) // shares):
            cuda.syncthreads()  # the tables of the tile before are read, the sums are zero
            which = segments[tile * tile_segments + lane // lanes]
            for token in range(count):
                total = F(0)
                for i in range(8):
                    own[i] = F(0)
                    if which >= 0:
                        column = columns[which * segment + lane % lanes * 8 + i]
                        if column >= 0:
                            own[i] = read(x, L(token) * in_features + column)
                    total += own[i]
                build(tables, token * entries * LANES + lane, warp, own)
                if warp == token:
                    for mask in (1, 2, 4, 8):
                        if mask < lanes:
                            total += shuffle_xor(total, I(mask))
                    totals[token * LANES + lane] = total
            cuda.syncthreads()
            bits = tile_bits[tile]
            for strip in range(first + warp, first + height, WARPS):
                line = (L(tile_line[tile]) + strip * bits) * LINE_BYTES + lane * 16
                record = ((L(tile_record[tile]) + strip) * LANES + lane) * (4 * held)
                for token in range(count):
                    address = U(base + U(token * entries * LANES * 4))
                    for i in range(16):
                        found[i] = F(0)
                    ahead[0], ahead[1], ahead[2], ahead[3] = load(lines, line)
                    for plane in range(bits):
                        for i in range(4):
                            word[i] = ahead[i]
                        if plane + 1 < bits:  # the next plane is on its way while this one is looked up
                            ahead[0], ahead[1], ahead[2], ahead[3] = load(lines, line + (plane + 1) * LINE_BYTES)
                        for i in range(4):
                            for j in range(4):
                                doubled = found[4 * i + j] + found[4 * i + j]
                                found[4 * i + j] = doubled + find(address, word[i], 8 * j)
                    total = totals[token * LANES + lane]
                    halve(found, 8, lane, first_mask)
                    halve(found, 4, lane, second_mask)
                    if held == 4:
                        scale(found, 4, scales, record, total)
                    halve(found, 2, lane, third_mask)
                    if held == 2:
                        scale(found, 2, scales, record, total)
                    halve(found, 1, lane, fourth_mask)
                    if held == 1:
                        scale(found, 1, scales, record, total)
                    value = found[0] + shuffle_xor(found[0], I(16))
                    if lane < 16:
                        sums[(token * strips + strip - first) * 16 + lane] += value
        cuda.syncthreads()
        row = 0
        for mask in (first_mask, second_mask, third_mask, fourth_mask):
            row = 2 * row + (1 if lane & mask else 0)
        for strip in range(warp, height, WARPS):
            for token in range(count):
                if lane < 16:
                    at = (L(share) * count + token) * rows + (place + strip) * 16 + row
                    partial[at] = sums[(token * strips + strip) * 16 + lane]

    return lut


@functools.cache
def make_sum(kind: str):
    """Return the kernel that adds the shares of every result in order.

    y[token, row_map[row]] = Σ_shares partial[share, token, row] + bias. Grid: enough threads for strips·16 × tokens.
    """
    write = writer(kind)

    @cuda.jit
    def add_shares(partial, row_map, bias, y, out_features, rows, count, shares):
        index = I(cuda.grid(1))
        if index < rows * count:
            token, row = index // rows, index % rows
            natural = row_map[row]
            if natural >= 0:
                total = F(0)
                for share in range(shares):
                    total += partial[(L(share) * count + token) * rows + row]
                write(y, L(token) * out_features + natural, F(total + bias[natural]))

    return add_shares
