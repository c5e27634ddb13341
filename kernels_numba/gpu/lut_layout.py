"""PackedMatrix → what the look-up kernel reads.

A line is one plane of 16 rows × 256 columns, 512 bytes that a warp loads with one instruction: the 16 bytes of lane l
are the bytes of the 16 rows for columns 8l … 8l+7 of the tile, the lowest column in the lowest bit. Lines are ordered
[row block][tile][strip][plane], the highest plane first (the kernel doubles its sums from plane to plane).

Source: CUDA.md section 5.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from kernels_numba.gpu.records import LANE_COLUMNS, LANES, STRIP_ROWS, TILE_COLUMNS
from kernels_numba.gpu.segments import column_map, gather_segments, make_tiles, row_strips, scale_words
from sfmp.planes import unpack_planes


@dataclasses.dataclass(frozen=True)
class LutLayout:
    """Arrays of one matrix for the look-up kernel.

    Attributes
    ----------
    lines : uint32 [lines · 128]
    scales : uint32 [records · 32 · 128/segment]
        One record per tile and strip: alpha and beta of the rows that a lane holds when the sums over its segment
        are complete, see `held_row`.
    tile_bits, tile_line, tile_record : int32 [tiles], planes, first line and first record of a tile
    segments : int32 [tiles · 256/segment], `segments.Tiles.segments`
    columns : int32 [groups · group_size], natural column of a permuted one or −1
    block_tiles, block_strips : int32 [row_blocks + 1], first tile and first strip of a row block
    rows : int32 [strips · 16], natural row of every row of a strip or −1
    segment : int, columns of a segment
    shape : (N, K)
    """

    lines: np.ndarray
    scales: np.ndarray
    tile_bits: np.ndarray
    tile_line: np.ndarray
    tile_record: np.ndarray
    segments: np.ndarray
    columns: np.ndarray
    block_tiles: np.ndarray
    block_strips: np.ndarray
    rows: np.ndarray
    segment: int
    shape: tuple[int, int]


def held_row(lane: np.ndarray, segment: int) -> np.ndarray:
    """First of the 128/segment rows of a strip that a lane holds when 16 sums were added over its segment.

    Every step of that sum halves the rows a lane holds: a lane keeps the upper half if its bit is set.

    Examples
    --------
    >>> held_row(np.arange(10), 64).tolist()
    [0, 2, 4, 6, 8, 10, 12, 14, 0, 2]
    """
    return lane % (segment // LANE_COLUMNS) * (128 // segment)


def make_layout(packed) -> LutLayout:
    """Return the layout of a PackedMatrix, as NumPy arrays.

    Takes a byte per weight of temporary memory.
    """
    rows, size = packed.shape[0], packed.group_size
    bits = packed.block_bits.cpu().numpy()
    tiles = make_tiles(bits, size, TILE_COLUMNS)
    strips, permuted = row_strips(rows, packed.block_rows, STRIP_ROWS)
    codes = unpack_planes(packed.planes.cpu(), packed.block_bits.cpu(), size, packed.block_rows).numpy()
    per_group = size // tiles.segment
    alpha, beta = (np.repeat(part.cpu().numpy().T, per_group, axis=1) for part in (packed.alpha, packed.beta))
    row_perm = packed.row_perm.cpu().numpy().astype(np.int32)
    lines, scales = [], []
    for block, (tile, last) in enumerate(zip(tiles.first[:-1], tiles.first[1:], strict=True)):
        chosen = permuted[strips[block] * STRIP_ROWS : strips[block + 1] * STRIP_ROWS]
        own_codes, own_alpha, own_beta = (_padded(part, chosen) for part in (codes, alpha, beta))
        segments, widths = tiles.segments[tile:last], tiles.bits[tile:last]
        record = scale_words(own_alpha, own_beta)  # [rows, segments of the matrix]
        scales.append(_records(gather_segments(record, segments, 1), tiles.segment).ravel())
        for width in np.unique(widths)[::-1]:
            lines.append(_lines(gather_segments(own_codes, segments[widths == width], tiles.segment), width).ravel())
    heights = np.repeat(np.diff(strips), np.diff(tiles.first))  # strips of every tile
    natural = np.where(permuted < 0, permuted, row_perm[np.maximum(permuted, 0)])
    return LutLayout(np.concatenate(lines), np.concatenate(scales), tiles.bits, _starts(heights * tiles.bits),
                     _starts(heights), tiles.segments.ravel(),
                     column_map(packed.col_perm.cpu().numpy(), packed.groups, size), tiles.first, strips, natural,
                     tiles.segment, tuple(packed.shape))


def _starts(sizes):
    return (np.cumsum(sizes) - sizes).astype(np.int32)


def _padded(values, permuted):
    """Rows of a block, zeros for those that are not there."""
    return np.where(permuted[:, None] < 0, values.dtype.type(0), values[np.maximum(permuted, 0)])


def _lines(codes, width):
    """[tiles, rows, 256] codes → uint32 [tiles, strips, width, 32 lanes, 4]."""
    planes = codes[:, None] >> np.arange(width - 1, -1, -1, dtype=np.uint8)[:, None, None] & 1
    packed = np.packbits(planes, axis=-1, bitorder="little")  # [tiles, width, rows, lanes]
    packed = packed.reshape(len(codes), width, -1, STRIP_ROWS, LANES).transpose(0, 2, 1, 4, 3)
    return np.ascontiguousarray(packed).view(np.uint32)


def _records(words, segment):
    """[tiles, rows, segments of a tile] → uint32 [tiles, strips, 32 lanes, 128/segment]."""
    lane = np.arange(LANES)[:, None]
    row = held_row(lane, segment) + np.arange(128 // segment)
    strips = words.reshape(len(words), -1, STRIP_ROWS, words.shape[2])
    return strips[:, :, row, lane // (segment // LANE_COLUMNS)]
