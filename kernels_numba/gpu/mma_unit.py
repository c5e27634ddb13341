"""The products of one unit: tensor-core steps over its 128 columns, and alpha and beta where a segment ends.

W = 2·alpha·q + beta − (2^b − 1)·alpha, so for a segment  y += 2·alpha·Σ q·x + (beta − (2^b − 1)·alpha)·Σ x. Codes are
multiplied as 2^-10·q, which is made good in alpha.
"""

from __future__ import annotations

import functools

from numba import types

from kernels_numba.gpu.mma_codes import collect_rest, stepper
from kernels_numba.gpu.primitives import (
    device,
    half_high,
    half_low,
    load_line_kept,
    load_shared,
    load_shared_line,
)

INT, U, L, F = types.int32, types.uint32, types.int64, types.float32


@functools.cache
def readers(fused: bool):
    """Device functions that read 16 bytes of activations and a float32, from shared memory or through pointers."""

    @device
    def shared_line(x, at):
        return load_shared_line(U(x + U(at)))

    @device
    def shared_number(numbers, index):
        return load_shared(U(numbers + U(4 * index)))

    @device
    def line(x, at):
        return load_line_kept(x, at)

    @device
    def number(numbers, index):
        return numbers[index]

    return (shared_line, shared_number) if fused else (line, number)


@functools.cache
def unit(width: int, tokens: int, segment: int, scaled: bool, fused: bool):
    """Device function that adds the products of one unit of `width` bits to the results of a lane.

    With one token every column of the tensor-core tile is that token, and a lane keeps row lane//4 + 8·(lane%4).
    """
    tiles, single = max(1, tokens // 8), tokens == 1
    low, high, both = min(width, 4), max(width - 4, 1), width > 4
    step_low, step_high = stepper(low, tiles), stepper(high, tiles)
    three_low, three_high = low == 3, both and high == 3
    levels = float((1 << width) - 1)
    blocks = segment // 32  # of 32 columns in a segment
    line, find = readers(fused)

    @device
    def fold_row(tile, rho, e, word, total, factor, sums, high_sums, results):
        at = 8 * tile + 2 * rho + e
        alpha, beta = half_low(word), half_high(word)
        value = sums[at]
        if both:
            value += F(16) * high_sums[at]
        if scaled:
            value = F(value * factor)
        results[at] += F(alpha * F(2048)) * value + (beta - F(levels) * alpha) * total

    @device
    def fold_tile(tile, part, number, scale, totals, factors, owners, sums, high_sums, results):
        for e in range(2):
            total, factor = find(totals, owners[2 * tile + e] + number), F(1)
            if scaled:
                factor = find(factors, owners[2 * tile + e] + number)
            for rho in range(4):
                fold_row(tile, rho, e, scale[4 * part + rho], total, factor, sums, high_sums, results)
        for i in range(8):
            sums[8 * tile + i] = F(0)
            high_sums[8 * tile + i] = F(0)

    @device
    def own(lane, sums):
        """Of the rows g + 8·rho that a lane has sums of, the one it keeps."""
        upper, lower = sums[6] if lane & 1 else sums[4], sums[2] if lane & 1 else sums[0]
        return upper if lane & 2 else lower

    @device
    def fold_single(part, number, scale, totals, factors, lane, sums, high_sums, results):
        alpha, beta = half_low(scale[part]), half_high(scale[part])
        value = own(lane, sums)
        if both:
            value += F(16) * own(lane, high_sums)
        if scaled:
            value = F(value * find(factors, number))
        results[0] += F(alpha * F(2048)) * value + (beta - F(levels) * alpha) * find(totals, number)
        for i in range(8):
            sums[i] = F(0)
            high_sums[i] = F(0)

    @device
    def fold(part, number, scale, totals, factors, owners, lane, sums, high_sums, results):
        if single:
            fold_single(part, number, scale, totals, factors, lane, sums, high_sums, results)
        else:
            fold_tile(0, part, number, scale, totals, factors, owners, sums, high_sums, results)
            if tiles > 1:
                fold_tile(1, part, number, scale, totals, factors, owners, sums, high_sums, results)
            if tiles > 2:
                fold_tile(2, part, number, scale, totals, factors, owners, sums, high_sums, results)
                fold_tile(3, part, number, scale, totals, factors, owners, sums, high_sums, results)

    @device
    def quarter(i, words, more, rest, scale, numbers, x, totals, factors, places, owners, lane, b, sums, high_sums,
                results):
        number = numbers[i // blocks]
        for tile in range(tiles):
            at = places[tile] + number * (2 * segment) + i % blocks * 64
            b[4 * tile], b[4 * tile + 1], b[4 * tile + 2], b[4 * tile + 3] = line(x, at)
        step_low(words, rest, i, b, sums)
        if both:
            step_high(more, rest, i, b, high_sums)
        if i % blocks == blocks - 1:
            fold(i // blocks, number, scale, totals, factors, owners, lane, sums, high_sums, results)

    @device
    def add(words, more, scale, numbers, x, totals, factors, places, owners, lane, rest, b, sums, high_sums, results):
        if three_low:
            collect_rest(words, rest)
        if three_high:
            collect_rest(more, rest)
        quarter(0, words, more, rest, scale, numbers, x, totals, factors, places, owners, lane, b, sums, high_sums,
                results)
        quarter(1, words, more, rest, scale, numbers, x, totals, factors, places, owners, lane, b, sums, high_sums,
                results)
        quarter(2, words, more, rest, scale, numbers, x, totals, factors, places, owners, lane, b, sums, high_sums,
                results)
        quarter(3, words, more, rest, scale, numbers, x, totals, factors, places, owners, lane, b, sums, high_sums,
                results)

    return add


@functools.cache
def dispatcher(widths: tuple[int, ...], tokens: int, segment: int, scaled: bool, fused: bool):
    """Device function that adds the products of a unit whose bits are one of the widths, which are in order."""
    if len(widths) == 1:
        only = unit(widths[0], tokens, segment, scaled, fused)

        @device
        def add_only(bits, words, more, scale, numbers, x, totals, factors, places, owners, lane, rest, b, sums,
                     high_sums, results):
            only(words, more, scale, numbers, x, totals, factors, places, owners, lane, rest, b, sums, high_sums,
                 results)

        return add_only
    half = len(widths) // 2
    few = dispatcher(widths[:half], tokens, segment, scaled, fused)
    many = dispatcher(widths[half:], tokens, segment, scaled, fused)
    first_of_many = widths[half]

    @device
    def add(bits, words, more, scale, numbers, x, totals, factors, places, owners, lane, rest, b, sums, high_sums,
            results):
        if bits < first_of_many:
            few(bits, words, more, scale, numbers, x, totals, factors, places, owners, lane, rest, b, sums, high_sums,
                results)
        else:
            many(bits, words, more, scale, numbers, x, totals, factors, places, owners, lane, rest, b, sums, high_sums,
                 results)

    return add
