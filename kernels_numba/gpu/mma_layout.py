"""PackedMatrix → what the tensor-core kernel reads.

A unit is 32 rows × 128 columns of b bits, b chunks of 512 bytes that a warp loads with one instruction each. Lane
l = 4g + t holds the codes of rows g + 8·rho (rho = 0…3) that tensor cores want from it. Column 32i + 8t + 4·odd + 2h +
e of a unit is slot (i, odd, h, e): step 2i + odd of 16 columns, register h, half e of the register. Places of a code:

4 bits  word 4·rho + i, bit 8h + 4·odd + 16e
3 bits  likewise for i = 0…2, in words 3·rho + i; bit k of the codes of i = 3 rides in bit 3 of the nibbles of word k
2 bits  word 2·rho + h, bit 2(2i + odd) + 16e
1 bit   word rho, bit 8h + 2i + odd + 16e

so that one shift and one mask give two codes as float16 subnormals, whose factor is a constant. More than 4 bits are a
unit of the 4 low bits and one of the others.

Source: CUDA.md section 4.1. Differences: units of several groups where groups are narrower than 128, one record of
scales per segment of a unit also where groups are wider.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from kernels_numba.gpu.segments import EMPTY, column_map, gather_segments, make_tiles, row_strips, scale_words
from sfmp.planes import unpack_planes

UNIT_ROWS, UNIT_COLUMNS = 32, 128
AHEAD = 128  # tiles that a kernel may look beyond the last one


@dataclasses.dataclass(frozen=True)
class MmaLayout:
    """Arrays of one matrix for the tensor-core kernel.

    Attributes
    ----------
    units : uint32 [chunks · 128], ordered [row block][strip of 32 rows][tile]
    scales : uint32 [strips · tiles · segments of a unit · 32]
        Order as the units; alpha and beta of row g + 8·rho at place 4g + rho.
    tiles : int32 [row_blocks · table_tiles]
        Bits + 16 · chunks before the tile in its strip; at least `AHEAD` zeros after the last tile of a row block.
    segments : int32 [row_blocks · table_tiles · 128/segment]
        Numbers of segments; where there is none, that of one without columns.
    columns : int32 [segments and at least one without columns, a multiple of 128]
        Natural column of a permuted one or −1.
    block_tiles : int32 [row_blocks + 1], tiles before a row block
    strip_block, strip_chunk, strip_record : int32 [strips], row block, first chunk and first record of 32 scales
    rows : int32 [strips · 32], natural row or −1
    segment : int, columns of a segment
    length : int, columns of all segments, a multiple of 32
    table_tiles : int, of a row block in tables
    most_strips : int, strips of a row block other than the last
    widths : tuple of the bit-widths that occur
    shape : (N, K)
    """

    units: np.ndarray
    scales: np.ndarray
    tiles: np.ndarray
    segments: np.ndarray
    columns: np.ndarray
    block_tiles: np.ndarray
    strip_block: np.ndarray
    strip_chunk: np.ndarray
    strip_record: np.ndarray
    rows: np.ndarray
    segment: int
    length: int
    table_tiles: int
    most_strips: int
    widths: tuple[int, ...]
    shape: tuple[int, int]


def make_layout(packed) -> MmaLayout:
    """Return the layout of a PackedMatrix, as NumPy arrays.

    Takes a byte per weight of temporary memory, and four in a row block.
    """
    rows, size = packed.shape[0], packed.group_size
    tiles = make_tiles(packed.block_bits.cpu().numpy(), size, UNIT_COLUMNS)
    strips, permuted = row_strips(rows, packed.block_rows, UNIT_ROWS)
    codes = unpack_planes(packed.planes.cpu(), packed.block_bits.cpu(), size, packed.block_rows).numpy()
    alpha, beta = (np.repeat(part.cpu().numpy().T, size // tiles.segment, axis=1) for part in
                   (packed.alpha, packed.beta))
    row_perm = packed.row_perm.cpu().numpy().astype(np.int32)
    counts, per_unit = np.diff(tiles.first), UNIT_COLUMNS // tiles.segment
    columns = column_map(packed.col_perm.cpu().numpy(), packed.groups, size)
    length, most = len(columns), int(counts.max()) + AHEAD
    empty = length // tiles.segment
    columns = np.append(columns, np.full(UNIT_COLUMNS - length % UNIT_COLUMNS, EMPTY, np.int32))
    table = np.zeros((len(counts), most), np.int32)
    numbers = np.full((len(counts), most, per_unit), empty, np.int32)
    units, scales, chunks, records = [], [], [], []
    for block, (first, last) in enumerate(zip(tiles.first[:-1], tiles.first[1:], strict=True)):
        chosen = permuted[strips[block] * UNIT_ROWS : strips[block + 1] * UNIT_ROWS]
        own = [np.where(chosen[:, None] < 0, part.dtype.type(0), part[np.maximum(chosen, 0)])
               for part in (codes, alpha, beta)]
        segments, bits = tiles.segments[first:last], tiles.bits[first:last]
        height = len(chosen) // UNIT_ROWS
        parts = []
        for width in np.unique(bits)[::-1]:
            tile_codes = gather_segments(own[0], segments[bits == width], tiles.segment)
            words = unit_words(tile_codes.reshape(-1, UNIT_ROWS, UNIT_COLUMNS), int(width))
            parts.append(words.reshape(-1, height, width * 128).transpose(1, 0, 2).reshape(height, -1))
        units.append(np.concatenate(parts, axis=1).ravel())
        record = gather_segments(scale_words(*own[1:]), segments, 1).reshape(len(bits), height, 4, 8, -1)
        scales.append(record.transpose(1, 0, 4, 3, 2).ravel())  # [strip, tile, segment, g, rho]
        table[block, : len(bits)] = bits + 16 * (np.cumsum(bits) - bits)
        numbers[block, : len(bits)] = np.where(segments < 0, empty, segments)
        chunks += [int(bits.sum())] * height
        records += [segments.size] * height
    natural = np.where(permuted < 0, permuted, row_perm[np.maximum(permuted, 0)])
    return MmaLayout(
        np.concatenate(units), np.concatenate(scales), table.ravel(), numbers.ravel(), columns, tiles.first,
        np.repeat(np.arange(len(counts), dtype=np.int32), np.diff(strips)), _starts(chunks), _starts(records),
        natural, tiles.segment, length, most, int(strips[1]), tuple(np.unique(tiles.bits).tolist()),
        tuple(packed.shape))


def unit_words(codes: np.ndarray, width: int) -> np.ndarray:
    """Codes of units, uint8 [units, 32, 128] → uint32 [units, width, 32 lanes, 4]."""
    if width > 4:
        parts = unit_words(codes & 15, 4), unit_words(codes >> 4, width - 4)
        return np.concatenate(parts, axis=1)
    slots = codes.astype(np.uint32).reshape(-1, 4, 8, 4, 4, 2, 2, 2)  # [unit, rho, g, i, t, odd, h, e]
    i, odd, h, e = np.ogrid[:4, :2, :2, :2]
    if width >= 3:
        words = _gather(slots, 8 * h + 4 * odd + 16 * e + 0 * i, (5, 6, 7))  # [unit, rho, g, i, t]
        if width == 3:
            rest = [(words[:, :, :, 3] >> np.uint32(k) & np.uint32(0x11111111)) << np.uint32(3) for k in range(3)]
            words = words[:, :, :, :3] | np.stack(rest, axis=3)
        words = words.transpose(0, 2, 4, 1, 3)
    elif width == 2:
        words = _gather(slots, 2 * (2 * i + odd) + 16 * e + 0 * h, (3, 5, 7)).transpose(0, 2, 3, 1, 4)
    else:
        words = _gather(slots, 8 * h + 2 * i + odd + 16 * e, (3, 5, 6, 7)).transpose(0, 2, 3, 1)
    return words.reshape(-1, 32, width, 4).transpose(0, 2, 1, 3)


def _gather(slots, shifts, axes):
    moved = slots << shifts[:, None].astype(np.uint32)
    return np.bitwise_or.reduce(moved, axis=axes)


def _starts(sizes):
    return (np.cumsum(sizes) - sizes).astype(np.int32)
