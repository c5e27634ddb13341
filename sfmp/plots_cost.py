"""Figures of cost: every method by stage, measured and extrapolated; and how the deciding stages grow."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sfmp.plots import _INK, PAGE, needs, styled
from sfmp.plots_comparison import LOOKS

SHORTEST = 1e-3  # seconds; a stage below it is drawn as this long
_PARTS = {"allocation": ("decides the bits", _INK[0]), "quantization": ("quantizes", _INK[7])}
_GROWTH = {  # (method, stage) → label, colour, marker, line
    ("sfmp", "salience"): ("SFMP salience", _INK[0], "o", "-"),
    ("sfmp", "allocation"): ("SFMP allocation", _INK[0], "D", "--"),
    ("amq", "sensitivity"): ("AMQ sensitivity", _INK[2], "^", "-."),
    ("amq", "search"): ("AMQ search", _INK[2], "v", "-"),
    ("slim_llm", "bit search"): ("SliM-LLM bit search", _INK[1], "s", "-."),
    ("bitstack", "sorting"): ("BitStack sorting", _INK[4], "X", "-."),
}


@styled
def cost(table: pd.DataFrame):
    """Seconds of every stage of every method, with the knobs used here and with the published ones.

    Parameters
    ----------
    table : pandas.DataFrame
        :func:`sfmp.tables_cost.cost_by_stage`: `method, stage, part, cpu_seconds, full_seconds`.
    """
    needs(table, ["method", "stage", "part", "cpu_seconds", "full_seconds"], "cost")
    table = table[table.model == table.model.iloc[0]].reset_index(drop=True)
    gap = table.method.ne(table.method.shift()).cumsum() * 0.6
    y = -(table.index + gap).to_numpy(dtype=float)
    figure, ax = plt.subplots(figsize=(PAGE, 0.9 + 0.17 * len(table) + 0.1 * table.method.nunique()))
    colours = table.part.map(lambda part: _PARTS[part][1])
    full, here = (table[c].clip(lower=SHORTEST) for c in ("full_seconds", "cpu_seconds"))
    low = SHORTEST / 2
    ax.barh(y, full - low, left=low, height=0.78, color="none", edgecolor=colours, linewidth=0.9)
    ax.barh(y, here - low, left=low, height=0.42, color=colours)
    ax.set_xscale("log")
    ax.set_xlim(low, full.max() * 30)
    for place, value, reduced in zip(y, full, here, strict=True):
        ax.annotate(_duration(value), (max(value, reduced), place), (4, 0), textcoords="offset points", va="center",
                    fontsize=6.5)
    ax.set_yticks(y, table.stage, fontsize=6.5)
    for method, rows in table.groupby("method", sort=False):
        name = "SFMP" if method == "sfmp-awq" else LOOKS[method][0]
        ax.annotate(name, (0, y[rows.index].mean()), (-178, 0), xycoords=("axes fraction", "data"), va="center",
                    textcoords="offset points", fontsize=7.5, weight="bold" if name == "SFMP" else "normal")
    ax.xaxis.set_major_locator(FixedLocator([1e-3, 1e-2, 0.1, 1, 10, 60, 600, 3600, 36000, 864000]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _duration(value)))
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("CPU time on one core (logarithmic); numbers: published knobs")
    marks = {label: plt.Rectangle((0, 0), 1, 1, color=colour) for label, colour in _PARTS.values()}
    marks["knobs of this tier"] = plt.Rectangle((0, 0), 1, 0.5, color="0.25")
    marks["published knobs, extrapolated"] = plt.Rectangle((0, 0), 1, 1, facecolor="none", edgecolor="0.25")
    figure.legend(marks.values(), marks, loc="outside upper center", ncols=4)
    return figure


def _duration(seconds):
    """A time in the unit that reads best.

    >>> [_duration(s) for s in (0.001, 0.25, 12, 90, 7200, 900000)]
    ['1 ms', '250 ms', '12 s', '1.5 min', '2 h', '10 d']
    """
    units = (("ms", 1e-3, 1), ("s", 1, 60), ("min", 60, 3600), ("h", 3600, 2 * 86400), ("d", 86400, float("inf")))
    name, size = next((name, size) for name, size, limit in units if seconds < limit)
    value = seconds / size
    return f"{value:.0f} {name}" if value >= 9.95 else f"{value:.2g} {name}"


@styled
def cost_scaling(table: pd.DataFrame):
    """CPU seconds and needed work of the deciding stages against the size of the model; numbers are exponents.

    Parameters
    ----------
    table : pandas.DataFrame
        :func:`sfmp.cost_study.with_growth`.
    """
    needs(table, ["axis", "size", "method", "stage", "seconds", "full_units", "seconds_exponent"], "cost_scaling")
    figure, axes = plt.subplots(1, 3, figsize=(PAGE, 2.9))
    panels = (
        ("layers", "seconds", "CPU seconds of this study", "layers"),
        ("layers", "full_units", "units of work as published", "layers"),
        ("blocks", "seconds", "CPU seconds of this study", "column groups of a matrix"),
    )
    for ax, (axis, column, title, label) in zip(axes, panels, strict=True):
        rows = table[(table.axis == axis) & (table[column] > 0)]
        exponent = "needed_exponent" if column == "full_units" else f"{column}_exponent"
        ends = []
        for (method, stage), (name, colour, marker, line) in _GROWTH.items():
            part = rows[(rows.method == method) & (rows.stage == stage)].sort_values("size")
            if len(part):
                ax.plot(part["size"], part[column], color=colour, marker=marker, linestyle=line, label=name,
                        markeredgecolor="white", markeredgewidth=0.4)
                ends.append((part[column].iloc[-1], part[exponent].iloc[-1], part["size"].iloc[-1], colour))
        ax.set(xscale="log", yscale="log", title=title, xlabel=label)
        sizes = sorted(rows["size"].unique())
        ax.set_xticks(sizes, [f"{s:g}" for s in sizes])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_xlim(sizes[0] * 0.85, sizes[-1] * 1.75)
        _spread_labels(ax, ends)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def _spread_labels(ax, ends, least=0.055):
    """Write each exponent right of the end of its line, pushed apart where lines end together."""
    bottom, top = np.log(ax.get_ylim())
    places = []
    for value, exponent, x, colour in sorted(ends):
        place = (np.log(value) - bottom) / (top - bottom)
        place = max(place, places[-1] + least) if places else place
        places.append(place)
        ax.annotate(f"{exponent:.1f}".replace("-0.0", "0.0"), (x, np.exp(bottom + place * (top - bottom))), (7, 0),
                    textcoords="offset points", va="center", fontsize=7, color=colour)
