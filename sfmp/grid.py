"""The block grid of one matrix: block_rows output rows by group_size input columns share one bit-width."""

import dataclasses

import numpy as np

from sfmp.checks import integer


@dataclasses.dataclass(frozen=True)
class BlockGrid:
    """The blocks of one matrix; the last row block and the last group may be short."""

    out_features: int
    in_features: int
    block_rows: int
    group_size: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            integer(field.name, getattr(self, field.name), 1)

    @property
    def row_blocks(self) -> int:
        return -(-self.out_features // self.block_rows)

    @property
    def groups(self) -> int:
        return -(-self.in_features // self.group_size)

    @property
    def weights(self) -> np.ndarray:
        """Real (unpadded) weights of each block, int64 [row_blocks, groups]."""
        rows = np.minimum(self.block_rows, self.out_features - self.block_rows * np.arange(self.row_blocks))
        cols = np.minimum(self.group_size, self.in_features - self.group_size * np.arange(self.groups))
        return np.outer(rows, cols).astype(np.int64)
