"""Figures of the results: one style, one function per kind of figure. Functions draw a frame and return it;
they never save.

Every figure is drawn from the frame that is published beside it as CSV. Colours are seaborn's colour-blind
palette, and every series also has its own marker, so nothing is told by colour alone.
"""

from __future__ import annotations

import functools

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from sfmp.checks import SfmpError
from sfmp.records import FP

COLUMN, PAGE = 3.3, 6.8  # inches: one and two columns of a paper
STYLE = {
    "font.size": 8,
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same glyphs, hence the same bytes, everywhere
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "svg.hashsalt": "sfmp",
}
_INK = sns.color_palette("colorblind")
#: series → (label, colour, marker, line); uniform methods are dashed, mixed precision is solid
SERIES = {
    "rtn": ("RTN", _INK[7], "v", "--"),
    "awq": ("AWQ", _INK[1], "s", "--"),
    "gptq": ("GPTQ", _INK[2], "^", "--"),
    "sfmp-rtn": ("SFMP on RTN", _INK[5], "D", "-"),
    "sfmp-gptq": ("SFMP on GPTQ", _INK[4], "P", "-"),
    "sfmp-awq": ("SFMP on AWQ", _INK[0], "o", "-"),
    "sfmp-awq measured": ("SFMP on AWQ, measured objective", _INK[3], "*", "-"),
}
FACTOR_LABELS = {
    "reorder": "reordering",
    "block": "block (rows × columns)",
    "group_size": "group size (columns per scale)",
    "levels": "allowed bit-widths",
    "salience": "salience",
    "objective": "objective",
    "scope": "scope of one budget",
}
BIT_COLOURS = sns.color_palette("cividis", 8)  # 1…8 bits, dark = few; monotone in grey print as well


def styled(draw):
    """Run a drawing function under the project's style, whatever the caller's settings are."""

    @functools.wraps(draw)
    def wrapper(*args, **kwargs):
        kept = {"backend": matplotlib.get_backend(), "interactive": matplotlib.is_interactive()}
        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, **kept}):
            figure = draw(*args, **kwargs)
            interactive = matplotlib.is_interactive()
        # The first figure of a notebook loads its backend, which makes pyplot interactive; what is drawn while it is
        # not, a notebook does not show.
        matplotlib.interactive(interactive)
        return figure

    return wrapper


def needs(frame: pd.DataFrame, columns, figure: str) -> None:
    """Raise SfmpError if a figure is asked for from a frame that is empty or lacks columns."""
    missing = [c for c in columns if c not in frame]
    if missing or frame.empty:
        found = f"columns {list(frame.columns)}" if missing else "an empty frame"
        raise SfmpError(
            f"figure {figure}: expected rows with {list(columns)}, found {found}; run its experiment first."
        )


@styled
def perplexity_vs_bpw(table: pd.DataFrame):
    """Perplexity of every method against bits per weight, with the fp control as a horizontal line.

    Parameters
    ----------
    table : pandas.DataFrame
        ``e1_main``: columns `method, objective, bpw_achieved, perplexity`.

    Returns
    -------
    matplotlib.figure.Figure
    """
    return _curves(table, "perplexity", "perplexity (lower is better)")


@styled
def accuracy_vs_bpw(table: pd.DataFrame, metric: str = "acc"):
    """Mean zero-shot accuracy (%) of every method against bits per weight.

    The band around the control is ± one standard error over its items: the size of a difference that means
    nothing.
    """
    scaled = {metric: 100 * table[metric], f"{metric}_stderr": 100 * table[f"{metric}_stderr"]}
    return _curves(table.assign(**scaled), metric, "zero-shot accuracy (%)", error=f"{metric}_stderr")


def _curves(table, metric, label, error=None):
    needs(table, ["method", "bpw_achieved", metric], f"{metric} against bpw")
    table = table.dropna(subset=[metric])
    figure, axes = plt.subplots(figsize=(COLUMN, 2.9))
    control = table[table.method == FP]
    if len(control):
        value = control[metric].iloc[0]
        axes.axhline(value, color="0.25", linewidth=1, linestyle=":", label="fp16 (no quantization)")
        if error:
            spread = control[error].iloc[0]
            band = {"color": "0.5", "alpha": 0.15, "linewidth": 0, "label": "± its standard error"}
            axes.axhspan(value - spread, value + spread, **band)
    names = table.method
    if "objective" in table:
        names = names.where(table.objective != "measured", names + " measured")
    for name, (text, colour, marker, line) in SERIES.items():
        part = table[names == name].groupby("bpw_achieved")[metric].mean()
        if len(part):
            size = 7 if marker == "*" else 4.5
            edge = {"markeredgecolor": "white", "markeredgewidth": 0.4, "markersize": size}
            axes.plot(part.index, part, color=colour, marker=marker, linestyle=line, label=text, **edge)
    axes.set(xlabel="bits per weight, scales included", ylabel=label)
    if metric == "perplexity":
        plain_log(axes, table[metric])
    figure.legend(loc="outside upper center", ncols=2, columnspacing=1.2)
    return figure


def plain_log(axes, values) -> None:
    """Logarithmic y axis with plain numbers where the values span more than a factor of 2.5; linear
    otherwise.
    """
    if values.max() > 2.5 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6))


@styled
def ablation(table: pd.DataFrame, factor: str, order: tuple = ()):
    """Perplexity against one factor of the method; one series per budget (and quantizer), the fp control as
    a horizontal line.

    Parameters
    ----------
    table : pandas.DataFrame
        An ``e3_*`` table: `method, bpw, perplexity, fp_perplexity` and the factor's column.
    factor : str
        A key of ``FACTOR_LABELS``; ``"block"`` joins `block_rows` and `group_size`.
    order : tuple
        Values of the factor from left to right; by size or in order of appearance if empty.

    Returns
    -------
    matplotlib.figure.Figure

    Notes
    -----
    Repeats (seeds of random salience) are drawn as a mean with a bar from the smallest to the largest.
    """
    if factor == "block" and {"block_rows", "group_size"} <= set(table):
        table = table.sort_values(["block_rows", "group_size"])
        joined = [f"{r:g}×{c:g}" for r, c in zip(table.block_rows, table.group_size, strict=True)]
        table = table.assign(block=joined)
    needs(table, ["method", "bpw", "perplexity", factor], f"ablation of {factor}")
    text = table[factor].map(lambda v: f"{v:g}" if isinstance(v, int | float | np.number) else str(v))
    numeric = pd.api.types.is_numeric_dtype(table[factor])
    seen = [f"{v:g}" for v in sorted(table[factor].unique())] if numeric else list(dict.fromkeys(text))
    names = [n for n in order if n in seen] + [n for n in seen if n not in order]
    pairs = table.assign(name=text)[["method", "bpw"]].drop_duplicates().sort_values(["method", "bpw"])
    several = pairs.method.nunique() > 1
    figure, axes = plt.subplots(figsize=(COLUMN, 2.6))
    if "fp_perplexity" in table:
        axes.axhline(table.fp_perplexity.iloc[0], color="0.25", linewidth=1, linestyle=":", label="fp16")
    for i, (method, bpw) in enumerate(pairs.itertuples(index=False)):
        here = table.assign(name=text)[(table.bpw == bpw) & (table.method == method)]
        rows = here.groupby("name").perplexity.agg(["mean", "min", "max"])
        rows = rows.reindex(names)  # a value that was not measured breaks the line
        shift = 0.1 * (i - (len(pairs) - 1) / 2)  # so that neighbouring series do not hide each other
        x = np.arange(len(names)) + shift
        axes.errorbar(
            x,
            rows["mean"],
            yerr=_spread(rows),
            color=_INK[[0, 1, 2, 4, 3, 5][i % 6]],
            marker="osD^vP"[i % 6],
            linestyle="-" if numeric or factor == "block" else (0, (1, 2)),
            elinewidth=0.9,
            capsize=2,
            label=f"{bpw:g} bpw" + (f", {SERIES[method][0].split()[-1]}" if several else ""),
            markeredgecolor="white",
            markeredgewidth=0.4,
        )
        for where, value in zip(x, rows["mean"], strict=True) if len(pairs) == 1 else ():
            look = {"ha": "center", "fontsize": 7, "path_effects": [withStroke(linewidth=2, foreground="white")]}
            axes.annotate(f"{value:.4g}", (where, value), (0, 5), textcoords="offset points", **look)
    axes.margins(y=0.12)
    axes.set_xticks(range(len(names)), [_tick(n) for n in names])
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.grid(axis="x", visible=False)
    axes.set(xlabel=FACTOR_LABELS.get(factor, factor), ylabel="perplexity (lower is better)")
    plain_log(axes, table.perplexity)
    figure.legend(loc="outside upper center", ncols=2 if several else 4, columnspacing=1.2)
    return figure


def _spread(rows):
    """Bars from the smallest to the largest repeat, or none where nothing was repeated."""
    repeated = (rows["max"] > rows["min"]).any()
    return [rows["mean"] - rows["min"], rows["max"] - rows["mean"]] if repeated else None


def _tick(name):
    """``2,3,4,5,6,7,8`` → ``2–8``; other names as they are."""
    levels = name.split(",")
    return f"{levels[0]}–{levels[-1]}" if len(levels) > 3 else name


@styled
def mlp_curves(table: pd.DataFrame):
    """Test loss of the small network against code bits: Fisher, magnitude and random salience (bars: all
    seeds).
    """
    needs(table, ["wbits", "salience", "loss"], "mlp_experiment")
    figure, axes = plt.subplots(figsize=(COLUMN, 2.6))
    axes.axhline(table.fp_loss.iloc[0], color="0.25", linewidth=1, linestyle=":", label="fp32")
    looks = {"random": (_INK[7], "v", "--"), "magnitude": (_INK[1], "s", "-"), "fisher": (_INK[0], "o", "-")}
    for i, (name, (colour, marker, line)) in enumerate(looks.items()):
        rows = table[table.salience == name].groupby("wbits").loss.agg(["mean", "min", "max"])
        if rows.empty:
            continue
        bars = _spread(rows)
        axes.errorbar(
            rows.index + 0.015 * (i - 1),
            rows["mean"],
            yerr=bars,
            color=colour,
            marker=marker,
            linestyle=line,
            label=name,
            capsize=2,
            elinewidth=0.9,
        )
    axes.set(xlabel="mean code bits", ylabel="test loss (nats)")
    plain_log(axes, table.loss)
    figure.legend(loc="outside upper center", ncols=4, columnspacing=1.2)
    return figure
