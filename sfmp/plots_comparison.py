"""Figures of the full comparison: retention and perplexity of every method, quantizers, granularity.

Ten methods in one panel are a tangle, so each family has a panel of its own, and SFMP on AWQ is in all of them.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.patheffects import withStroke

from sfmp.plots import _INK, COLUMN, PAGE, SERIES, needs, plain_log, styled
from sfmp.records import FP

REFERENCE = "sfmp-awq"
LOOKS = SERIES | {
    "efficient_qat": ("EfficientQAT", _INK[3], "X", "--"),
    "slim_llm": ("SliM-LLM", _INK[1], "s", "-."),
    "amq": ("AMQ", _INK[2], "^", "-."),
    "bitstack": ("BitStack", _INK[7], "v", "-."),
    "scalebits": ("ScaleBITS", _INK[4], "D", "-."),
    "sfmp-efficient_qat": ("SFMP on EfficientQAT", _INK[3], "X", "-"),
}
FAMILIES = {
    "one bit-width": ("rtn", "awq", "gptq", "efficient_qat"),
    "mixed, other units or searched": ("slim_llm", "amq", "bitstack", "scalebits"),
    "SFMP on each quantizer": ("sfmp-rtn", "sfmp-gptq", "sfmp-efficient_qat"),
}
CEILING = 2.6  # x fp perplexity: above lies what is no language model any more, and would squeeze the rest


@styled
def retention_vs_bpw(table: pd.DataFrame):
    """Share of the control's zero-shot accuracy, and perplexity, of every method against bits per weight.

    Parameters
    ----------
    table : pandas.DataFrame
        ``e1_main``: columns `method, objective, bpw_achieved, retention, acc, acc_stderr, perplexity`.

    Returns
    -------
    matplotlib.figure.Figure
        One column of panels per family of methods. What lies outside a panel is marked at its edge by an open
        triangle with its value.
    """
    needs(table, ["method", "bpw_achieved", "retention", "perplexity"], "retention_vs_bpw")
    table = table[table.objective != "measured"].assign(retention=100 * table.retention)
    control = table[table.method == FP]
    families = {t: [m for m in ms if m in set(table.method)] for t, ms in FAMILIES.items()}
    families = {title: members for title, members in families.items() if members}
    figure, axes = plt.subplots(2, len(families), figsize=(PAGE, 4.3), sharex=True, sharey="row", squeeze=False)
    limits = [_limits(table.retention, low=True), _limits(table.perplexity, low=False)]
    for column, (title, members) in enumerate(families.items()):
        for row, metric in enumerate(("retention", "perplexity")):
            ax = axes[row, column]
            _control(ax, control, metric)
            for method in dict.fromkeys([*members, REFERENCE]):
                _curve(ax, table, method, metric, limits[row])
        axes[0, column].set_title(title)
        axes[1, column].set_xlabel("bits per weight, scales included")
        handles, labels = axes[1, column].get_legend_handles_labels()
        axes[1, column].legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.24))
    axes[0, 0].set_ylabel("accuracy kept (%)")
    axes[1, 0].set_ylabel("perplexity")
    plain_log(axes[1, 0], table.perplexity.clip(upper=limits[1][1]))
    for row in (0, 1):
        axes[row, 0].set_ylim(limits[row])
    return figure


def _limits(values, low):
    """Range of a row of panels: of the values, but no further than ``CEILING`` allows."""
    values = values.dropna()
    if low:
        return max(values.min(), 85.0) - 1.5, values.max() + 1.5
    top = min(values.max(), CEILING * values.min())
    return values.min() * 0.97, top * 1.08


def _control(ax, control, metric):
    if control.empty:
        return
    value = control[metric].iloc[0]
    ax.axhline(value, color="0.25", linewidth=1, linestyle=":", label="fp16 (no quantization)")
    if metric == "retention" and "acc_stderr" in control:
        spread = value * control.acc_stderr.iloc[0] / control.acc.iloc[0]
        ax.axhspan(value - spread, value + spread, color="0.5", alpha=0.15, linewidth=0)


def _curve(ax, table, method, metric, limits):
    label, colour, marker, line = LOOKS[method]
    part = table[table.method == method].groupby("bpw_achieved")[metric].mean().dropna()
    if part.empty:
        return
    strong = method == REFERENCE
    ax.plot(part.index, part, color=colour, marker=marker, linestyle=line, label=label, markeredgecolor="white",
            markeredgewidth=0.4, linewidth=1.9 if strong else 1.2, zorder=3 if strong else 2)
    for bpw, value in part[(part < limits[0]) | (part > limits[1])].items():
        _outside(ax, bpw, value, limits, colour)


def _outside(ax, x, value, limits, colour):
    """Mark a value that lies outside the axes: an open triangle at the edge, and the number."""
    (bottom, top), above = limits, value > limits[1]
    y = top - 0.045 * (top - bottom) if above else bottom + 0.045 * (top - bottom)
    ax.plot(x, y, marker="^" if above else "v", color=colour, fillstyle="none", linestyle="none", zorder=4)
    ax.annotate(f"{value:.0f}", (x, y), (4, -2.5), textcoords="offset points", fontsize=6.5, zorder=5,
                path_effects=[withStroke(linewidth=2, foreground="white")])


@styled
def quantizer(table: pd.DataFrame):
    """Perplexity of one bit-width and of mixed bit-widths on the same quantizer, one panel per quantizer.

    Parameters
    ----------
    table : pandas.DataFrame
        :func:`sfmp.tables_comparison.quantizer_table`.
    """
    needs(table, ["quantizer", "allocation", "bpw", "perplexity"], "quantizer")
    names = list(dict.fromkeys(table.quantizer))
    figure, axes = plt.subplots(1, len(names), figsize=(PAGE, 2.5), sharey=True, sharex=True, squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        ax.axhline(table.fp_perplexity.iloc[0], color="0.25", linewidth=1, linestyle=":", label="fp16")
        for allocation, colour, marker, line in (("uniform", _INK[1], "s", "--"), ("mixed", _INK[0], "o", "-")):
            rows = table[(table.quantizer == name) & (table.allocation == allocation)]
            part = rows.groupby("bpw").perplexity.mean()
            ax.plot(part.index, part, color=colour, marker=marker, linestyle=line, label=allocation,
                    markeredgecolor="white", markeredgewidth=0.4)
        ax.set_title(LOOKS[name][0])
        ax.set_xlabel("bits per weight, scales included")
    axes[0, 0].set_ylabel("perplexity (lower is better)")
    plain_log(axes[0, 0], table.perplexity)
    axes[0, 0].set_xticks(sorted(table.bpw.unique()), [f"{b:g}" for b in sorted(table.bpw.unique())])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


@styled
def granularity(table: pd.DataFrame):
    """Perplexity by the unit that shares a bit-width, finest left; with and without reordering.

    Parameters
    ----------
    table : pandas.DataFrame
        :func:`sfmp.tables_comparison.granularity_table`.
    """
    needs(table, ["unit", "place", "reorder", "perplexity"], "granularity")
    table = table[table.bpw == table.bpw.iloc[0]]
    units = table.drop_duplicates("unit").set_index("place").unit.sort_index()
    blocks = table[table.unit.str.contains("×")]
    single = table[~table.unit.str.contains("×")]
    figure, ax = plt.subplots(figsize=(COLUMN * 1.25, 2.9))
    ax.axhline(table.fp_perplexity.iloc[0], color="0.25", linewidth=1, linestyle=":", label="fp16")
    place = {unit: x for x, unit in enumerate(units)}
    for reorder, label, colour, marker, line in (
        ("none", "blocks, natural order", _INK[1], "s", "--"), ("both", "blocks, reordered", _INK[0], "o", "-"),
    ):
        part = blocks[blocks.reorder == reorder]
        if len(part):
            ax.plot(part.unit.map(place), part.perplexity, color=colour, marker=marker, linestyle=line, label=label,
                    markeredgecolor="white", markeredgewidth=0.4)
    shown = table[table.unit != "model"]
    limits = min(shown.perplexity.min(), table.fp_perplexity.iloc[0]) * 0.96, shown.perplexity.max() * 1.08
    inside = single[single.perplexity <= limits[1]]
    ax.plot(inside.unit.map(place), inside.perplexity, color=_INK[2], marker="D", linestyle="none",
            label="weight, matrix or model", markeredgecolor="white", markeredgewidth=0.4)
    for row in single[single.perplexity > limits[1]].itertuples():
        _outside(ax, place[row.unit], row.perplexity, limits, _INK[2])
    for row in table[table.perplexity <= limits[1]].itertuples():
        natural = row.reorder == "none" and "×" in row.unit  # its number goes above, that of the other below
        ax.annotate(f"{row.perplexity:.1f}", (place[row.unit], row.perplexity), (0, 5 if natural else -10),
                    textcoords="offset points", ha="center", fontsize=6.5)
    ax.set_xticks(np.arange(len(units)), [u.replace("×", "\n×") for u in units])
    ax.set_xlim(-0.5, len(units) - 0.5)
    ax.set_ylim(limits)
    ax.grid(axis="x", visible=False)
    ax.set(xlabel="unit that shares one bit-width (rows × columns)", ylabel="perplexity (lower is better)")
    figure.legend(loc="outside upper center", ncols=2, columnspacing=1.2)
    return figure
