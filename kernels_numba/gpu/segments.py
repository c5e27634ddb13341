"""How the columns of a row block are cut into tiles of one bit-width.

A segment is the largest piece of 32, 64 or 128 columns that lies in one quantization group. Both kernels work on tiles
of several segments and read as many planes as the tile has bits, so a tile takes segments of equal bits, wherever they
lie; which ones is stored, and the kernels gather activations by it. A tile that cannot be filled has empty segments.

Source: CUDA.md sections 4.1 (groups sorted by bits) and 4.4 (group sizes).
"""

from __future__ import annotations

import dataclasses

import numpy as np

EMPTY = -1  # number of a segment, column or row that is not there
SEGMENTS = (32, 64, 128)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of all row blocks, one block after the other.

    Attributes
    ----------
    segment : int, columns of a segment
    first : int32 [row_blocks + 1], first tile of every row block, and the number of tiles
    bits : int32 [tiles], largest first within a row block
    segments : int32 [tiles, tile_columns/segment], numbers of segments in permuted columns, or `EMPTY`
    """

    segment: int
    first: np.ndarray
    bits: np.ndarray
    segments: np.ndarray


def make_tiles(block_bits: np.ndarray, group_size: int, tile_columns: int) -> Tiles:
    """Sort the segments of every row block by bits and fill tiles with them.

    Parameters
    ----------
    block_bits : uint8 [groups, row_blocks]
    group_size : int, a multiple of 32
    tile_columns : int, a multiple of 128

    Examples
    --------
    >>> tiles = make_tiles(np.array([[2], [3], [2]], np.uint8), 128, 256)
    >>> tiles.bits.tolist(), tiles.segments.tolist(), tiles.first.tolist()
    ([3, 2], [[1, -1], [0, 2]], [0, 2])
    """
    segment = int(np.gcd(group_size, SEGMENTS[-1]))
    per_tile = tile_columns // segment
    first, bits, segments = [0], [], []
    for widths in block_bits.T:
        widths = np.repeat(widths, group_size // segment)
        for width in np.unique(widths)[::-1]:
            found = np.flatnonzero(widths == width)
            found = np.append(found, np.full(-len(found) % per_tile, EMPTY))
            segments.append(found.reshape(-1, per_tile))
            bits += [width] * len(segments[-1])
        first.append(len(bits))
    return Tiles(segment, np.array(first, np.int32), np.array(bits, np.int32),
                 np.concatenate(segments).astype(np.int32))


def column_map(col_perm: np.ndarray, groups: int, group_size: int) -> np.ndarray:
    """Natural column of every permuted one, padding `EMPTY`: int32 [groups·group_size]."""
    columns = np.full(groups * group_size, EMPTY, np.int32)
    columns[: len(col_perm)] = col_perm
    return columns


def row_strips(rows: int, block_rows: int, strip_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut every row block into strips.

    Returns
    -------
    strips : int32 [row_blocks + 1], first strip of every row block, and the number of strips
    permuted : int32 [strips·strip_rows], permuted row of every row of a strip, padding `EMPTY`

    Examples
    --------
    >>> row_strips(5, 3, 2)[1].tolist()
    [0, 1, 2, -1, 3, 4]
    """
    heights = np.minimum(block_rows, rows - np.arange(0, rows, block_rows))
    strips = np.append(0, np.cumsum(-(-heights // strip_rows)))
    permuted = np.full(strips[-1] * strip_rows, EMPTY, np.int32)
    for block, height in enumerate(heights):
        permuted[strips[block] * strip_rows :][:height] = block * block_rows + np.arange(height)
    return strips.astype(np.int32), permuted


def gather_segments(values: np.ndarray, segments: np.ndarray, segment: int) -> np.ndarray:
    """Take the columns of tiles: [rows, columns] → [tiles, rows, tile columns], zero where a segment is empty."""
    parts = values.reshape(len(values), -1, segment)[:, np.maximum(segments, 0)]  # [rows, tiles, segments, columns]
    parts = np.where((segments == EMPTY)[None, :, :, None], values.dtype.type(0), parts)
    return parts.transpose(1, 0, 2, 3).reshape(len(segments), len(values), -1)


def scale_words(alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """float16, float16 → uint32 with alpha in the low half, which a kernel reads in one load."""
    low, high = (np.ascontiguousarray(part).view(np.uint16).astype(np.uint32) for part in (alpha, beta))
    return low | high << 16
