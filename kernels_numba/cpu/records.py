"""Sizes of the two records that kernels share: a tile of the weight and the tables of its columns.

Tile (16 rows × 32, 64 or 128 columns, b bits): for each 32 columns, for each bit, 64 bytes of plane; then 16 float16
alpha and 16 float16 beta. Tables (the same columns of one token): 16 entries for every 4 columns, of 1, 2 or 4 bytes,
then one vector whose first two float32 are the step of the entries and the sum of the activations.
"""

from __future__ import annotations

WORD_COLUMNS = 32  # columns of one plane word, and of one vector of planes
VECTOR = 64  # bytes
MODES = ("lut16", "lut8", "exact")  # the default first
TOKENS = {"lut16": 4, "lut8": 8, "exact": 4}  # that share the index vectors in one kernel
_ENTRY_BYTES = {"lut16": 2, "lut8": 1, "exact": 4}


def tile_bytes(columns: int, bits):
    """Bytes of a tile; `bits` may be an integer array.

    Examples
    --------
    >>> tile_bytes(128, 2)
    576
    """
    return bits * (columns // WORD_COLUMNS * VECTOR) + VECTOR


def table_bytes(columns: int, mode: str) -> int:
    """Bytes of the tables of one token over the columns of a tile.

    Examples
    --------
    >>> table_bytes(128, "lut8"), table_bytes(128, "lut16"), table_bytes(32, "exact")
    (576, 1088, 576)
    """
    return columns // 4 * 16 * _ENTRY_BYTES[mode] + VECTOR
