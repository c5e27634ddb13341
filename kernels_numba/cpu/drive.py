"""Driver: tables of the activations, then strips of the weight, shared out between threads.

`run` is one product, in three stages. They are compiled as C callbacks and called by address, so each is compiled once,
whether one thread runs it or many. The units of a stage are handed out by an atomic counter, and a unit is computed
the same way by whichever thread gets it: any number of threads gives the same bits.

The job is memory of the calling thread: int64 words (below), then for every token its activations in natural order as
float32 with zeros behind them, its tables, its sums in the row order of the tiles. Tables are kept: a product
of the same activations (the same bits) with another weight of the same column order, mode and tokens finds them done.
This serves q/k/v and gate/up, and needs no identity of tensors that could go stale.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from numba import cfunc, njit, prange, types

from kernels_numba.cpu.layout import (
    BITS,
    COLUMN_KEY,
    COLUMN_MAP,
    COLUMN_TILES,
    COLUMNS,
    ROW_MAP,
    ROW_TILES,
    ROWS,
    STRIP_TABLE,
    STRIPS,
    TILE_ROWS,
)
from kernels_numba.cpu.lut import multiply_block
from kernels_numba.cpu.native import (
    bytes_at,
    call_stage,
    floats,
    ints,
    longs,
    read_float,
    take_number,
    widen,
    write_float,
)
from kernels_numba.cpu.records import VECTOR, table_bytes, tile_bytes
from kernels_numba.cpu.tables import build_tables

(CAPACITY, IMAGE, X, X_KIND, Y, Y_KIND, BIAS, BIAS_KIND, TOKENS, WIDENED, BUILT, MULTIPLIED, CHANGED, REFUSED,
 SLOTS, KEPT_COLUMNS, KEPT_BATCH, KEPT_MODE) = range(18)
JOB_BYTES = 192
BUILD_UNIT = 8  # tile columns
SPREAD_BUILD = 1 << 14  # activations from which the tables are worth more than one thread
LANES = 16
DONE, REFUSED_X = 0, 1

_stage = functools.partial(cfunc, types.void(types.int64), cache=True, error_model="numpy")


@njit(error_model="numpy")
def _row_bytes(columns):
    """Bytes of the activations of a token: whole vectors, and at least 16 zeros behind, which padded columns read."""
    return (columns + 2 * LANES - 1) // LANES * VECTOR


@njit(error_model="numpy")
def _job_bytes(columns, column_tiles, row_tiles, slots, table_size):
    """Bytes of a job with memory for `slots` tokens."""
    return JOB_BYTES + slots * (_row_bytes(columns) + column_tiles * table_size + row_tiles * VECTOR)


@functools.cache
def source_hash() -> str:
    """Hash of the files that write machine code: Numba's cache knows only the file of the cached function itself."""
    folder = Path(__file__).parent
    names = ("simd", "native", "records", "tables", "lut", "panel", "layout")
    return hashlib.sha256(b"".join((folder / f"{name}.py").read_bytes() for name in names)).hexdigest()


@functools.cache
def widen_stage():
    """Activations → float32; units: tokens."""
    version = source_hash()

    @_stage()
    def widen_activations(address):
        version  # noqa: B018 - a cell of the closure is part of the cache key
        job = longs(address)
        columns = longs(job[IMAGE])[COLUMNS]
        size = 4 if job[X_KIND] == 0 else 2
        while True:
            token = take_number(address + 8 * WIDENED)
            if token >= job[TOKENS]:
                break
            row = address + JOB_BYTES + token * _row_bytes(columns)
            if widen(job[X_KIND], job[X] + token * columns * size, row, columns) != 0:
                job[CHANGED] = 1
            target = floats(row)
            for column in range(columns, _row_bytes(columns) // 4):
                target[column] = 0

    return widen_activations.address


@functools.cache
def build_stage(mode: str, tile_columns: int):
    """Activations → tables; units: a few tile columns of a token."""
    version, record = source_hash(), table_bytes(tile_columns, mode)

    @_stage()
    def build(address):
        version  # noqa: B018 - a cell of the closure is part of the cache key
        job = longs(address)
        image = longs(job[IMAGE])
        tokens, tiles = job[TOKENS], image[COLUMN_TILES]
        column_map = job[IMAGE] + image[COLUMN_MAP]
        row = _row_bytes(image[COLUMNS])
        tables = address + JOB_BYTES + job[SLOTS] * row
        units = (tiles + BUILD_UNIT - 1) // BUILD_UNIT
        while True:
            unit = take_number(address + 8 * BUILT)
            if unit >= tokens * units:
                break
            token, first = unit // units, unit % units * BUILD_UNIT
            for tile in range(first, min(first + BUILD_UNIT, tiles)):
                if build_tables(mode, tile_columns, address + JOB_BYTES + token * row,
                                column_map + tile * tile_columns * 4, tables + (token * tiles + tile) * record):
                    job[REFUSED] = 1

    return build.address


@functools.cache
def multiply_stage(mode: str, tile_columns: int, together: int = 1):
    """Tables and weight → y; units: strips. `together` tokens share one pass over a block, while it is in L1."""
    version, record = source_hash(), table_bytes(tile_columns, mode)
    tile_base, tile_plane = tile_bytes(tile_columns, 0), tile_bytes(tile_columns, 1) - tile_bytes(tile_columns, 0)

    @_stage()
    def multiply(address):
        version  # noqa: B018 - a cell of the closure is part of the cache key
        job = longs(address)
        image = longs(job[IMAGE])
        tokens, column_tiles = job[TOKENS], image[COLUMN_TILES]
        tables = address + JOB_BYTES + job[SLOTS] * _row_bytes(image[COLUMNS])
        table_step, sum_step = column_tiles * record, image[ROW_TILES] * VECTOR
        strips = longs(job[IMAGE] + image[STRIP_TABLE])
        bits = bytes_at(job[IMAGE] + image[BITS])
        while True:
            strip = take_number(address + 8 * MULTIPLIED)
            if strip >= image[STRIPS]:
                break
            first, count = strips[3 * strip], strips[3 * strip + 1]
            tiles = job[IMAGE] + strips[3 * strip + 2]
            sums = tables + job[SLOTS] * table_step + first * VECTOR
            for token in range(tokens):
                row = floats(sums + token * sum_step)
                for i in range(count * TILE_ROWS):
                    row[i] = 0
            for column in range(column_tiles):
                width = bits[strip * column_tiles + column]
                for token in range(0, tokens, together):
                    multiply_block(mode, tile_columns, together, width, tiles, count,
                                   tables + column * record + token * table_step, table_step,
                                   sums + token * sum_step, sum_step)
                tiles += count * (tile_base + width * tile_plane)
            for token in range(tokens):
                _finish(job, image, token, sums + token * sum_step, first * TILE_ROWS, count * TILE_ROWS)

    return multiply.address


@njit(error_model="numpy")
def _finish(job, image, token, sums, first, count):
    """Sums of some tile rows → y in natural order, with the bias."""
    row, natural = floats(sums), ints(job[IMAGE] + image[ROW_MAP] + 4 * first)
    start = token * image[ROWS]
    for i in range(count):
        to = natural[i]
        if to >= 0:
            value = row[i]
            if job[BIAS] != 0:
                value += read_float(job[BIAS_KIND], job[BIAS], to)
            write_float(job[Y_KIND], job[Y], start + to, value)


@functools.cache
def runner():
    """Compiled `run`; see `product`."""
    version = source_hash()

    @njit(parallel=True, nogil=True, cache=True, error_model="numpy")
    def run(job_address, widening, building, multiplying, threads, mode, record, image_address, x, x_kind, y, y_kind,
            bias, bias_kind, tokens, together):
        version  # noqa: B018 - a cell of the closure is part of the cache key
        job, image = longs(job_address), longs(image_address)
        slots = (tokens + together - 1) // together * together  # idle ones are computed from whatever is there
        need = _job_bytes(image[COLUMNS], image[COLUMN_TILES], image[ROW_TILES], slots, record)
        if job[CAPACITY] < need:
            return need
        job[IMAGE], job[X], job[X_KIND], job[Y], job[Y_KIND] = image_address, x, x_kind, y, y_kind
        job[BIAS], job[BIAS_KIND], job[TOKENS], job[SLOTS] = bias, bias_kind, tokens, slots
        job[WIDENED], job[BUILT], job[MULTIPLIED], job[CHANGED], job[REFUSED] = 0, 0, 0, 0, 0
        builders = threads if tokens * image[COLUMNS] >= SPREAD_BUILD else 1
        if builders > 1 and tokens > 1:
            for _ in prange(builders):
                call_stage(widening, job_address)
        else:
            call_stage(widening, job_address)
        batch = slots << 32 | tokens
        kept = job[KEPT_COLUMNS] == image[COLUMN_KEY] and job[KEPT_BATCH] == batch and job[KEPT_MODE] == mode
        if job[CHANGED] != 0 or not kept:
            job[KEPT_BATCH] = 0
            if builders > 1:
                for _ in prange(builders):
                    call_stage(building, job_address)
            else:
                call_stage(building, job_address)
            if job[REFUSED] != 0:
                return -1
            job[KEPT_COLUMNS], job[KEPT_BATCH], job[KEPT_MODE] = image[COLUMN_KEY], batch, mode
        if threads > 1:
            for _ in prange(threads):
                call_stage(multiplying, job_address)
        else:
            call_stage(multiplying, job_address)
        return 0

    return run
