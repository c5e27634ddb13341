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

import os
import zlib

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
    header[COLUMN_KEY] = zlib.crc32(column_map.tobytes()) << 16 | tile_columns
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
            planes = planes.reshape(len(tile), width, spread, -1, TILE_ROWS).swapaxes(1, 2)
            record = np.empty((len(tile), spread, size), np.uint8)
            record[..., :-VECTOR] = np.ascontiguousarray(planes).view(np.uint8).reshape(len(tile), spread, -1)
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
    """Interleaved words of some tiles: uint32 [n, width, group_size/32, 16]."""
    words = packed.group_size // WORD_COLUMNS
    step = np.arange(words) * width + np.arange(width)[:, None]  # a block is stored as [word][bit][row]
    index = start[:, None, None, None] + step[..., None] * packed.block_rows + local[:, None, None]
    found = packed.planes.numpy().view(np.uint32)[np.where(rows[:, None, None] < 0, 0, index)]
    return interleave_nibbles(np.where(rows[:, None, None] < 0, np.uint32(0), found))


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


def read_image(image: np.ndarray):
    """Return (codes uint8, levels uint8, alpha, beta float16), each [tile rows, tile columns · width] as in the image.

    The inverse of `make_image`: every byte of every tile is read. levels is 2^b − 1 of each weight.
    """
    header = image[: 8 * HEADER].view(np.int64)
    columns, tile_columns = int(header[TILE_COLUMNS]), int(header[COLUMN_TILES])
    strips = image[header[STRIP_TABLE] :][: 24 * header[STRIPS]].view(np.int64).reshape(-1, 3)
    bits = image[header[BITS] :][: header[STRIPS] * tile_columns].reshape(-1, tile_columns)
    codes = np.zeros((int(header[ROW_TILES]), TILE_ROWS, tile_columns, columns), np.uint8)
    levels = np.zeros_like(codes)
    alpha, beta = (np.zeros(codes.shape[:3], np.float16) for _ in range(2))
    for (first, count, start), strip_bits in zip(strips.tolist(), bits.tolist(), strict=True):
        for column, width in enumerate(strip_bits):
            size = tile_bytes(columns, width)
            tiles = image[start : start + count * size].reshape(count, size)
            start += count * size
            part = slice(first, first + count)
            words = np.ascontiguousarray(tiles[:, :-VECTOR]).view(np.uint32)
            words = separate_nibbles(words).reshape(count, width, -1, TILE_ROWS).transpose(0, 3, 2, 1)
            planes = np.unpackbits(np.ascontiguousarray(words)[..., None].view(np.uint8), axis=-1, bitorder="little")
            weights = (1 << np.arange(width, dtype=np.uint8))[:, None]
            codes[part, :, column] = (planes * weights).sum(axis=3, dtype=np.uint8).reshape(count, TILE_ROWS, -1)
            levels[part, :, column] = (1 << width) - 1
            alpha[part, :, column], beta[part, :, column] = np.ascontiguousarray(tiles[:, -VECTOR:]).view(
                np.float16).reshape(count, 2, TILE_ROWS).swapaxes(0, 1)
    wide = [np.broadcast_to(scale[..., None], codes.shape) for scale in (alpha, beta)]
    return tuple(array.reshape(-1, tile_columns * columns) for array in (codes, levels, *wide))


def dequantize(image: np.ndarray) -> np.ndarray:
    """Return W, float32 [N, K] in natural order: the same bits as ``PackedMatrix.dequantize``."""
    header = image[: 8 * HEADER].view(np.int64)
    codes, levels, alpha, beta = (array.astype(np.float32) for array in read_image(image))
    tiles = alpha * (2 * codes - levels) + beta
    row_map = image[header[ROW_MAP] :][: 4 * len(tiles)].view(np.int32)
    column_map = image[header[COLUMN_MAP] :][: 4 * tiles.shape[1]].view(np.int32)
    weight = np.empty((int(header[ROWS]), int(header[COLUMNS]) + 1), np.float32)  # padded columns share the last
    for row in np.flatnonzero(row_map >= 0):
        weight[row_map[row], column_map] = tiles[row]
    return weight[:, :-1]


def separate_nibbles(words: np.ndarray) -> np.ndarray:
    """The inverse of `interleave_nibbles`."""
    return _bytes_to_nibbles(words & 0x0F0F0F0F) | _bytes_to_nibbles(words >> 4 & 0x0F0F0F0F) << 16


def _bytes_to_nibbles(words):
    words = (words | words >> 4) & 0x00FF00FF
    return (words | words >> 8) & 0xFFFF
