"""Many tokens: dequantize a panel of rows, multiply with torch, go to the next panel.

A panel is small enough to be read from cache by the product. Its weights are the bits of ``PackedMatrix.dequantize``,
or these rounded to bfloat16. Rows lie as in the tiles; inside 32 columns they lie in the order of the bits of a tile's
word, which `column_order` gives: the activations are gathered in this order instead.

Source: CPU.md sections 4 and 9 (not prototyped there).
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numba import cfunc, njit, prange, types
from numba.core.errors import RequireLiteralValue
from numba.extending import intrinsic

from kernels_numba.cpu import targets, threads
from kernels_numba.cpu.block import MAX_BITS
from kernels_numba.cpu.drive import compiled, source_hash
from kernels_numba.cpu.layout import (
    BITS,
    COLUMN_MAP,
    COLUMN_TILES,
    COLUMNS,
    HEADER,
    ROW_MAP,
    ROW_TILES,
    ROWS,
    STRIP_TABLE,
    STRIPS,
    TILE_COLUMNS,
    TILE_ROWS,
)
from kernels_numba.cpu.native import bytes_at, call_stage, longs, take_number
from kernels_numba.cpu.records import VECTOR, WORD_COLUMNS, tile_bytes
from kernels_numba.cpu.simd import FLOATS, LONG, SHORT, Simd, outlined

LANES = 16
PANEL_ROWS = 512
_IMAGE, _TARGET, _FIRST, _LAST, _NEXT, JOB_WORDS = range(6)
_WORD_ORDER = [4 * nibble + bit for byte in range(4) for nibble in (byte, 4 + byte) for bit in range(4)]


@intrinsic
def dequantize_tile(typing, columns, element_bytes, bits, tile, target, row_step):
    """Write the weights of a tile of `bits` bits, 16 rows `row_step` bytes apart.

    columns, element_bytes : literals; 4 bytes write float32, 2 bytes bfloat16.
    bits, tile, target, row_step : int64; bits and the step are values, the others addresses.
    """
    for literal in (columns, element_bytes):
        if not isinstance(literal, types.Literal):
            raise RequireLiteralValue(literal)
    fixed = columns.literal_value, element_bytes.literal_value

    def codegen(context, builder, signature, arguments):
        end = builder.append_basic_block("dequantized")
        choice = builder.switch(arguments[2], end)
        for width in range(1, MAX_BITS + 1):
            with builder.goto_block(builder.append_basic_block(f"bits{width}")):
                choice.add_case(LONG(width), builder.block)
                name = f"dequantize_{fixed[0]}_{fixed[1]}_{width}"
                outlined(builder, Simd, name, arguments[3:], functools.partial(_write_tile, *fixed, width))
                builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(columns, element_bytes, *[types.int64] * 4), codegen


def _write_tile(columns, element_bytes, bits, v: Simd, tile, target, row_step):
    """alpha·(2·code − 2^b + 1) is summed exactly, plane by plane, so beta brings the only rounding."""
    b, words = v.builder, columns // WORD_COLUMNS
    scales = tile_bytes(columns, bits) - VECTOR
    with v.loop(TILE_ROWS) as row:
        scale = v.at(v.at(tile, scales), v.times(row, 2))
        alpha, beta = (v.splat(v.load_half(v.at(scale, part)))
                       for part in (0, VECTOR // 2))
        steps = [v.fmul(alpha, v.constant(FLOATS, float(2 << plane))) for plane in range(bits)]
        lowest = v.fmul(alpha, v.constant(FLOATS, 1.0 - (1 << bits)))
        out = v.at(target, b.mul(row, row_step))
        for part in range(2 * words):  # 16 columns: half a word
            value = lowest
            for plane in range(bits):
                place = (part // 2 * bits + plane) * VECTOR + part % 2 * 2
                mask = v.load(SHORT, v.at(v.at(tile, place), v.times(row, 4)), 2)
                value = v.add_where(mask, value, steps[plane])
            value = v.fadd(value, beta)
            where = v.at(out, part * LANES * element_bytes)
            if element_bytes == 4:
                v.store(where, value, 4)
            else:
                v.store(where, v.to_bfloats(value), 2)


@functools.cache
def stage(tile_columns: int, element_bytes: int):
    """Address of the C function that dequantizes some strips; units: 16 rows."""
    version = source_hash()
    tile_base, tile_plane = tile_bytes(tile_columns, 0), tile_bytes(tile_columns, 1) - tile_bytes(tile_columns, 0)
    width_bytes = tile_columns * element_bytes

    def dequantize_strips(address):
        version  # noqa: B018 - a cell of the closure is part of the cache key
        job = longs(address)
        image = longs(job[_IMAGE])
        strips, bits = longs(job[_IMAGE] + image[STRIP_TABLE]), bytes_at(job[_IMAGE] + image[BITS])
        column_tiles = image[COLUMN_TILES]
        row_step = column_tiles * width_bytes
        start = strips[3 * job[_FIRST]]
        while True:
            row_tile = start + take_number(address + 8 * _NEXT)
            strip = job[_FIRST]
            while strip < job[_LAST] and row_tile >= strips[3 * strip] + strips[3 * strip + 1]:
                strip += 1
            if strip >= job[_LAST]:
                break
            inside, count = row_tile - strips[3 * strip], strips[3 * strip + 1]
            tiles = job[_IMAGE] + strips[3 * strip + 2]
            target = job[_TARGET] + (row_tile - start) * TILE_ROWS * row_step
            for column in range(column_tiles):
                width = bits[strip * column_tiles + column]
                size = tile_base + width * tile_plane
                dequantize_tile(tile_columns, element_bytes, width, tiles + inside * size,
                                target + column * width_bytes, row_step)
                tiles += count * size

    return compiled(cfunc, dequantize_strips, types.void(types.int64), error_model="numpy").address


@functools.cache
def runner():
    """Compiled ``fill(stage, job, threads)``."""
    version = source_hash()

    def fill(stage, job, threads):
        version  # noqa: B018 - a cell of the closure is part of the cache key
        if threads > 1:
            for _ in prange(threads):
                call_stage(stage, job)
        else:
            call_stage(stage, job)

    return threads.guarded(compiled(njit, fill, parallel=True, nogil=True))


def multiply(x, image: np.ndarray, bias, threads: int, rounded: bool, scratch):
    """Return x Wᵀ + bias through panels, with the dtype of x; x [M, K] and bias are CPU tensors.

    Parameters
    ----------
    rounded : bool
        Round weights and activations to bfloat16, where this processor multiplies bfloat16 faster.
    scratch : callable bytes → uint8 array
        Memory for one panel, which is kept between calls.
    """
    header = image[: 8 * HEADER].view(np.int64)
    dtype = torch.bfloat16 if rounded and fast_bfloat16() else torch.float32
    order, tile_columns = column_order(image), int(header[TILE_COLUMNS])
    width = len(order)
    gathered = x.to(dtype)
    if width > header[COLUMNS]:
        gathered = torch.nn.functional.pad(gathered, (0, 1))  # padded columns read this zero
    gathered = gathered.index_select(1, torch.from_numpy(order))
    tiled = torch.empty(len(x), int(header[ROW_TILES]) * TILE_ROWS, dtype=dtype)
    panels = strips_of_panels(image, PANEL_ROWS)
    largest = max(tiles for *_, tiles in panels) * TILE_ROWS * width
    memory = torch.from_numpy(scratch(largest * dtype.itemsize)[: largest * dtype.itemsize]).view(dtype)
    job = np.zeros(JOB_WORDS, np.int64)
    job[[_IMAGE, _TARGET]] = image.ctypes.data, memory.data_ptr()
    fill, code = runner(), stage(tile_columns, dtype.itemsize)
    for first, last, tile, tiles in panels:
        job[[_FIRST, _LAST, _NEXT]] = first, last, 0
        fill(code, job.ctypes.data, threads)
        weight = memory[: tiles * TILE_ROWS * width].view(-1, width)
        tiled[:, tile * TILE_ROWS : (tile + tiles) * TILE_ROWS] = gathered @ weight.T
    natural = image[header[ROW_MAP] :][: 4 * tiled.shape[1]].view(np.int32)
    where = np.empty(int(header[ROWS]) + 1, np.int64)  # padded rows share the last
    where[natural] = np.arange(len(natural))
    y = tiled.index_select(1, torch.from_numpy(where[:-1])).float()
    return (y if bias is None else y.add_(bias.float())).to(x.dtype)


@functools.cache
def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware and torch's library knows how."""
    return bool({"avx512bf16", "amx-bf16"} & targets.features()) and torch.backends.mkldnn.is_available()


def strips_of_panels(image: np.ndarray, rows: int):
    """Cut the strips into panels of about `rows` rows: [(first strip, one behind the last, first tile, tiles)]."""
    header = image[: 8 * HEADER].view(np.int64)
    strips = image[header[STRIP_TABLE] :][: 24 * header[STRIPS]].view(np.int64).reshape(-1, 3)
    starts = [0]
    for strip, (first, count, _) in enumerate(strips.tolist()):
        if (first + count - strips[starts[-1], 0]) * TILE_ROWS > rows and strip > starts[-1]:
            starts.append(strip)
    ends = [*starts[1:], len(strips)]
    tiles = np.append(strips[:, 0], header[ROW_TILES]).tolist()
    return [(start, end, tiles[start], tiles[end] - tiles[start]) for start, end in zip(starts, ends, strict=True)]


def column_order(image: np.ndarray) -> np.ndarray:
    """Natural column of every column of a panel, int32; padded columns are K."""
    header = image[: 8 * HEADER].view(np.int64)
    columns = int(header[COLUMN_TILES] * header[TILE_COLUMNS])
    natural = image[header[COLUMN_MAP] :][: 4 * columns].view(np.int32)
    return natural.reshape(-1, WORD_COLUMNS)[:, _WORD_ORDER].ravel()
