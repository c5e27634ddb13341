"""Sizes that layouts and kernels agree on."""

from __future__ import annotations

LANES = 32
LANE_COLUMNS = 8  # of a lane in a tile of the look-up kernel: a byte of a plane
TILE_COLUMNS = LANES * LANE_COLUMNS
STRIP_ROWS = 16
LINE_BYTES = TILE_COLUMNS * STRIP_ROWS // 8
