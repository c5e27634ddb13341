"""The tensor-core kernel: codes become float16 by one mask and one product, tensor cores add in float32.

A thread block multiplies one strip of 32 rows. Its warps take the tiles in turn, tiles of most bits first, and their
sums are added in order, so the result does not depend on timing. A warp holds two units: it multiplies one while the
other is on its way, and asks for the next but one as soon as registers are free, whatever the bits of either.

Activations are in permuted order, either gathered into shared memory by every block, while its first two units are on
their way (`make_fused`), or once for all blocks by a kernel before (`make_kernel` after `mma_gather.make_arrange`).

An activation that is not finite makes the results of its token NaN or infinite, and those of no other token.

Source: CUDA.md sections 4.2–4.5. Differences: no switch of loops between bit-widths, since loads of absent chunks do
nothing; bfloat16 is scaled per segment, which needs one pass over x.
"""

from __future__ import annotations

import functools

from numba import cuda, types

from kernels_numba.gpu.kinds import writer
from kernels_numba.gpu.mma_codes import load_chunks
from kernels_numba.gpu.mma_gather import gatherer
from kernels_numba.gpu.mma_unit import dispatcher
from kernels_numba.gpu.primitives import device, kernel, load_line, load_word

KINDS = ("float16", "bfloat16")  # float32 activations would lose half of their digits
TOKENS = 8  # of a tensor-core tile
MOST_TOKENS = 32
FUSED_TOKENS = 8
MANY_WARPS, FEW_WARPS = 16, 8  # that run together on a processor: how many registers a lane may have

INT, U, L, F = types.int32, types.uint32, types.int64, types.float32


def resident_warps(widths: tuple[int, ...], tokens: int, segment: int) -> int:
    """Warps of a processor that have room for their registers."""
    return MANY_WARPS if tokens <= 16 and max(widths) <= 4 else FEW_WARPS


def reduced_bytes(tokens: int, warps: int) -> int:
    """Shared memory in which the sums of the warps meet."""
    return 4 * 32 * (1 if tokens == 1 else TOKENS * max(1, tokens // TOKENS)) * warps


@functools.cache
def fetcher(widths: tuple[int, ...], tokens: int, segment: int):
    """Device function that asks for one unit, its scales and numbers of segments, and returns its bits."""
    both, single, per_unit = max(widths) > 4, tokens == 1, 128 // segment

    @device
    def fetch(units, scales, segments, start, record, tile, info, lane, words, more, scale, numbers):
        bits = INT(info & 15)
        at = start + L(info >> 4) * 512
        load_chunks(units, at, bits, words)
        if both:
            load_chunks(units, at + 4 * 512, bits - 4, more)
        if bits > 0:
            for part in range(per_unit):
                own = (record + tile * per_unit + part) * 32
                if single:
                    scale[part] = load_word(scales, (own + lane) * 4)
                else:
                    scale[4 * part], scale[4 * part + 1], scale[4 * part + 2], scale[4 * part + 3] = load_line(
                        scales, (own + lane // 4 * 4) * 4)
                numbers[part] = segments[tile * per_unit + part]
        return bits

    return fetch


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
def body(widths: tuple[int, ...], tokens: int, kind: str, segment: int, warps: int, fused: bool):
    """Device function that is the whole kernel.

    After x come the columns and shared memory where the kernel gathers x itself, and totals and factors where not.
    """
    write, fetch = writer(kind), fetcher(widths, tokens, segment)
    scaled, single, tiles = kind == "bfloat16", tokens == 1, max(1, tokens // TOKENS)
    add = dispatcher(widths, tokens, segment, scaled, fused)
    threads, size, per_unit = 32 * warps, reduced_bytes(tokens, 1) // 4, 128 // segment
    shared_size, fragments, held, owned = size * warps, 4 * tiles, 8 * tiles, 2 * tiles
    scale_size = per_unit if single else 4 * per_unit
    stride_more = 64 if fused else 0  # bytes that rows of activations are apart beyond their own

    @device
    def given(x, totals, factors, names, held, warp, lane, in_features, length, count):
        return x, totals, factors

    prepare = gatherer(kind, tokens, segment, warps) if fused else given

    @device
    def multiply(units, scales, tile_table, segments, strip_chunk, strip_record, rows, x, gathered, more_gathered,
                 bias, y, out_features, in_features, length, most_tiles, most_strips, count):
        shared = cuda.shared.array(shared_size, F)
        words_a = cuda.local.array(16, U)
        words_b = cuda.local.array(16, U)
        more_a = cuda.local.array(16, U)
        more_b = cuda.local.array(16, U)
        scale_a = cuda.local.array(scale_size, U)
        scale_b = cuda.local.array(scale_size, U)
        numbers_a = cuda.local.array(per_unit, INT)
        numbers_b = cuda.local.array(per_unit, INT)
        names = cuda.local.array(16, INT)
        read = cuda.local.array(16, U)
        rest = cuda.local.array(4, U)
        b = cuda.local.array(fragments, U)
        sums = cuda.local.array(held, F)
        high_sums = cuda.local.array(held, F)
        results = cuda.local.array(held, F)
        places = cuda.local.array(tiles, INT)
        owners = cuda.local.array(owned, INT)
        thread, strip = INT(cuda.threadIdx.x), INT(cuda.blockIdx.x)
        lane, warp = INT(thread & 31), INT(thread >> 5)
        first = INT(strip // most_strips * most_tiles)
        tile = warp
        info_a = tile_table[first + tile] if tile < most_tiles else INT(0)
        info_b = tile_table[first + tile + warps] if tile + warps < most_tiles else INT(0)
        record = L(strip_record[strip]) - first * per_unit  # of tile 0 of the first row block, were it in this strip
        start = L(strip_chunk[strip]) * 512 + lane * 16
        natural = rows[strip * 32 + lane]
        bits_a = fetch(units, scales, segments, start, record, first + tile, info_a, lane, words_a, more_a, scale_a,
                       numbers_a)
        bits_b = fetch(units, scales, segments, start, record, first + tile + warps, info_b, lane, words_b, more_b,
                       scale_b, numbers_b)
        info = tile_table[first + tile + 2 * warps] if tile + 2 * warps < most_tiles else INT(0)
        offset = bias[natural] if natural >= 0 else F(0)
        at_x, at_totals, at_factors = prepare(x, gathered, more_gathered, names, read, warp, lane, in_features, length,
                                              count)
        if fused:
            cuda.syncthreads()
        clear(0, sums, high_sums, results)
        if tiles > 1:
            clear(1, sums, high_sums, results)
        if tiles > 2:
            clear(2, sums, high_sums, results)
            clear(3, sums, high_sums, results)
        last = INT(tokens - 1) if fused else count - 1  # where fewer tokens are there, any other stands for the rest
        for i in range(tiles):
            places[i] = min(INT(8 * i + lane // 4), last) * (2 * length + stride_more) + 16 * (lane % 4)
            for e in range(2):
                owners[2 * i + e] = min(INT(8 * i + 2 * (lane % 4) + e), last) * (length // segment)
        while bits_a > 0:
            add(bits_a, words_a, more_a, scale_a, numbers_a, at_x, at_totals, at_factors, places, owners, lane, rest,
                b, sums, high_sums, results)
            tile += 2 * warps
            bits_a = fetch(units, scales, segments, start, record, first + tile, info, lane, words_a, more_a, scale_a,
                           numbers_a)
            info = tile_table[first + tile + warps] if tile + warps < most_tiles else INT(0)
            add(bits_b, words_b, more_b, scale_b, numbers_b, at_x, at_totals, at_factors, places, owners, lane, rest,
                b, sums, high_sums, results)
            bits_b = fetch(units, scales, segments, start, record, first + tile + warps, info, lane, words_b, more_b,
                           scale_b, numbers_b)
            info = tile_table[first + tile + 2 * warps] if tile + 2 * warps < most_tiles else INT(0)
        if single:
            shared[warp * 32 + lane // 4 + 8 * (lane % 4)] = results[0]
        else:
            place = warp * size + lane % 4 * 64 + lane // 4
            put(0, shared, place, results)
            if tiles > 1:
                put(1, shared, place, results)
            if tiles > 2:
                put(2, shared, place, results)
                put(3, shared, place, results)
        cuda.syncthreads()
        for i in range(thread, size, threads):
            token = i // 32  # a thread has one row at every token
            if natural >= 0 and token < count:
                total = F(0)
                for other in range(warps):
                    total += shared[other * size + i]
                write(y, L(token) * out_features + natural, F(total + offset))

    return multiply


@functools.cache
def make_fused(widths: tuple[int, ...], tokens: int, kind: str, segment: int, warps: int):
    """Return the kernel that gathers activations itself: 1, 2, 4 or 8 tokens, or fewer.

    Its arguments are arrays of `MmaLayout`, x [tokens, K], bias float32 [N], y [tokens, N], N, K, length (of `columns`),
    most_tiles, most_strips and the number of tokens. Shared memory: `mma_gather.shared_bytes`. Grid: a block of
    32·warps threads per strip.
    """
    multiply = body(widths, tokens, kind, segment, warps, True)

    @kernel(32 * warps, max(1, resident_warps(widths, tokens, segment) // warps))
    def mma(units, scales, tiles, segments, strip_chunk, strip_record, rows, columns, x, bias, y, out_features,
            in_features, length, most_tiles, most_strips, count):
        memory = cuda.shared.array(0, U)
        multiply(units, scales, tiles, segments, strip_chunk, strip_record, rows, x, columns, memory, bias, y,
                 out_features, in_features, length, most_tiles, most_strips, count)

    return mma


@functools.cache
def make_kernel(widths: tuple[int, ...], tokens: int, kind: str, segment: int, warps: int):
    """Return the kernel for 1, 8, 16 or 32 arranged tokens, or fewer.

    Its arguments are as for `make_fused`, without K and with what `make_arrange`'s kernel wrote for columns and x.
    """
    multiply = body(widths, tokens, kind, segment, warps, False)

    @kernel(32 * warps, max(1, resident_warps(widths, tokens, segment) // warps))
    def mma(units, scales, tiles, segments, strip_chunk, strip_record, rows, arranged, totals, factors, bias, y,
            out_features, length, most_tiles, most_strips, count):
        multiply(units, scales, tiles, segments, strip_chunk, strip_record, rows, arranged, totals, factors,
                 bias, y, out_features, INT(0), length, most_tiles, most_strips, count)

    return mma
