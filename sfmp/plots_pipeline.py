"""Figures of the pipeline itself: salience maps, bit maps, and a worked overview. Each has a ``*_data``
function that computes the frame (published as CSV) and a drawing function that only draws that frame."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
from matplotlib.ticker import FixedLocator

from sfmp import reorder
from sfmp.checks import SfmpError
from sfmp.grid import BlockGrid
from sfmp.plots import BIT_COLOURS, COLUMN, PAGE, needs, styled

_SALIENCE_MAP = "viridis"


# ---- salience before and after reordering
# -----------------------------------------------------------------------------


def salience_maps_data(salience, matrix_plan, cells: int = 64) -> pd.DataFrame:
    """Mean salience on a coarse grid, in natural order and after the plan's permutations.

    Parameters
    ----------
    salience : array or tensor [N, K]
        Salience of one matrix.
    matrix_plan : sfmp.spec.MatrixPlan
        Its permutations.
    cells : int
        Cells per side; each is the mean of the weights in it, so a picture of any matrix has the same size.

    Returns
    -------
    pandas.DataFrame
        `order` (before | after), `row`, `col` (start of the cell, weights), `salience`; cells², twice.
    """
    natural = np.asarray(salience, dtype=np.float64)
    moved = natural[matrix_plan.row_perm][:, matrix_plan.col_perm]
    parts = []
    for order, matrix in (("before", natural), ("after", moved)):
        starts = [
            np.unique(np.linspace(0, n, min(cells, n), endpoint=False).astype(int)) for n in matrix.shape
        ]
        sums = np.add.reduceat(np.add.reduceat(matrix, starts[0], axis=0), starts[1], axis=1)
        sizes = np.outer(*(np.diff(np.append(s, n)) for s, n in zip(starts, matrix.shape, strict=True)))
        rows, cols = np.meshgrid(*starts, indexing="ij")
        frame = {"order": order, "row": rows.ravel(), "col": cols.ravel(), "salience": (sums / sizes).ravel()}
        parts.append(pd.DataFrame(frame))
    return pd.concat(parts, ignore_index=True)


@styled
def salience_maps(frame: pd.DataFrame, title: str = ""):
    """Draw :func:`salience_maps_data`: two heat maps on one logarithmic colour scale."""
    needs(frame, ["order", "row", "col", "salience"], "salience_before_after")
    positive = frame.salience[frame.salience > 0]
    low, high = (positive.quantile(0.01), positive.max()) if len(positive) else (0.1, 1.0)
    figure, axes = plt.subplots(1, 2, figsize=(PAGE, 2.9), sharey=True)
    for ax, order, text in zip(
        axes, ("before", "after"), ("natural order", "rows and columns sorted"), strict=True
    ):
        grid = frame[frame.order == order].pivot(index="row", columns="col", values="salience")
        norm = LogNorm(low, high if high > low else 2 * low, clip=True)
        image = ax.pcolormesh(grid.columns, grid.index, grid, cmap=_SALIENCE_MAP, norm=norm, rasterized=True)
        ax.set(title=text, xlabel="input feature (column)")
        ax.grid(False)
        for side in ("top", "right"):
            ax.spines[side].set_visible(True)
    axes[0].set_ylabel("output feature (row)")
    axes[0].invert_yaxis()  # shared: row 0 on top in both
    figure.colorbar(image, ax=axes, label="mean salience (log scale)", pad=0.02)
    if title:
        figure.suptitle(title, fontsize=8)
    return figure


def concentration(salience: Mapping, plan, top: float = 0.1) -> pd.DataFrame:
    """How much of a matrix's salience its top blocks hold, before and after reordering.

    Parameters
    ----------
    salience : mapping name → array [N, K]
    plan : sfmp.spec.Plan
        Permutations and block shape.
    top : float
        Share of blocks counted as top.

    Returns
    -------
    pandas.DataFrame
        `name`, `top_share_before`, `top_share_after` (share of the salience in the top blocks), `ceiling`
        (share in as many single weights as those blocks hold: no choice of blocks can beat it), `gini_before`,
        `gini_after`.

    Source: experiment A10 of METHOD §4.
    """
    rows = []
    for name, matrix in plan.items():
        values = np.asarray(salience[name], dtype=np.float64)
        grid = BlockGrid(*values.shape, plan.spec.block_rows, plan.spec.group_size)
        natural = [np.arange(n) for n in values.shape]
        before = reorder.block_sums(values, *natural, grid).ravel()
        after = reorder.block_sums(values, matrix.row_perm, matrix.col_perm, grid).ravel()
        blocks = max(1, round(top * before.size))
        weights = min(values.size, blocks * plan.spec.block_rows * plan.spec.group_size)
        shares = [_top_share(before, blocks), _top_share(after, blocks), _top_share(values.ravel(), weights)]
        rows.append((name, *shares, _gini(before), _gini(after)))
    columns = ["name", "top_share_before", "top_share_after", "ceiling", "gini_before", "gini_after"]
    return pd.DataFrame(rows, columns=columns)


def _top_share(values, count):
    ordered = np.sort(values)[::-1]
    return float(ordered[:count].sum() / ordered.sum()) if ordered.sum() else 0.0


def _gini(values):
    ordered, n = np.sort(values), values.size
    return (
        float(2 * (np.arange(1, n + 1) @ ordered) / (n * ordered.sum()) - (n + 1) / n)
        if ordered.sum()
        else 0.0
    )


# ---- bit maps
# ---------------------------------------------------------------------------------------------------------


def bit_map_data(plan, names=()) -> pd.DataFrame:
    """Bits of every block of some matrices: `name, row_block, group, bits`; the first eight matrices if
    none is named.
    """
    names = list(names) or list(plan)[:8]
    unknown = [n for n in names if n not in plan]
    if unknown:
        raise SfmpError(f"bit map: {unknown} are not in the plan; expected names out of {list(plan)[:3]}…")
    parts = []
    for name in names:
        bits = np.asarray(plan[name].bits)
        rows, cols = np.indices(bits.shape)
        parts.append(
            pd.DataFrame(
                {"name": name, "row_block": rows.ravel(), "group": cols.ravel(), "bits": bits.ravel()}
            )
        )
    return pd.concat(parts, ignore_index=True)


@styled
def bit_map(frame: pd.DataFrame):
    """Draw :func:`bit_map_data`: one panel per matrix, a cell per block (reordered, so salient blocks are
    top left).
    """
    needs(frame, ["name", "row_block", "group", "bits"], "bit_map")
    names = list(dict.fromkeys(frame.name))
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(PAGE, 0.5 + 1.55 * lines), squeeze=False)
    colours, norm, levels = _bit_colours(frame.bits)
    for ax, name in zip(axes.ravel(), names, strict=False):
        grid = frame[frame.name == name].pivot(index="row_block", columns="group", values="bits").to_numpy()
        image = ax.imshow(grid, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
        ax.set_title(_short(name), fontsize=7)
        ax.set_xticks(np.arange(-0.5, grid.shape[1]), [])
        ax.set_yticks(np.arange(-0.5, grid.shape[0]), [])
        ax.grid(color="white", linewidth=0.6)
        ax.tick_params(length=0)
        ax.set_xlabel(f"{grid.shape[1]} groups", fontsize=7)
        ax.set_ylabel(f"{grid.shape[0]} row blocks", fontsize=7)
    for ax in axes.ravel()[len(names) :]:
        ax.set_axis_off()
    _bit_bar(figure, image, axes, levels)
    return figure


def bits_by_layer_data(plan) -> pd.DataFrame:
    """Mean code bits of every matrix: `name, layer, projection, weights, bits` (weighted by real weights)."""
    rows = []
    for name, matrix in plan.items():
        grid = BlockGrid(
            matrix.row_perm.size, matrix.col_perm.size, plan.spec.block_rows, plan.spec.group_size
        )
        layer = next((part for part in name.split(".") if part.isdigit()), "–")
        bits = float((grid.weights * matrix.bits).sum() / grid.weights.sum())
        rows.append(
            (name, layer, name.rsplit(".", 1)[-1].removesuffix("_proj"), int(grid.weights.sum()), bits)
        )
    return pd.DataFrame(rows, columns=["name", "layer", "projection", "weights", "bits"])


@styled
def bits_by_layer(frame: pd.DataFrame):
    """Draw :func:`bits_by_layer_data`: one cell per matrix, annotated up to twelve layers."""
    needs(frame, ["layer", "projection", "bits"], "bits_by_layer")
    grid = frame.pivot_table(index="projection", columns="layer", values="bits", sort=False)
    width = PAGE if grid.shape[1] > 12 else COLUMN
    figure, ax = plt.subplots(figsize=(width, 0.75 + 0.27 * len(grid)))
    image = ax.imshow(grid, cmap="cividis", aspect="auto", interpolation="nearest")
    ax.set_xticks(range(grid.shape[1]), grid.columns)
    ax.set_yticks(range(grid.shape[0]), grid.index)
    ax.grid(False)
    ax.tick_params(length=0)
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for (i, j), value in np.ndenumerate(grid.to_numpy()) if grid.shape[1] <= 12 else ():
        if np.isfinite(value):
            colour = "white" if value < middle else "black"
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color=colour)
    ax.set(xlabel="layer", ylabel="projection")
    figure.colorbar(image, label="mean code bits", pad=0.02)
    return figure


# ---- helpers
# ----------------------------------------------------------------------------------------------------------


def _bit_colours(bits):
    """Colour map with one colour per level that occurs, and the levels."""
    levels = sorted({int(b) for b in np.unique(bits)})
    span = range(levels[0], levels[-1] + 1)
    if len(span) == 1:
        return ListedColormap([BIT_COLOURS[4]]), BoundaryNorm([levels[0] - 0.5, levels[0] + 0.5], 1), levels
    picks = np.linspace(0, 7, len(span)).round().astype(int)
    colours = ListedColormap([BIT_COLOURS[i] for i in picks])
    return colours, BoundaryNorm(np.arange(span[0] - 0.5, span[-1] + 1), len(span)), levels


def _bit_bar(figure, image, axes, levels):
    bar = figure.colorbar(image, ax=axes, label="bits of the block", pad=0.02, shrink=0.9)
    bar.ax.yaxis.set_major_locator(FixedLocator(range(levels[0], levels[-1] + 1)))
    bar.ax.minorticks_off()
    return bar


def _short(name):
    """Last two telling parts of a dotted name: ``model.layers.3.self_attn.v_proj`` → ``layer 3 · v_proj``."""
    parts = name.split(".")
    layer = next((p for p in parts if p.isdigit()), None)
    return f"layer {layer} · {parts[-1]}" if layer else name
