"""The tensor-core kernel: codes become float16 by one mask and one product, tensor cores add in float32.

`make_arrange`'s kernel first writes the activations of every token in permuted order, as float16 scaled by a power of
two so that none overflows, with their sums over segments. Then a thread block multiplies one strip of 32 rows; its
warps take the tiles in turn, and their sums are added in order. W = 2·alpha·q + beta − (2^b − 1)·alpha, so for a
segment  y += 2·alpha·Σ q·x + (beta − (2^b − 1)·alpha)·Σ x,  and 2^-10 of the codes is made good in alpha.

Source: CUDA.md sections 4.2–4.5. Differences: activations are arranged by a kernel of their own and read through the
level-1 cache, at every number of tokens.
"""

from __future__ import annotations

import functools

from numba import cuda, types

from kernels_numba.gpu.kinds import reader, writer
from kernels_numba.gpu.mma_codes import loader, stepper
from kernels_numba.gpu.primitives import (
    device,
    float_bits,
    float_value,
    half_bits,
    half_high,
    half_low,
    kernel,
    load_line,
    load_line_kept,
    shuffle_xor,
)

KINDS = ("float16", "bfloat16")  # float32 activations would lose half of their digits
TOKENS = 8  # of a tensor-core tile
MOST_TOKENS = 32
WARPS = 8
MANY_WARPS, FEW_WARPS = 16, 8  # that run together on a processor: how many registers a lane may have
ARRANGE_WARPS = 8

INT, U, L, F = types.int32, types.uint32, types.int64, types.float32


@functools.cache
def make_arrange(kind: str, segment: int, warps: int = ARRANGE_WARPS):
    """Return the kernel that writes arranged float16 [tokens, length], their sums [tokens, length/segment] and factors.

    length is that of `MmaLayout.columns`. Grid: a block of 32·warps threads per token.
    """
    read = reader(kind)
    threads = 32 * warps

    @cuda.jit
    def arrange(x, columns, arranged, totals, factors, in_features, length):
        largest = cuda.shared.array(warps, F)
        thread, token = INT(cuda.threadIdx.x), INT(cuda.blockIdx.x)
        lane, warp = thread & 31, thread >> 5
        most = F(0)
        for i in range(thread, in_features, threads):
            most = max(most, abs(read(x, L(token) * in_features + i)))
        for mask in (16, 8, 4, 2, 1):
            most = max(most, shuffle_xor(most, INT(mask)))
        if lane == 0:
            largest[warp] = most
        cuda.syncthreads()
        for i in range(warps):
            most = max(most, largest[i])
        exponent = INT(float_bits(most) >> U(23))  # biased; scaled activations are below 2^14
        exponent = min(max(exponent, INT(28)), INT(254))
        factor = float_value(U(U(267 - exponent) << U(23)))
        if thread == 0:
            factors[token] = float_value(U(U(exponent - 13) << U(23)))
        for part in range(warp, length // segment, warps):
            total = F(0)
            for i in range(segment // 32):
                at = part * segment + 32 * i + lane
                column = columns[at]
                value = F(0)
                if column >= 0:
                    value = F(read(x, L(token) * in_features + column) * factor)
                bits = half_bits(value)
                arranged[L(token) * length + at] = bits
                total += half_low(U(bits))
            for mask in (16, 8, 4, 2, 1):
                total += shuffle_xor(total, INT(mask))
            if lane == 0:
                totals[token * (length // segment) + part] = total

    return arrange


@functools.cache
def unit(width: int, tiles: int, segment: int):
    """Device function that adds the products of one unit of any width to the results of a lane."""
    low, high = min(width, 4), max(width - 4, 1)  # where there is no high part, the code for it is never reached
    load_low, load_high = loader(low), loader(high)
    step_low, step_high = stepper(low, tiles), stepper(high, tiles)
    levels, both = float((1 << width) - 1), width > 4
    blocks = segment // 32  # of 32 columns in a segment

    @device
    def block(i, words, more, arranged, length, lane, number, b, sums, high_sums):
        for tile in range(tiles):
            at = (L(8 * tile + lane // 4) * length + number * segment + i % blocks * 32 + 8 * (lane % 4)) * 2
            b[4 * tile], b[4 * tile + 1], b[4 * tile + 2], b[4 * tile + 3] = load_line_kept(arranged, at)
        step_low(words, i, b, sums)
        if both:
            step_high(more, i, b, high_sums)

    @device
    def fold_tile(tile, word, totals, parts, number, lane, sums, high_sums, results):
        for rho in range(4):
            alpha, beta = half_low(word[rho]), half_high(word[rho])
            slope, shift = alpha * F(2048), beta - F(levels) * alpha
            for e in range(2):
                at = 8 * tile + 2 * rho + e
                total = totals[(8 * tile + 2 * (lane % 4) + e) * parts + number]
                value = sums[at]
                if both:
                    value += F(16) * high_sums[at]
                    high_sums[at] = F(0)
                sums[at] = F(0)
                results[at] += slope * value + shift * total

    @device
    def fold(scales, record, totals, parts, number, lane, sums, high_sums, results):
        """results += 2·alpha·sums + (beta − (2^b − 1)·alpha)·Σx, and sums ← 0."""
        word = load_line(scales, (record * 32 + lane // 4 * 4) * 4)
        fold_tile(0, word, totals, parts, number, lane, sums, high_sums, results)
        if tiles > 1:
            fold_tile(1, word, totals, parts, number, lane, sums, high_sums, results)
        if tiles > 2:
            fold_tile(2, word, totals, parts, number, lane, sums, high_sums, results)
            fold_tile(3, word, totals, parts, number, lane, sums, high_sums, results)

    @device
    def quarter(i, first, scales, record, arranged, totals, length, segments, lane, words, more, b, sums, high_sums,
                results):
        number = segments[first + i // blocks]
        block(i, words, more, arranged, length, lane, number, b, sums, high_sums)
        if i % blocks == blocks - 1:
            fold(scales, record + i // blocks, totals, length // segment, number, lane, sums, high_sums, results)

    @device
    def add(units, at, first, scales, record, arranged, totals, length, segments, lane, words, more, b, sums, high_sums,
            results):
        load_low(units, at, words)
        if both:
            load_high(units, at + 4 * 512, more)
        quarter(0, first, scales, record, arranged, totals, length, segments, lane, words, more, b, sums, high_sums,
                results)
        quarter(1, first, scales, record, arranged, totals, length, segments, lane, words, more, b, sums, high_sums,
                results)
        quarter(2, first, scales, record, arranged, totals, length, segments, lane, words, more, b, sums, high_sums,
                results)
        quarter(3, first, scales, record, arranged, totals, length, segments, lane, words, more, b, sums, high_sums,
                results)

    return add


@device
def absent(units, at, first, scales, record, arranged, totals, length, segments, lane, words, more, b, sums, high_sums,
           results):
    """Stands for a width that does not occur in the matrix."""


@device
def clear(tile, sums, high_sums, results):
    """Zero what a lane holds of one tile of tokens; loops over all tiles are too long for compilers to unroll."""
    for i in range(8):
        sums[8 * tile + i] = F(0)
        high_sums[8 * tile + i] = F(0)
        results[8 * tile + i] = F(0)


@device
def put(tile, shared, place, results):
    """Write the results of one tile of tokens, [token][row]."""
    for rho in range(4):
        for e in range(2):
            shared[place + 256 * tile + 32 * e + 8 * rho] = results[8 * tile + 2 * rho + e]


@functools.cache
def make_kernel(widths: tuple[int, ...], tiles: int, kind: str, segment: int, warps: int = WARPS):
    """Return the kernel for some bit-widths, 8·tiles tokens, a kind of results and a width of segments.

    Its arguments are arrays of `MmaLayout`, what `make_arrange`'s kernel wrote with room for 8·tiles tokens, bias
    float32 [N], y [tokens, N], N, length and the number of tokens. Grid: a block of 32·warps threads per strip.
    """
    write = writer(kind)
    add_1, add_2, add_3, add_4, add_5, add_6, add_7, add_8 = (
        unit(width, tiles, segment) if width in widths else absent for width in range(1, 9))
    threads, size, per_unit = 32 * warps, 32 * TOKENS * tiles, 128 // segment
    shared_size, fragments = size * warps, 4 * tiles
    held = 8 * tiles
    resident = MANY_WARPS if tiles < 4 and max(widths) <= 4 else FEW_WARPS

    @kernel(threads, max(1, resident // warps))
    def mma(units, scales, tile_bits, tile_chunk, segments, block_tiles, strip_block, strip_chunk, strip_record, rows,
            arranged, totals, factors, bias, y, out_features, length, count):
        shared = cuda.shared.array(shared_size, F)
        words = cuda.local.array(16, U)
        more = cuda.local.array(16, U)
        b = cuda.local.array(fragments, U)
        sums = cuda.local.array(held, F)
        high_sums = cuda.local.array(held, F)
        results = cuda.local.array(held, F)
        thread, strip = INT(cuda.threadIdx.x), INT(cuda.blockIdx.x)
        lane, warp = INT(thread & 31), INT(thread >> 5)
        clear(0, sums, high_sums, results)
        if tiles > 1:
            clear(1, sums, high_sums, results)
        if tiles > 2:
            clear(2, sums, high_sums, results)
            clear(3, sums, high_sums, results)
        begin, end = block_tiles[strip_block[strip]], block_tiles[strip_block[strip] + 1]
        for tile in range(begin + warp, end, warps):
            bits, first = tile_bits[tile], tile * per_unit
            at = (L(strip_chunk[strip]) + tile_chunk[tile]) * 512 + lane * 16
            record = L(strip_record[strip]) + (tile - begin) * per_unit
            if bits == 1:
                add_1(units, at, first, scales, record, arranged, totals, length, segments, lane, words, more, b,
                      sums, high_sums, results)
            elif bits == 2:
                add_2(units, at, first, scales, record, arranged, totals, length, segments, lane, words, more, b,
                      sums, high_sums, results)
            elif bits == 3:
                add_3(units, at, first, scales, record, arranged, totals, length, segments, lane, words, more, b,
                      sums, high_sums, results)
            elif bits == 4:
                add_4(units, at, first, scales, record, arranged, totals, length, segments, lane, words, more, b,
                      sums, high_sums, results)
            elif bits == 5:
                add_5(units, at, first, scales, record, arranged, totals, length, segments, lane, words, more, b,
                      sums, high_sums, results)
            elif bits == 6:
                add_6(units, at, first, scales, record, arranged, totals, length, segments, lane, words, more, b,
                      sums, high_sums, results)
            elif bits == 7:
                add_7(units, at, first, scales, record, arranged, totals, length, segments, lane, words, more, b,
                      sums, high_sums, results)
            elif bits == 8:
                add_8(units, at, first, scales, record, arranged, totals, length, segments, lane, words, more, b,
                      sums, high_sums, results)
        place = warp * size + lane % 4 * 64 + lane // 4
        put(0, shared, place, results)
        if tiles > 1:
            put(1, shared, place, results)
        if tiles > 2:
            put(2, shared, place, results)
            put(3, shared, place, results)
        cuda.syncthreads()
        for i in range(thread, size, threads):
            token, natural = i // 32, rows[strip * 32 + i % 32]
            if natural >= 0 and token < count:
                total = F(0)
                for other in range(warps):
                    total += shared[other * size + i]
                write(y, L(token) * out_features + natural, F(total * factors[token] + bias[natural]))

    return mma
