"""The weight itself from the tensor-core kernel's units: what long inputs are multiplied with by torch.

A warp takes a unit. A lane has 8 neighbouring columns of four rows four times, 16 bytes to write each time. Weights are
computed in float32 and rounded once.

Source: CUDA.md section 4.3.
"""

from __future__ import annotations

import functools

from numba import cuda, types

from kernels_numba.gpu.mma_codes import collect_rest, extractor
from kernels_numba.gpu.primitives import (
    bfloat_bits,
    device,
    half_bits,
    half_high,
    half_low,
    kernel,
    load_line,
    store_line,
)

WARPS = 8

INT, U, L, F = types.int32, types.uint32, types.int64, types.float32


@functools.cache
def _rounder(kind: str):
    """Device function (float32, float32) → both in half precision, in a uint32."""
    round_ = bfloat_bits if kind == "bfloat16" else half_bits

    @device
    def pair(low, high):
        return U(U(round_(low)) | U(U(round_(high)) << U(16)))

    return pair


@functools.cache
def _chunks(count: int):
    """Device function that loads `count` chunks of a lane."""

    @device
    def load(units, at, words):
        for chunk in range(count):
            first = 4 * chunk
            words[first], words[first + 1], words[first + 2], words[first + 3] = load_line(units, at + 512 * chunk)

    return load


@functools.cache
def _unit(width: int, kind: str, segment: int):
    """Device function that writes the weights of one unit."""
    low, high, both = min(width, 4), max(width - 4, 1), width > 4
    codes, high_codes, pair = extractor(low), extractor(high), _rounder(kind)
    load, load_high = _chunks(low), _chunks(high)
    three_low, three_high, levels, blocks = low == 3, both and high == 3, float((1 << width) - 1), segment // 32

    @device
    def weights(words, more, rest, rho, h, i, odd, slope, shift):
        found = codes(words, rest, rho, h, i, odd)
        first, second = half_low(found), half_high(found)
        if both:
            found = high_codes(more, rest, rho, h, i, odd)
            first += F(16) * half_low(found)
            second += F(16) * half_high(found)
        return pair(F(slope * first + shift), F(slope * second + shift))

    @device
    def quarter(i, scales, record, numbers, places, words, more, rest, lane, workspace, length):
        word = load_line(scales, ((record + i // blocks) * 32 + lane // 4 * 4) * 4)
        column = numbers[i // blocks] * segment + i % blocks * 32 + lane % 4 * 8
        for rho in range(4):
            alpha, beta = half_low(word[rho]), half_high(word[rho])
            slope, shift = F(alpha * F(2048)), F(beta - F(levels) * alpha)
            a = weights(words, more, rest, rho, 0, i, 0, slope, shift)
            b = weights(words, more, rest, rho, 1, i, 0, slope, shift)
            c = weights(words, more, rest, rho, 0, i, 1, slope, shift)
            d = weights(words, more, rest, rho, 1, i, 1, slope, shift)
            if places[rho] >= 0 and column < length:
                store_line(workspace, (L(places[rho]) * length + column) * 2, a, b, c, d)

    @device
    def write(units, at, scales, record, numbers, places, words, more, rest, lane, workspace, length):
        load(units, at, words)
        if both:
            load_high(units, at + 4 * 512, more)
        if three_low:
            collect_rest(words, rest)
        if three_high:
            collect_rest(more, rest)
        quarter(0, scales, record, numbers, places, words, more, rest, lane, workspace, length)
        quarter(1, scales, record, numbers, places, words, more, rest, lane, workspace, length)
        quarter(2, scales, record, numbers, places, words, more, rest, lane, workspace, length)
        quarter(3, scales, record, numbers, places, words, more, rest, lane, workspace, length)

    return write


@functools.cache
def _dispatcher(widths: tuple[int, ...], kind: str, segment: int):
    """Device function that writes a unit whose bits are one of the widths, which are in order."""
    half = len(widths) // 2
    several = half > 0
    few = _dispatcher(widths[:half], kind, segment) if several else None
    many = _dispatcher(widths[half:], kind, segment) if several else None
    only, first_of_many = _unit(widths[0], kind, segment), widths[half]

    @device
    def write_only(bits, units, at, scales, record, numbers, places, words, more, rest, lane, workspace, length):
        only(units, at, scales, record, numbers, places, words, more, rest, lane, workspace, length)

    @device
    def write(bits, units, at, scales, record, numbers, places, words, more, rest, lane, workspace, length):
        if bits < first_of_many:
            few(bits, units, at, scales, record, numbers, places, words, more, rest, lane, workspace, length)
        else:
            many(bits, units, at, scales, record, numbers, places, words, more, rest, lane, workspace, length)

    return write if several else write_only


@functools.cache
def make_kernel(widths: tuple[int, ...], kind: str, segment: int):
    """Return the kernel for some bit-widths, a kind of weights and a width of segments.

    Its arguments are arrays of `MmaLayout`, workspace uint32 (two weights each), first strip, whether rows go to their
    natural place, length, table_tiles and most_strips. Grid: strips × (tiles in blocks of `WARPS` warps).
    """
    write, per_unit = _dispatcher(widths, kind, segment), 128 // segment

    @kernel(32 * WARPS, 1)
    def dequantize(units, scales, table, segments, strip_chunk, strip_record, rows, workspace, first_strip, natural,
                   length, table_tiles, most_strips):
        words = cuda.local.array(16, U)
        more = cuda.local.array(16, U)
        rest = cuda.local.array(4, U)
        numbers = cuda.local.array(per_unit, INT)
        places = cuda.local.array(4, INT)
        thread, strip = INT(cuda.threadIdx.x), INT(INT(cuda.blockIdx.x) + first_strip)
        lane, tile = INT(thread & 31), INT(INT(cuda.blockIdx.y) * WARPS + (thread >> 5))
        entry = INT(strip // most_strips * table_tiles + tile)
        info = table[entry]
        if info > 0:
            for part in range(per_unit):
                numbers[part] = segments[entry * per_unit + part]
            for rho in range(4):
                own = lane // 4 + 8 * rho
                places[rho] = rows[strip * 32 + own] if natural > 0 else INT((strip - first_strip) * 32 + own)
            at = (L(strip_chunk[strip]) + (info >> 4)) * 512 + 16 * lane
            write(INT(info & 15), units, at, scales, L(strip_record[strip]) + tile * per_unit, numbers, places, words,
                  more, rest, lane, workspace, length)

    return dequantize
