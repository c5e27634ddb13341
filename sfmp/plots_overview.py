"""Worked overview of the method on one small matrix. Every panel is computed by the pipeline's own
functions; none is drawn.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm

from sfmp.plots import PAGE, needs, styled
from sfmp.plots_pipeline import _bit_bar, _bit_colours
from sfmp.spec import QuantSpec

PANELS = {
    "salience": "1  salience of each weight",
    "reordered": "2  rows and columns sorted",
    "bits": "3  bits of each block",
    "codes": "4  integer codes",
    "plane": "5  top bit-plane of the codes",
    "error": "6  error, natural order",
}


def example_matrix(rows: int = 32, columns: int = 96, seed: int = 0):
    """Make a small weight matrix and a salience with the structure real ones have: few loud rows and
    columns, heavy tails.

    Returns
    -------
    (numpy.ndarray, numpy.ndarray)
        weight float32 [rows, columns] and salience float64 [rows, columns], both from `seed`.
    """
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((rows, columns)).astype(np.float32)
    loud = generator.lognormal(0, 1.2, rows)[:, None] * generator.lognormal(0, 1.6, columns)[None, :]
    return weight, loud * generator.exponential(size=(rows, columns))


def overview_data(weight, salience, spec: QuantSpec) -> pd.DataFrame:
    """Run the pipeline on one matrix and keep every stage.

    Parameters
    ----------
    weight, salience : numpy.ndarray [N, K]
        The matrix and its salience.
    spec : QuantSpec
        Budget, block shape, levels; ``method`` is taken as rtn (nothing to calibrate on).

    Returns
    -------
    pandas.DataFrame
        Long: `panel` (a key of ``PANELS``), `row`, `col`, `value`. Panels 2 to 5 are in permuted order,
        `error` is |w − ŵ| in natural order after packing and unpacking, in the units of the weights.

    Source: METHOD §1.2 to §1.5 and §1.9.
    """
    import torch

    from sfmp import allocate, pack, quantize, reorder

    salience = torch.as_tensor(salience, dtype=torch.float32)
    plan = allocate.make_plan({"w": salience}, spec)["w"]
    moved = np.asarray(reorder.apply(np.asarray(weight), plan.row_perm, plan.col_perm))
    shape = {"group_size": spec.group_size, "block_rows": spec.block_rows}
    quantized = quantize.quantize(torch.from_numpy(np.ascontiguousarray(moved)), plan.bits, **shape)
    packed = pack.pack(
        quantized.codes,
        quantized.scales,
        quantized.zeros,
        plan.bits,
        **shape,
        row_perm=plan.row_perm,
        col_perm=plan.col_perm,
    )
    bits = np.repeat(np.repeat(plan.bits, spec.block_rows, 0), spec.group_size, 1)[
        : moved.shape[0], : moved.shape[1]
    ]
    codes = np.asarray(quantized.codes).astype(np.int64)
    stages = {
        "salience": np.asarray(salience),
        "reordered": np.asarray(salience)[plan.row_perm][:, plan.col_perm],
        "bits": bits,
        "codes": codes,
        "plane": codes >> (bits.astype(np.int64) - 1) & 1,
        "error": np.abs(np.asarray(weight) - np.asarray(packed.dequantize())),
    }
    rows, cols = (axis.ravel() for axis in np.indices(moved.shape))
    parts = [pd.DataFrame({"panel": p, "row": rows, "col": cols, "value": stages[p].ravel()}) for p in PANELS]
    return pd.concat(parts, ignore_index=True)


@styled
def overview(frame: pd.DataFrame, spec: QuantSpec):
    """Draw :func:`overview_data` as six panels; block borders are drawn where blocks exist."""
    needs(frame, ["panel", "row", "col", "value"], "overview")
    figure, axes = plt.subplots(2, 3, figsize=(PAGE, 3.3), sharex=True, sharey=True)
    grids = {p: frame[frame.panel == p].pivot(index="row", columns="col", values="value") for p in PANELS}
    positive = grids["salience"].to_numpy()[grids["salience"].to_numpy() > 0]
    loud = LogNorm(np.quantile(positive, 0.02), positive.max(), clip=True)
    colours, norm, levels = _bit_colours(grids["bits"])
    looks = {
        "salience": {"cmap": "viridis", "norm": loud},
        "reordered": {"cmap": "viridis", "norm": loud},
        "bits": {"cmap": colours, "norm": norm},
        "codes": {"cmap": "gray", "vmin": 0},
        "plane": {"cmap": ListedColormap(["black", "white"]), "norm": BoundaryNorm([-0.5, 0.5, 1.5], 2)},
        "error": {"cmap": "magma", "vmin": 0},
    }
    labels = {"salience": "salience", "reordered": "salience", "codes": "code", "error": "|w − ŵ|"}
    for ax, (panel, title) in zip(axes.ravel(), PANELS.items(), strict=True):
        image = ax.imshow(grids[panel], aspect="auto", interpolation="nearest", **looks[panel])
        ax.set_title(title, loc="left")
        ax.grid(False)
        ax.set_xticks([0, grids[panel].shape[1] - 1])
        ax.set_yticks([0, grids[panel].shape[0] - 1])
        if panel in ("reordered", "bits", "codes"):
            for x in range(spec.group_size, grids[panel].shape[1], spec.group_size):
                ax.axvline(x - 0.5, color="white", linewidth=0.8)
            for y in range(spec.block_rows, grids[panel].shape[0], spec.block_rows):
                ax.axhline(y - 0.5, color="white", linewidth=0.8)
        if panel == "bits":
            _bit_bar(figure, image, ax, levels)
        else:
            bar = figure.colorbar(image, ax=ax, pad=0.02, label=labels.get(panel, "bit"), shrink=0.9)
            if panel == "plane":
                bar.set_ticks([0, 1])
            bar.ax.minorticks_off()
    for ax in axes[1]:
        ax.set_xlabel("input feature")
    for ax in axes[:, 0]:
        ax.set_ylabel("output feature")
    return figure
