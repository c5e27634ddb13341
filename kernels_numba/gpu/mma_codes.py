"""Codes of a unit in the registers of a lane, and their products with activations on tensor cores."""

from __future__ import annotations

import functools

from numba import types

from kernels_numba.gpu.primitives import device, load_shared_line, multiply_halves, multiply_tiles

U = types.uint32


@functools.cache
def extractor(width: int):
    """Device function (words, rest, rho, h, i, odd) → two codes as float16 times 2^-10, for 1 to 4 bits."""

    @device
    def codes(word, mask, place):
        """Cut out codes at a place, subnormals, and multiply them to 2^-10 of their value."""
        cut = U(word & U(U(mask * 0x10001) << U(place)))
        return multiply_halves(cut, U(((29 - place) << 10) * 0x10001))

    @device
    def codes_of_nibbles(words, rest, rho, h, i, odd):
        return codes(U(words[4 * rho + i] >> U(8 * h)), 15, 4 * odd)

    @device
    def codes_3(words, rest, rho, h, i, odd):
        word = words[3 * rho + i] if i < 3 else rest[rho]
        return codes(U(word >> U(8 * h)), 7, 4 * odd)

    @device
    def codes_2(words, rest, rho, h, i, odd):
        return codes(U(words[2 * rho + h] >> U(8 * (i // 2))), 3, 2 * (2 * (i % 2) + odd))

    @device
    def codes_1(words, rest, rho, h, i, odd):
        return codes(U(words[rho] >> U(8 * h)), 1, 2 * i + odd)

    return (codes_1, codes_2, codes_3, codes_of_nibbles)[width - 1]


@device
def read_chunks(address, count, words):
    """Read `count` chunks of a lane from shared memory."""
    for chunk in range(count):
        first = 4 * chunk
        words[first], words[first + 1], words[first + 2], words[first + 3] = load_shared_line(
            U(address + U(512 * chunk)))


@device
def collect_rest(words, rest):
    """The words of 3-bit codes of i = 3, which ride in the others."""
    for rho in range(4):
        a, b, c = words[3 * rho], words[3 * rho + 1], words[3 * rho + 2]
        rest[rho] = U(U(a >> U(3)) & U(0x11111111)) | U(U(b >> U(2)) & U(0x22222222)) | U(U(c >> U(1)) & U(0x44444444))


@functools.cache
def stepper(width: int, tiles: int):
    """Device function (words, rest, i, b, sums): add the products of 32 columns to the sums."""
    codes = extractor(width)

    @device
    def part(odd, half, words, rest, i, b, sums):
        a0, a1 = codes(words, rest, 2 * half, 0, i, odd), codes(words, rest, 2 * half + 1, 0, i, odd)
        a2, a3 = codes(words, rest, 2 * half, 1, i, odd), codes(words, rest, 2 * half + 1, 1, i, odd)
        for tile in range(tiles):
            c, at = 8 * tile + 4 * half, 4 * tile + 2 * odd
            sums[c], sums[c + 1], sums[c + 2], sums[c + 3] = multiply_tiles(
                a0, a1, a2, a3, b[at], b[at + 1], sums[c], sums[c + 1], sums[c + 2], sums[c + 3])

    @device
    def step(words, rest, i, b, sums):  # written out, since not every compiler unrolls loops of them
        part(0, 0, words, rest, i, b, sums)
        part(0, 1, words, rest, i, b, sums)
        part(1, 0, words, rest, i, b, sums)
        part(1, 1, words, rest, i, b, sums)

    return step
