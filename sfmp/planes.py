"""Codes ↔ bit planes, at the level of words (DESIGN §4).

One int32 word holds one bit of 32 consecutive columns of one row: bit t of a word = column 32·w + t. Blocks
follow each other with the group outer and the row block inner; inside a block of b bits the words are ordered
[group_size/32][bit][block_rows]. All blocks of equal bit-width are handled at once; there is no loop over
blocks.
"""

from __future__ import annotations

import numpy as np
import torch

WORD = 32
MAX_BITS = 8


def pack_planes(codes: np.ndarray, bits: np.ndarray, group_size: int, block_rows: int) -> np.ndarray:
    """Return the planes, int32 [words].

    Parameters
    ----------
    codes : uint8 [row_blocks·block_rows, groups·group_size], padded with zeros
    bits : uint8 [groups, row_blocks], storage order
    """
    groups, row_blocks = bits.shape
    words = group_size // WORD
    blocks = codes.reshape(row_blocks, block_rows, groups, words, WORD).transpose(2, 0, 3, 1, 4)
    flat = bits.ravel().astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(flat * words * block_rows)])
    planes = np.empty(starts[-1], np.int32)
    for width in np.unique(flat).tolist():
        chosen = np.flatnonzero(flat == width)
        same = blocks[np.divmod(chosen, row_blocks)]  # [n, words, rows, 32]
        packed = [np.packbits((same >> k) & 1, axis=-1, bitorder="little") for k in range(width)]
        size = width * words * block_rows
        target = starts[chosen][:, None] + np.arange(size)
        planes[target] = np.stack(packed, axis=2).view("<i4").reshape(len(chosen), size)
    return planes


def unpack_planes(planes: torch.Tensor, bits: torch.Tensor, group_size: int, block_rows: int) -> torch.Tensor:
    """Return the codes, uint8 [row_blocks·block_rows, groups·group_size], on the device of the planes.

    Each plane byte is spread over eight byte lanes by one table look-up, so a code costs 1/8 look-up per bit.

    Parameters
    ----------
    planes : int32 [words]
    bits : uint8 [groups, row_blocks]
    """
    device = planes.device
    table = _spread_table(device)
    groups, row_blocks = bits.shape
    words = group_size // WORD
    lanes = torch.empty(row_blocks * block_rows, groups * words * 4, dtype=torch.int64, device=device)
    target = lanes.view(row_blocks, block_rows, groups, words, 4).permute(2, 0, 3, 1, 4)
    flat = bits.flatten().long()
    starts = block_offsets(bits, group_size, block_rows)
    for width in flat.unique().tolist():
        chosen = torch.nonzero(flat == width).squeeze(1)
        size = width * words * block_rows
        same = planes
        if len(chosen) != len(flat):
            same = planes[(starts[chosen].unsqueeze(1) + torch.arange(size, device=device)).flatten()]
        index = same.view(torch.uint8).view(len(chosen), words, width, block_rows * 4).int()
        codes = table[index[:, :, 0]]
        for k in range(1, width):
            codes |= table[index[:, :, k]] << k
        rows_of_words = codes.view(len(chosen), words, block_rows, 4)
        target[chosen // row_blocks, chosen % row_blocks] = rows_of_words
    return lanes.view(torch.uint8)


def block_offsets(bits: torch.Tensor, group_size: int, block_rows: int) -> torch.Tensor:
    """Return the first word of each block, and the total at the end: int64 [groups·row_blocks + 1]."""
    sizes = bits.flatten().long() * (group_size // WORD * block_rows)
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


_SPREAD: dict[torch.device, torch.Tensor] = {}


def _spread_table(device: torch.device) -> torch.Tensor:
    """int64 [256]: byte lane t of entry v is bit t of v (little endian, like the stored words)."""
    if device not in _SPREAD:
        lanes = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
        with torch.inference_mode(False):  # a later forward may need gradients
            _SPREAD[device] = torch.from_numpy(lanes.view("<i8").ravel().copy()).to(device)
    return _SPREAD[device]
