"""Driver: tables of the activations, then strips of the weight, shared out between threads.

A product is one parallel region. Each thread runs the same C callback, which takes units of work until none is left: a
token to widen to float32, a few tile columns to build tables of, a strip to multiply. Before the next kind of work it
waits until the units of the last kind are done, not until all threads have come, so it cannot hang when there
are fewer threads than were asked for. A unit is computed the same way by whichever thread gets it: any number of
threads gives the same bits.

Each thread first takes the strips of a range of its own, which lie behind each other in memory, then helps with the
other ranges.

The job is memory of the calling thread: int64 words (below), then for every token its activations in natural order as
float32 with zeros behind them, its tables, its sums in the row order of the tiles. Tables are kept: a product
of the same activations (the same bits) with another weight of the same column order, mode and tokens finds them done.
This serves q/k/v and gate/up, and needs no identity of tensors that could go stale.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from pathlib import Path

from numba import cfunc, njit, prange, types

from kernels_numba.cpu import launch
from kernels_numba.cpu.block import multiply_block
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
from kernels_numba.cpu.native import (
    FLOAT32,
    add_number,
    bytes_at,
    call_stage,
    floats,
    ints,
    longs,
    read_float,
    take_number,
    wait_for,
    widen,
    write_float,
)
from kernels_numba.cpu.records import VECTOR, table_bytes, tile_bytes
from kernels_numba.cpu.tables import build_tables
from kernels_numba.cpu.threads import MAX_THREADS

(CAPACITY, IMAGE, X, X_KIND, Y, Y_KIND, BIAS, BIAS_KIND, TOKENS, SLOTS, THREADS, ARRIVED, WIDENING, WIDENED, BUILDING,
 BUILT, CHANGED, KEPT, REFUSED, KEPT_COLUMNS, KEPT_BATCH, KEPT_MODE) = range(22)
RANGES = 32  # first of the words that count the strips taken from each thread's range
JOB_BYTES = 8 * (RANGES + MAX_THREADS)
BUILD_UNIT = 4  # tile columns
LANES = 16
SOURCES = ("simd", "halves", "x86", "neon", "native", "records", "tables", "lut", "lut_lanes", "signs", "block",
           "panel", "layout", "targets", "threads", "drive")  # what machine code is written from


@njit(error_model="numpy")
def _row_bytes(columns):
    """Bytes of the activations of a token: whole vectors, and at least 16 zeros behind, which padded columns read."""
    return (columns + 2 * LANES - 1) // LANES * VECTOR


@functools.cache
def source_hash() -> str:
    """Hash of what machine code is written from: Numba's cache knows only the file of the cached function itself."""
    folder = Path(__file__).parent
    sources = [(folder / f"{name}.py").read_bytes() for name in SOURCES]
    return hashlib.sha256(b"".join([*sources, repr(launch.prefetch()).encode()])).hexdigest()


def compiled(decorator, function, *signature, **options):
    """``decorator(*signature, cache=True, **options)(function)``; not cached if Numba finds no folder to write to."""
    try:
        return decorator(*signature, cache=True, **options)(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        warnings.warn("Numba finds no folder for compiled code, so every process compiles again; set "
                      "NUMBA_CACHE_DIR to a folder that can be written", RuntimeWarning, stacklevel=2)
        return decorator(*signature, **options)(function)


@functools.cache
def worker(target: str, mode: str, tile_columns: int, together: int) -> int:
    """Address of the C function that each thread of a product runs.

    `together` tokens share one pass over a block, while it is in L1.
    """
    version, record = source_hash(), table_bytes(tile_columns, mode)
    tile_base, tile_plane = tile_bytes(tile_columns, 0), tile_bytes(tile_columns, 1) - tile_bytes(tile_columns, 0)

    def work(address):
        version  # noqa: B018 - a cell of the closure is part of the cache key
        job = longs(address)
        image = longs(job[IMAGE])
        tokens, column_tiles = job[TOKENS], image[COLUMN_TILES]
        row_step = _row_bytes(image[COLUMNS])
        rows = address + JOB_BYTES
        tables = rows + job[SLOTS] * row_step
        table_step, sum_step = column_tiles * record, image[ROW_TILES] * VECTOR
        _widen_rows(address, rows, row_step, image[COLUMNS])
        if job[CHANGED] != 0 or job[KEPT] == 0:
            column_map = job[IMAGE] + image[COLUMN_MAP]
            pieces = (column_tiles + BUILD_UNIT - 1) // BUILD_UNIT
            while True:
                unit = take_number(address + 8 * BUILDING)
                if unit >= tokens * pieces:
                    break
                token, first = unit // pieces, unit % pieces * BUILD_UNIT
                for tile in range(first, min(first + BUILD_UNIT, column_tiles)):
                    if build_tables(target, mode, tile_columns, rows + token * row_step,
                                    column_map + tile * tile_columns * 4, tables + token * table_step + tile * record):
                        job[REFUSED] = 1
                add_number(address + 8 * BUILT)
            wait_for(address + 8 * BUILT, tokens * pieces)
            if job[REFUSED] != 0:
                return
        strips = longs(job[IMAGE] + image[STRIP_TABLE])
        bits = bytes_at(job[IMAGE] + image[BITS])
        arrived, threads = take_number(address + 8 * ARRIVED), job[THREADS]
        for turn in range(threads):
            part = (arrived + turn) % threads
            end = (part + 1) * image[STRIPS] // threads
            while True:
                strip = part * image[STRIPS] // threads + take_number(address + 8 * (RANGES + part))
                if strip >= end:
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
                        multiply_block(target, mode, tile_columns, together, width, tiles, count,
                                       tables + column * record + token * table_step, table_step,
                                       sums + token * sum_step, sum_step)
                    tiles += count * (tile_base + width * tile_plane)
                for token in range(tokens):
                    _finish(job, image, token, sums + token * sum_step, first * TILE_ROWS, count * TILE_ROWS)

    return compiled(cfunc, work, types.void(types.int64), error_model="numpy").address


@njit(error_model="numpy")
def _widen_rows(address, rows, row_step, columns):
    """Activations → float32, and CHANGED if any differs from what was there."""
    job = longs(address)
    size = 4 if job[X_KIND] == FLOAT32 else 2
    while True:
        token = take_number(address + 8 * WIDENING)
        if token >= job[TOKENS]:
            break
        row = rows + token * row_step
        if widen(job[X_KIND], job[X] + token * columns * size, row, columns) != 0:
            job[CHANGED] = 1
        target = floats(row)
        for column in range(columns, row_step // 4):
            target[column] = 0
        add_number(address + 8 * WIDENED)
    wait_for(address + 8 * WIDENED, job[TOKENS])


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
    """Compiled ``run``: 0 if y was written, −1 if the activations have no tables, else the bytes the job must have."""
    version = source_hash()

    def run(job_address, threads, work, mode, record, together, image_address, x, x_kind, y, y_kind, bias, bias_kind,
            tokens):
        version  # noqa: B018 - a cell of the closure is part of the cache key
        job, image = longs(job_address), longs(image_address)
        slots = (tokens + together - 1) // together * together  # idle ones are computed from whatever is there
        need = JOB_BYTES + slots * (_row_bytes(image[COLUMNS]) + image[COLUMN_TILES] * record
                                    + image[ROW_TILES] * VECTOR)
        if job[CAPACITY] < need:
            return need
        job[IMAGE], job[X], job[X_KIND], job[Y], job[Y_KIND] = image_address, x, x_kind, y, y_kind
        job[BIAS], job[BIAS_KIND], job[TOKENS], job[SLOTS], job[THREADS] = bias, bias_kind, tokens, slots, threads
        for word in range(ARRIVED, REFUSED + 1):
            job[word] = 0
        for word in range(threads):
            job[RANGES + word] = 0
        batch = slots << 32 | tokens
        if job[KEPT_COLUMNS] == image[COLUMN_KEY] and job[KEPT_BATCH] == batch and job[KEPT_MODE] == mode:
            job[KEPT] = 1
        if threads > 1:
            for _ in prange(threads):
                call_stage(work, job_address)
        else:
            call_stage(work, job_address)
        job[KEPT_COLUMNS], job[KEPT_BATCH], job[KEPT_MODE] = image[COLUMN_KEY], batch, mode
        if job[REFUSED] != 0:
            job[KEPT_BATCH] = 0
            return -1
        return 0

    return compiled(njit, run, parallel=True, nogil=True, error_model="numpy")
