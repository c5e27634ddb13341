"""PackedMatrix → image: the planes in the order the kernels read them, in one block of memory.

A tile is 16 rows × 32, 64 or 128 columns of one bit-width (`records`). The tiles of a strip, up to 32 below each
other, follow one another; then come the next columns of the same strip. A strip is thus one sequential stream
whatever mixture of bit-widths it holds, and one unit of work for a thread. Strips never cross a row block.

A plane word holds 32 columns of a row, nibble i = columns 4i..4i+3. In a tile byte j of the word has nibble j in its
low half and nibble 4 + j in its high half, so one mask and one shift cut 64 bytes into two vectors of table indices.

An image has no addresses inside, only offsets: it may be copied, and it is one torch tensor for the operator.

Source: CPU.md section 5.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np

from kernels_numba.cpu.arena import allocate
from kernels_numba.cpu.records import VECTOR, WORD_COLUMNS, tile_bytes

TILE_ROWS = 16
STRIP_TILES = 32
STRIPS_OF_THREAD = 8  # so that threads finish together
PIECE = 1 << 14  # tiles repacked at a time: bounds temporary memory
(ROWS, COLUMNS, TILE_COLUMNS, COLUMN_TILES, STRIPS, ROW_TILES, STRIP_TABLE, BITS, ROW_MAP, COLUMN_MAP, COLUMN_KEY,
 SIZE, HEADER) = range(13)  # int64 words at the start of an image; the tables are given by their byte offset


def make_image(packed, threads: int | None = None) -> np.ndarray:
    """Return the image of a PackedMatrix on the CPU, uint8 [bytes].

    Parameters
    ----------
    packed : PackedMatrix
    threads : int or None
        How many threads the strips should keep busy; the number of processors if None. No result depends on it.
    """
    tile_columns = int(np.gcd(packed.group_size, 128))
    bits = packed.block_bits.numpy()  # [groups, row_blocks]
    tile_rows, row_block, strips = _strips(packed, threads or os.cpu_count() or 1)
    column_tiles = packed.groups * (packed.group_size // tile_columns)
    group = np.arange(column_tiles) * tile_columns // packed.group_size
    strip_bits = bits[group][:, row_block[strips[:, 0]]].T  # [strips, column_tiles]
    row_perm, col_perm = packed.row_perm.numpy().astype(np.int32), packed.col_perm.numpy().astype(np.int32)
    row_map = np.where(tile_rows < 0, np.int32(-1), row_perm[np.maximum(tile_rows, 0)])
    column_map = np.full(column_tiles * tile_columns, packed.shape[1], np.int32)
    column_map[: len(col_perm)] = col_perm
    header = np.zeros(HEADER, np.int64)
    header[[ROWS, COLUMNS, TILE_COLUMNS, COLUMN_TILES]] = *packed.shape, tile_columns, column_tiles
    header[[STRIPS, ROW_TILES]] = len(strips), len(tile_rows) // TILE_ROWS
    header[COLUMN_KEY] = column_key(column_map, packed.shape[1], tile_columns)
    widths = tile_bytes(tile_columns, strip_bits.astype(np.int64)) * strips[:, 1:2]  # bytes of a strip's tile column
    table = np.concatenate([strips, np.zeros((len(strips), 1), np.int64)], axis=1)
    parts, size = {STRIP_TABLE: table, BITS: np.ascontiguousarray(strip_bits), ROW_MAP: row_map.astype(np.int32),
                   COLUMN_MAP: column_map}, _aligned(header.nbytes)
    for field, part in parts.items():
        header[field], size = size, _aligned(size + part.nbytes)
    table[:, 2] = size + np.concatenate([[0], np.cumsum(widths.sum(1))[:-1]])
    header[SIZE] = size + widths.sum()
    image = allocate(int(header[SIZE]))
    image[: header.nbytes] = header.view(np.uint8)
    for field, part in parts.items():
        image[header[field] :][: part.nbytes] = part.reshape(-1).view(np.uint8)
    first = table[:, 2:] + np.cumsum(widths, axis=1) - widths  # first byte of a strip's tile column
    _write_tiles(image, packed, tile_columns, strips, first, tile_rows)
    return image


def column_key(column_map: np.ndarray, columns: int, tile_columns: int) -> int:
    """What tables of activations are kept for: a 64-bit hash of the order of the columns and how they are cut."""
    key = hashlib.blake2b(np.array([columns, tile_columns], np.int64).tobytes(), digest_size=8)
    key.update(column_map.tobytes())
    return int.from_bytes(key.digest(), "little", signed=True)


def _aligned(size: int) -> int:
    return int(size + -size % VECTOR)


def _strips(packed, threads):
    """(permuted row of every tile row or −1, row block of every tile, strips [n, 2] = first tile and tiles)."""
    rows, block_rows = packed.shape[0], packed.block_rows
    heights = np.minimum(block_rows, rows - np.arange(packed.row_blocks) * block_rows)
    tiles = -(-heights // TILE_ROWS)
    longest = int(np.clip(-(-tiles.sum() // (STRIPS_OF_THREAD * threads)), 4, STRIP_TILES))
    row_block = np.repeat(np.arange(packed.row_blocks), tiles)
    inside = np.arange(len(row_block)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    local = inside[:, None] * TILE_ROWS + np.arange(TILE_ROWS)
    tile_rows = np.where(local < heights[row_block][:, None], row_block[:, None] * block_rows + local, -1)
    first = np.flatnonzero(inside % longest == 0)
    counts = np.diff(np.append(first, len(row_block)))
    return tile_rows.ravel(), row_block, np.stack([first, counts], axis=1)


def _write_tiles(image, packed, tile_columns, strips, first, tile_rows):
    """Copy planes, alpha and beta into their tiles, many blocks of one bit-width at a time."""
    bits = packed.block_bits.numpy()
    starts = packed.block_offsets().numpy()[:-1].reshape(bits.shape)
    strip = np.repeat(np.arange(len(strips)), strips[:, 1])  # of every tile of rows
    above = np.arange(len(strip)) - strips[strip, 0]  # tiles above it in its strip
    tile_rows = tile_rows.reshape(-1, TILE_ROWS)
    block = tile_rows[:, 0] // packed.block_rows
    alpha, beta = (part.numpy() for part in (packed.alpha, packed.beta))
    spread = packed.group_size // tile_columns  # tiles beside each other in a group
    for width in np.unique(bits).tolist():
        size = tile_bytes(tile_columns, width)
        for group, tile in _pieces(*np.nonzero(bits[:, block] == width)):
            rows = tile_rows[tile]
            planes = _planes(packed, width, starts[group, block[tile]], rows, rows % packed.block_rows)
            planes = planes.reshape(len(tile), spread, -1)
            record = np.empty((len(tile), spread, size), np.uint8)
            record[..., :-VECTOR] = planes.view(np.uint8)
            scales = [np.where(rows < 0, np.float16(0), part[group[:, None], rows]) for part in (alpha, beta)]
            record[..., -VECTOR:] = np.concatenate(scales, axis=1).view(np.uint8)[:, None]
            column = group[:, None] * spread + np.arange(spread)
            line = (first[strip[tile][:, None], column] + above[tile][:, None] * size) // VECTOR
            line = line[..., None] + np.arange(size // VECTOR)
            image.reshape(-1, VECTOR)[line] = record.reshape(*line.shape, VECTOR)


def _pieces(*arrays):
    for start in range(0, len(arrays[0]), PIECE):
        yield [array[start : start + PIECE] for array in arrays]


def _planes(packed, width, start, rows, local):
    """Interleaved words of some tiles: uint32 [n, group_size/32 · width, 16]."""
    step = np.arange(packed.group_size // WORD_COLUMNS * width)  # a block is stored as [word][bit][row]
    index = start[:, None, None] + step[:, None] * packed.block_rows + local[:, None]
    found = packed.planes.numpy().view(np.uint32)[np.where(rows[:, None] < 0, 0, index)]
    return interleave_nibbles(np.where(rows[:, None] < 0, np.uint32(0), found))


def interleave_nibbles(words: np.ndarray) -> np.ndarray:
    """uint32: nibbles 0..3 become the low and 4..7 the high halves of bytes 0..3.

    Examples
    --------
    >>> hex(interleave_nibbles(np.array([0x76543210], np.uint32))[0])
    '0x73625140'
    """
    return _nibbles_to_bytes(words & 0xFFFF) | _nibbles_to_bytes(words >> 16) << 4


def _nibbles_to_bytes(words):
    words = (words | words << 8) & 0x00FF00FF
    return (words | words << 4) & 0x0F0F0F0F


def mean_bits(image: np.ndarray) -> float:
    """Mean bit-width of the tiles, padding included."""
    header = image[: 8 * HEADER].view(np.int64)
    start = image[header[STRIP_TABLE] + 16 :][:8].view(np.int64)[0]
    tiles, plane = header[ROW_TILES] * header[COLUMN_TILES], tile_bytes(int(header[TILE_COLUMNS]), 1) - VECTOR
    return float((header[SIZE] - start - tiles * VECTOR) / (tiles * plane))
