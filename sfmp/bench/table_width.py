"""How wide should a table be? Plain Numba kernels whose tables cover 2, 4 or 8 activations.

A wider table saves look-ups and additions (one per 2, 4 or 8 weights of a plane) and costs memory: 4, 16 or 256
entries for each 2, 4 or 8 columns, so 32 kB, 64 kB or 512 kB of float32 for 4096 columns. These kernels load entries
one by one, as any program without vector look-ups does; the product's own kernels are fixed at 4, because 16 entries
are what one vector register holds and one instruction looks up.
"""

from __future__ import annotations

import functools

import numpy as np
from numba import njit, prange

from kernels_numba.cpu import threads
from sfmp.bench.timing import Candidate, copies, relative_error

WIDTHS = (2, 4, 8)
GROUP_SIZE = 128


@njit(error_model="numpy")
def _tables(x, width, tables):
    """Signed sums ±x₀ ±x₁ … of every `width` activations: tables [K/width, 2^width]."""
    for table in range(len(tables)):
        for entry in range(1 << width):
            total = np.float32(0)
            for bit in range(width):
                value = x[table * width + bit]
                total += value if entry >> bit & 1 else -value
            tables[table, entry] = total


@functools.cache
def _kernel(width: int):
    threads.choose_layer()
    mask, fields, group_bytes = (1 << width) - 1, 8 // width, GROUP_SIZE // 8

    @njit(parallel=True, error_model="numpy", fastmath={"reassoc"})
    def multiply(planes, alpha, beta, x, tables, y):
        _tables(x, width, tables)
        rows, bits, groups = len(y), planes.shape[1], alpha.shape[1]
        for row in prange(rows):
            result = np.float32(0)
            for group in range(groups):
                total, sum_x = np.float32(0), np.float32(0)
                for i in range(group * GROUP_SIZE, (group + 1) * GROUP_SIZE):
                    sum_x += x[i]
                for plane in range(bits):
                    part = np.float32(0)
                    for byte in range(group * group_bytes, (group + 1) * group_bytes):
                        word = planes[row, plane, byte]
                        for field in range(fields):
                            part += tables[byte * fields + field, word >> (field * width) & mask]
                    total += np.float32(1 << plane) * part
                result += alpha[row, group] * total + beta[row, group] * sum_x
            y[row] = result

    return multiply


def candidates(rows: int, columns: int, x: np.ndarray, bits: int) -> list[Candidate]:
    """One candidate for each width: the same matrix, tables built in every call."""
    rng = np.random.default_rng(bits)
    groups, size = columns // GROUP_SIZE, rows * columns * bits // 8 + 8 * rows * (columns // GROUP_SIZE)
    planes = [rng.integers(0, 256, (rows, bits, columns // 8), dtype=np.uint8) for _ in range(copies(size))]
    alpha, beta = (rng.random((rows, groups), np.float32) * 0.02 for _ in range(2))
    spread = np.unpackbits(planes[0], axis=2, bitorder="little").astype(np.float64) * 2 - 1
    weight = np.tensordot(spread, 2.0 ** np.arange(bits), (1, 0))
    weight = weight * alpha.repeat(GROUP_SIZE, 1) + beta.repeat(GROUP_SIZE, 1)
    found, expected = [], weight @ x
    for width in WIDTHS:
        tables, y = np.empty((columns // width, 1 << width), np.float32), np.empty(rows, np.float32)
        products = [functools.partial(_kernel(width), plane, alpha, beta, x, tables, y) for plane in planes]
        products[0]()
        found.append(Candidate(f"width {width} {bits}", "plain", products, size, error=relative_error(y, expected),
                               facts={"bits": bits, "mode": f"width {width}", "table_bytes": tables.nbytes}))
    return found
