"""What a product of one token moves and computes, counted from the arrays that kernels really read. No clock, no GPU.

A byte is counted once if it comes from memory once. What stays on the chip is counted on its own: tables that are
built, and activations that several thread blocks read again.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from sfmp.bench.random_model import random_packed

BITS = (2.0, 2.5, 3.0, 3.5, 4.0)
SHAPE, GROUP_SIZE, BLOCK_ROWS = (4096, 4096), 128, 512
HALF = 2  # bytes of an activation and of a result
MOVED = ("planes", "scales", "metadata", "activations", "partial_sums", "results")
COMPUTED = ("lookups", "additions", "multiply_adds", "unpacked_codes", "tensor_multiply_adds")
BLOCKS = 2 * 132  # thread blocks of the look-up kernel: two for each multiprocessor of an H200
THREADS = 2  # strips of the CPU image depend on it, sizes hardly
LANE_SUMS = 16  # additions of a lane that bring 16 rows of 32 lanes together


def traffic_table(shape: tuple[int, int] = SHAPE, bits=BITS, seed: int = 0) -> pd.DataFrame:
    """Bytes and operations of y = x Wᵀ for one float16 token, by storage and by mean bits of the codes.

    Parameters
    ----------
    shape : (N, K)
    bits : sequence of float, 2 to 4; a fraction mixes blocks of the two widths around it

    Returns
    -------
    pandas.DataFrame
        `storage` (checkpoint, gpu lut, gpu mma, cpu, float16) and `bits`; bytes from and to memory `planes, scales,
        metadata, activations, partial_sums, results`, their sum `bytes`, `bits_per_weight`, `of_float16`; on the chip
        `table_bytes` built and `activation_reads`, bytes of the token that thread blocks or strips read in all;
        operations `lookups, additions` (of looked-up sums and of lanes), `multiply_adds`, `unpacked_codes` (codes
        turned into numbers), `tensor_multiply_adds`. "checkpoint" is what is stored: nothing is computed with it.
    """
    rows = []
    for mean in bits:
        packed = random_packed(*shape, mean + 32 / GROUP_SIZE, GROUP_SIZE, BLOCK_ROWS, seed, mixed=False)
        counted = {"checkpoint": _checkpoint(packed), "gpu lut": _lut(packed), "gpu mma": _mma(packed),
                   "cpu": _cpu(packed)}
        rows += [{"storage": storage, "bits": mean, **counts} for storage, counts in counted.items()]
    out_features, in_features = shape
    weights = out_features * in_features
    rows.append({"storage": "float16", "bits": 16.0, "planes": HALF * weights, **_ends(shape),
                 "activation_reads": HALF * in_features, "multiply_adds": weights})
    names = ["storage", "bits", *MOVED, "table_bytes", "activation_reads", *COMPUTED]
    frame = pd.DataFrame(rows, columns=names).fillna(0).astype(dict.fromkeys(names[2:], np.int64))
    total = frame[list(MOVED)].sum(axis=1)
    frame.insert(2 + len(MOVED), "bytes", total)
    frame.insert(3 + len(MOVED), "bits_per_weight", 8 * total / weights)
    frame.insert(4 + len(MOVED), "of_float16", total / total.iloc[-1])
    return frame


def _ends(shape):
    """Activations in and results out, once."""
    return {"activations": HALF * shape[1], "results": HALF * shape[0]}


def _checkpoint(packed):
    planes, scales = packed.planes.nbytes, packed.alpha.nbytes + packed.beta.nbytes
    return {"planes": planes, "scales": scales, "metadata": packed.nbytes - planes - scales}


def _metadata(plan, arrays):
    """Bytes of all arrays of a matrix that launches name, but its weights and scales."""
    named = {argument if isinstance(argument, str) else argument[0] for launch in plan.launches
             for argument in launch.arguments if not isinstance(argument, int)}
    return sum(array.nbytes for name, array in arrays.items() if name in named - {"lines", "units", "scales"})


def _lut(packed):
    """Tables of 256 sums, one thread block a panel of 512 rows and share of the columns."""
    from kernels_numba.gpu import lut, lut_layout, lut_run
    from kernels_numba.gpu.lut_tables import ENTRIES
    from kernels_numba.gpu.records import LANES

    layout, width = lut_layout.make_layout(packed), lut_run.default_width(1)
    plan = lut_run.plan(layout, 1, "float16", width=width, blocks=BLOCKS)
    panels = lut_run.make_panels(layout, lut.panel_strips(1)).reshape(-1, 4)
    tiles = np.diff(layout.block_tiles)
    built = int(tiles[panels[:, 0]].sum())  # tiles whose tables are built: every panel builds its own
    bytes_ = layout.lines.nbytes
    strip_tiles = int((np.diff(layout.block_strips) * tiles).sum())
    partial = 4 * plan.scratch["partial"][0]
    return {"planes": bytes_, "scales": layout.scales.nbytes,
            "metadata": _metadata(plan, lut_run.layout_arrays(layout)), **_ends(packed.shape),
            "partial_sums": 2 * partial, "table_bytes": built * ENTRIES[width] * LANES * 4,
            "activation_reads": built * LANES * 8 * HALF, "lookups": bytes_,
            "additions": strip_tiles * LANES * LANE_SUMS + built * ENTRIES[width] * LANES,
            "multiply_adds": bytes_ + layout.scales.nbytes // 4}


def _mma(packed):
    """Codes become float16 for tensor cores, which multiply 8 tokens whether there are 8 or one."""
    from kernels_numba.gpu import mma_layout, mma_run
    from kernels_numba.gpu.mma_layout import UNIT_COLUMNS, UNIT_ROWS

    layout = mma_layout.make_layout(packed)
    plan = mma_run.plan(layout, 1, "float16")
    units = int(np.diff(layout.block_tiles)[layout.strip_block].sum())
    weights = units * UNIT_ROWS * UNIT_COLUMNS
    return {"planes": layout.units.nbytes, "scales": layout.scales.nbytes,
            "metadata": _metadata(plan, mma_run.layout_arrays(layout)), **_ends(packed.shape),
            "activation_reads": units * UNIT_COLUMNS * HALF,
            "multiply_adds": 2 * layout.scales.nbytes // 4, "unpacked_codes": weights,
            "tensor_multiply_adds": 8 * weights}


def _cpu(packed):
    """Tables of 16 sums of four activations, built once for all rows; an index is a nibble of a plane."""
    from kernels_numba.cpu import layout
    from kernels_numba.cpu.records import VECTOR, table_bytes

    image = layout.make_image(packed, THREADS)
    header = image[: 8 * layout.HEADER].view(np.int64)
    tiles, columns = int(header[layout.ROW_TILES] * header[layout.COLUMN_TILES]), int(header[layout.TILE_COLUMNS])
    first = int(image[header[layout.STRIP_TABLE] + 16 :][:8].view(np.int64)[0])
    scales, column_tiles = tiles * VECTOR, int(header[layout.COLUMN_TILES])
    planes = len(image) - first - scales
    tables = column_tiles * columns // 4
    return {"planes": planes, "scales": scales, "metadata": first, **_ends(packed.shape),
            "table_bytes": column_tiles * table_bytes(columns, "lut16"), "activation_reads": HALF * packed.shape[1],
            "lookups": 2 * planes, "additions": 2 * planes + 16 * tables, "multiply_adds": scales // 2}
