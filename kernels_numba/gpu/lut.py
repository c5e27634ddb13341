"""The look-up kernel: products by tables of signed sums of activations, one look-up per plane and byte.

A thread block multiplies one panel (up to `panel_strips` strips of 16 rows in one row block) with its share of the
tiles of 256 columns. For a tile, lane l of every warp owns columns 8l … 8l+7: its tables hold all signed sums ±x of
those columns, entry e of lane l at word 32·e + l of shared memory, so a lane reads its own bank only and no look-up
waits for another. A warp then takes a strip, and for every plane, highest first, doubles its 16 sums and adds one entry
(width 8) or several (narrower tables) per row. The 16 sums are added over lanes by halves; alpha and beta come in where
a sum covers its segment. Nothing is added in an order that depends on timing: shares are written side by side and
`make_sum`'s kernel adds them in order, adds the bias, undoes the row permutation and rounds once.

Table widths: 8 is one table of 256 entries; 4 and 2 are two of 16 and four of 4; 6 does not divide the 8 columns of a
byte and is one of 64 and one of 4.

Source: CUDA.md section 5; METHOD 1.9. Differences: tables of ±x as everywhere in this package, sums over shares by a
second kernel in place of a counter, which two streams with one matrix would have to share.
"""

from __future__ import annotations

import functools

from numba import cuda, types

from kernels_numba.gpu.kinds import reader, writer
from kernels_numba.gpu.lut_tables import ENTRIES, builder, finder
from kernels_numba.gpu.primitives import (
    device,
    half_high,
    half_low,
    kernel,
    load_line,
    load_line_kept,
    load_word,
    shared_address,
    shuffle_xor,
)
from kernels_numba.gpu.records import LANE_COLUMNS, LANES, LINE_BYTES, STRIP_ROWS

SHARED_BYTES = 48 << 10  # what a block has without asking the driver for more
RESIDENT_WARPS = 16  # of a processor at least; with 24 some sums of a lane spill where nvJitLink assembles for 8.x
WARPS = 8  # of a block, where nothing else was measured
MASKS = {128: (8, 4, 2, 1), 64: (4, 2, 1, 8), 32: (2, 1, 4, 8)}  # lanes that add: first those of one segment

INT, U, L, F = types.int32, types.uint32, types.int64, types.float32


def panel_strips(tokens: int) -> int:
    """Most strips of a panel: their sums are kept in shared memory beside the tables."""
    return 32 if tokens <= 4 else 16


def shared_bytes(width: int, tokens: int) -> int:
    """Shared memory of a block: tables, sums of its rows, sums of the activations of a lane's segment."""
    return 4 * tokens * (ENTRIES[width] * LANES + panel_strips(tokens) * STRIP_ROWS + LANES)


def most_tokens(width: int) -> int:
    """Most tokens of one launch, at most 8: as many as have room for their tables."""
    return max(tokens for tokens in (1, 2, 4, 8) if shared_bytes(width, tokens) <= SHARED_BYTES)


@device
def halve(sums, count, lane, mask):
    """Add the sums of two lanes: each keeps `count` of them, the upper ones if its bit of the mask is set."""
    for i in range(count):
        upper, lower = sums[count + i], sums[i]
        kept, sent = (upper, lower) if lane & mask else (lower, upper)
        sums[i] = kept + shuffle_xor(sent, INT(mask))


@device
def load_scales(scales, record, count, words):
    """Load alpha and beta of the rows that a lane holds when they are needed, long before."""
    for i in range(count):
        words[i] = load_word(scales, record + L(4 * i))


@device
def scale(sums, count, words, total):
    """sums ← alpha·sums + beta·Σx for the rows that a lane holds."""
    for i in range(count):
        sums[i] = half_low(words[i]) * sums[i] + half_high(words[i]) * total


@functools.cache
def gatherer(kind: str):
    """Device function that loads the activations of a lane's 8 columns, zero where there is no column.

    No load waits for the answer of another: where there is no column the first activation is read and not used.
    """
    read = reader(kind)

    @device
    def gather(x, start, columns, limit, own):
        for i in range(8):
            column = columns[i]
            there = column < limit
            value = read(x, start + (column if there else U(0)))
            own[i] = value if there else F(0)

    return gather


@functools.cache
def make_kernel(width: int, tokens: int, kind: str, segment: int, warps: int = WARPS):
    """Return the kernel for one table width, number of tokens, kind of activations and width of segments.

    Its arguments are the arrays of `LutLayout`, panels int32 [panels, 4] (row block, first strip in it, strips, first
    strip of all), x [tokens, K], partial float32 [shares, tokens, strips·16], K, strips·16 and the number of tokens,
    which may be less than the kernel has tables for. Grid: panels × shares; 32·warps threads.
    """
    gather, build, find = gatherer(kind), builder(width, warps), finder(width)
    load = load_line if tokens == 1 else load_line_kept
    entries, strips = ENTRIES[width], panel_strips(tokens)
    table_size, sum_size, total_size = tokens * entries * LANES, tokens * strips * STRIP_ROWS, tokens * LANES
    threads = warps * LANES
    held = 128 // segment  # rows a lane holds when its sums cover a segment
    lanes = segment // LANE_COLUMNS
    first_mask, second_mask, third_mask, fourth_mask = MASKS[segment]
    tile_segments = LANES // lanes

    @kernel(threads, max(1, RESIDENT_WARPS // warps))
    def lut(lines, scales, tile_bits, tile_line, tile_record, segments, columns, block_tiles, panels, x, partial,
            in_features, rows, count):
        tables = cuda.shared.array(table_size, F)
        sums = cuda.shared.array(sum_size, F)
        totals = cuda.shared.array(total_size, F)
        own = cuda.local.array(8, F)
        own_columns = cuda.local.array(8, U)
        found = cuda.local.array(16, F)
        word = cuda.local.array(4, U)
        scale_words = cuda.local.array(held, U)
        ahead = cuda.local.array(4, U)
        thread = INT(cuda.threadIdx.x)
        lane, warp = INT(thread & 31), INT(thread >> 5)
        panel, share, shares = INT(4 * cuda.blockIdx.x), INT(cuda.blockIdx.y), INT(cuda.gridDim.y)
        block, first, height, place = panels[panel], panels[panel + 1], panels[panel + 2], panels[panel + 3]
        begin, number = block_tiles[block], block_tiles[block + 1] - block_tiles[block]
        tables_address = U(shared_address(tables) + U(4 * lane))
        for i in range(thread, sum_size, threads):
            sums[i] = F(0)
        many = count if tokens > 1 else INT(1)
        last = INT(first + height)
        for tile in range(INT(begin + number * share // shares), INT(begin + number * (share + 1) // shares)):
            bits, at = tile_bits[tile], segments[tile * tile_segments + lane // lanes]
            line = (L(tile_line[tile]) + L(INT(INT(first + warp) * bits))) * LINE_BYTES + lane * 16
            if warp < height:  # on its way while the tables are built
                ahead[0], ahead[1], ahead[2], ahead[3] = load(lines, line)
            limit, at = U(in_features if at >= 0 else 0), L(max(at, INT(0)) * segment + lane % lanes * 8) * 4
            own_columns[0], own_columns[1], own_columns[2], own_columns[3] = load_line_kept(columns, at)
            own_columns[4], own_columns[5], own_columns[6], own_columns[7] = load_line_kept(columns, at + 16)
            cuda.syncthreads()  # the tables of the tile before are read, the sums are zero
            for token in range(many):
                gather(x, L(token) * in_features, own_columns, limit, own)
                total = ((own[0] + own[1]) + (own[2] + own[3])) + ((own[4] + own[5]) + (own[6] + own[7]))
                build(tables, token * entries * LANES + lane, warp, own)
                if warp == token % warps:
                    for mask in (1, 2, 4, 8):
                        if mask < lanes:
                            total += shuffle_xor(total, INT(mask))
                    totals[token * LANES + lane] = total
            cuda.syncthreads()
            for strip in range(INT(first + warp), last, INT(warps)):
                load_scales(scales, (L(tile_record[tile] + strip) * LANES + lane) * (4 * held), held, scale_words)
                for token in range(many):
                    base = U(tables_address + U(token * entries * LANES * 4))
                    after = line if INT(token + 1) < many else line + L(bits) * (warps * LINE_BYTES)
                    follows = INT(token + 1) < many or INT(strip + warps) < last
                    for i in range(16):
                        found[i] = F(0)
                    for plane in range(bits):
                        for i in range(4):
                            word[i] = ahead[i]
                        within = INT(plane + 1) < bits
                        if within or follows:  # the next line is on its way while this one is looked up
                            source = line + L(INT(plane + 1) * LINE_BYTES) if within else after
                            ahead[0], ahead[1], ahead[2], ahead[3] = load(lines, source)
                        for i in range(4):
                            for j in range(4):
                                found[4 * i + j] = cuda.fma(found[4 * i + j], F(2), find(base, word[i], j))
                    line = after
                    total = totals[token * LANES + lane]
                    halve(found, 8, lane, first_mask)
                    halve(found, 4, lane, second_mask)
                    if held == 4:
                        scale(found, 4, scale_words, total)
                    halve(found, 2, lane, third_mask)
                    if held == 2:
                        scale(found, 2, scale_words, total)
                    halve(found, 1, lane, fourth_mask)
                    if held == 1:
                        scale(found, 1, scale_words, total)
                    value = found[0] + shuffle_xor(found[0], INT(16))
                    if lane < 16:
                        sums[INT(INT(INT(token * strips) + INT(strip - first)) * 16) + lane] += value
        cuda.syncthreads()
        row = 0
        for mask in (first_mask, second_mask, third_mask, fourth_mask):
            row = 2 * row + (1 if lane & mask else 0)
        for strip in range(warp, height, warps):
            for token in range(count):
                if lane < 16:
                    at = (L(share) * count + token) * rows + (place + first + strip) * 16 + row
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
        index = INT(cuda.grid(1))
        if index < rows * count:
            token, row = index // rows, index % rows
            natural = row_map[row]
            if natural >= 0:
                total = F(0)
                for share in range(shares):
                    total += partial[(L(share) * count + token) * rows + row]
                write(y, L(token) * out_features + natural, F(total + bias[natural]))

    return add_shares
