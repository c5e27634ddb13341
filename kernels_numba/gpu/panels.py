"""Products of many tokens: a kernel writes the weight, or a panel of its rows, in half precision, and torch multiplies.

Weights are rounded once to the dtype of x; torch adds in float32.
"""

from __future__ import annotations

import numpy as np
import torch

from kernels_numba.gpu import dequantize_run

WORKSPACE_BYTES = 512 << 20  # most memory of a panel; 28672 × 8192 fits
GATHER, PLACE = "gather", "place"  # arrays of the image, beside those of the layout


def arrays(layout) -> dict[str, np.ndarray]:
    """What `multiply` reads from an image.

    Returns
    -------
    gather : int32 [length], column of x of every column of a panel; the one after the last for zeros
    place : int32 [N], row of all panels of every row of the matrix
    """
    columns = dequantize_run.columns(layout)
    place = np.zeros(layout.shape[0], np.int32)
    place[layout.rows[layout.rows >= 0]] = np.flatnonzero(layout.rows >= 0)
    return {GATHER: np.where(columns < 0, layout.shape[1], columns).astype(np.int32), PLACE: place}


def multiply(weight, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Enqueue y = x Wᵀ + bias.

    Parameters
    ----------
    weight : Weight of mode "mma"
    x, y : float16 or bfloat16 [tokens, K], [tokens, N], contiguous
    bias : floating [N] or None
    """
    layout, x = weight.structure.layout, x.detach()
    whole, rows = len(layout.strip_chunk), dequantize_run.STRIP_ROWS
    if (dequantize_run.columns(layout) < 0).any():
        x = torch.cat([x, x.new_zeros(len(x), 1)], dim=1)
    x = x.index_select(1, _numbers(weight, GATHER, layout.length))
    step = max(1, WORKSPACE_BYTES // (2 * layout.length * rows))
    found = y if step >= whole else x.new_empty(len(x), rows * whole)  # natural rows, or those of all panels
    for first in range(0, whole, step):
        strips = min(step, whole - first)
        workspace = x.new_empty(*dequantize_run.workspace_shape(layout, strips))
        weight.panel(x.dtype, first, strips)(workspace.data_ptr(), 0)
        torch.mm(x, workspace.T, out=found[:, rows * first :][:, : len(workspace)])
    if found is not y:
        torch.index_select(found, 1, _numbers(weight, PLACE, weight.rows), out=y)
    if bias is not None:
        y += bias.detach()


def _numbers(weight, name: str, count: int) -> torch.Tensor:
    """An int32 array of the image, on the device."""
    first = weight.structure.places[name]
    return weight.image[first : first + 4 * count].view(torch.int32)
