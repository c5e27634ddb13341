"""Figures of kernels: time against bits, speed beside peers, batches, accuracy, width of the tables, decoding."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sfmp.plots import _INK, COLUMN, PAGE, needs, styled

_MODES = {  # mode → label, colour, marker, line
    "lut8": ("lut8 (int8 tables)", _INK[0], "o", "-"),
    "lut16": ("lut16 (int16 tables)", _INK[1], "s", "-"),
    "exact": ("exact (float32 tables)", _INK[2], "^", "-"),
}
_FAMILIES = {"sfmp": ("this project", _INK[0]), "torch": ("torch", _INK[7]),
             "onnxruntime": ("onnxruntime", _INK[1]), "openvino": ("OpenVINO", _INK[2])}
_EDGE = {"markeredgecolor": "white", "markeredgewidth": 0.4}


@styled
def kernel_bits(table: pd.DataFrame, lines: pd.DataFrame):
    """Time of one token against mean bits, with fitted lines; hollow: 2-, 3- and 4-bit blocks in one matrix.

    Parameters
    ----------
    table, lines : pandas.DataFrame
        :func:`sfmp.tables_kernels.products`, :func:`sfmp.tables_kernels.fits`.
    """
    needs(table, ["shape", "family", "mode", "bits", "mixed", "natural", "cold_us"], "kernel_bits")
    shapes = list(dict.fromkeys(table["shape"]))
    figure, axes = plt.subplots(1, len(shapes), figsize=(PAGE, 2.6), squeeze=False)
    for ax, shape in zip(axes[0], shapes, strict=True):
        rows = table[table["shape"] == shape]
        roof = rows[rows.family == "roof"].astype({"bits": float}).groupby("bits").cold_us.min()
        ax.plot(roof.index, roof, color="0.35", linestyle=":", label="reading the same bytes")
        for mode, (label, colour, marker, _) in _MODES.items():
            ours = rows[(rows.family == "sfmp") & (rows["mode"] == mode) & ~rows.natural]
            if ours.empty:  # a processor may lack a mode
                continue
            fit = lines[(lines["shape"] == shape) & (lines["mode"] == mode)].iloc[0]
            ends = np.array([ours.bits.min(), ours.bits.max()], dtype=float)
            ax.plot(ends, fit.fixed_us + fit.us_per_bit * ends, color=colour, linewidth=0.9)
            plain, mixed = ours[~ours.mixed], ours[ours.mixed]
            ax.plot(plain.bits, plain.cold_us, color=colour, marker=marker, linestyle="", label=label, **_EDGE)
            ax.plot(mixed.bits, mixed.cold_us, marker=marker, linestyle="", markerfacecolor="none",
                    markeredgecolor=colour, markersize=8)
        ax.set(title=f"{shape}, one token, weights from memory", xlabel="mean bits of the codes", ylabel="µs")
        ax.set_ylim(bottom=0)
    axes[0][0].plot([], [], marker="o", linestyle="", markerfacecolor="none", markeredgecolor="0.35", markersize=8,
                    label="2, 3 and 4 bits in one matrix")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


@styled
def kernel_peers(table: pd.DataFrame):
    """How many times as fast as torch with bfloat16, candidate by candidate; one panel per shape.

    Parameters
    ----------
    table : pandas.DataFrame
        :func:`sfmp.tables_kernels.products`.
    """
    needs(table, ["shape", "name", "family", "bits", "times_bfloat16"], "kernel_peers")
    table = table[table.family.isin(_FAMILIES) & ~table.natural].copy()
    table["label"] = [f"{row['mode']} {row['bits']:g}{' mixed' if row['mixed'] else ''}" if row["family"] == "sfmp"
                      else row["name"].replace("onnxruntime", "ORT").replace("openvino", "OpenVINO")
                      for row in table.to_dict("records")]
    shapes = list(dict.fromkeys(table["shape"]))
    order = table[table["shape"] == shapes[0]].sort_values("times_bfloat16").name.tolist()
    figure, axes = plt.subplots(1, len(shapes), figsize=(PAGE, 0.9 + 0.135 * len(order)), sharey=True, squeeze=False)
    for ax, shape in zip(axes[0], shapes, strict=True):
        rows = table[table["shape"] == shape].set_index("name").loc[order]
        colours = [_FAMILIES[family][1] for family in rows.family]
        ax.barh(range(len(rows)), rows.times_bfloat16, color=colours, height=0.75)
        for place, value in enumerate(rows.times_bfloat16):
            ax.annotate(f"{value:.1f}", (value, place), (2, 0), textcoords="offset points", va="center", fontsize=6)
        ax.set(title=f"{shape}, one token", xlabel="speed, torch bfloat16 = 1")
        ax.set_xlim(right=rows.times_bfloat16.max() * 1.12)
        ax.set_yticks(range(len(rows)), rows.label, fontsize=6.5)
        ax.grid(axis="y", visible=False)
        ax.set_ylim(-0.6, len(rows) - 0.4)
    marks = {label: plt.Rectangle((0, 0), 1, 1, color=colour) for label, colour in _FAMILIES.values()}
    figure.legend(marks.values(), marks, loc="outside upper center", ncols=4)
    return figure


@styled
def kernel_batch(table: pd.DataFrame):
    """Speed against tokens of a product, torch with bfloat16 = 1; one panel per bit-width.

    Parameters
    ----------
    table : pandas.DataFrame
        :func:`sfmp.tables_kernels.batches`.
    """
    needs(table, ["tokens", "family", "mode", "bits", "way", "times_bfloat16"], "kernel_batch")
    figure, axes = plt.subplots(1, 3, figsize=(PAGE, 2.7), sharey=True)
    for ax, bits in zip(axes, (2, 3, 4), strict=True):
        rows = table[table.bits == bits]
        for mode, (label, colour, marker, line) in _MODES.items():
            part = rows[(rows["mode"] == mode) & (rows.way == "tables")].sort_values("tokens")
            ax.plot(part.tokens, part.times_bfloat16, color=colour, marker=marker, linestyle=line, label=label, **_EDGE)
        panels = rows[(rows["mode"] == "lut8") & (rows.way == "panels")].sort_values("tokens")
        ax.plot(panels.tokens, panels.times_bfloat16, color=_INK[4], marker="P", linestyle="-.",
                label="dequantized panels, bfloat16", **_EDGE)
        for family, marker, colour, label in (("onnxruntime", "X", _INK[3], "onnxruntime, best at these bits"),
                                              ("openvino", "D", _INK[8], "OpenVINO at these bits")):
            best = rows[rows.family == family].groupby("tokens").times_bfloat16.max()
            if len(best):
                ax.plot(best.index, best, color=colour, marker=marker, linestyle="--", label=label, **_EDGE)
        ax.axhline(1, color="0.25", linewidth=1, linestyle=":", label="torch bfloat16")
        tokens = sorted(table.tokens.unique())
        ax.set(xscale="log", yscale="log", title=f"{bits} bits", xlabel="tokens")
        ax.set_xticks(tokens, [str(count) for count in tokens])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_locator(FixedLocator([0.2, 0.5, 1, 2, 5, 10]))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes[0].set_ylabel("speed, torch bfloat16 = 1")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


@styled
def kernel_accuracy(table: pd.DataFrame):
    """Relative error of every mode against float64, by dtype of the activations.

    Parameters
    ----------
    table : pandas.DataFrame
        :func:`sfmp.tables_kernels.accuracy`.
    """
    needs(table, ["mode", "bits", "activations", "dtype", "error"], "kernel_accuracy")
    names = {"torch": "torch", "exact": "exact", "lut16": "lut16", "lut8": "lut8"}
    colours = {"torch": _INK[7], **{mode: look[1] for mode, look in _MODES.items()}}
    figure, axes = plt.subplots(1, 2, figsize=(PAGE, 2.2), sharey=True)
    for ax, kind in zip(axes, ("gaussian", "outlier"), strict=True):
        rows = table[table.activations == kind]
        for shift, (mode, label) in enumerate(names.items()):
            part = rows[rows["mode"] == mode]
            places = part.dtype.map({"float32": 0, "bfloat16": 1, "float16": 2}) + (shift - 1.5) * 0.16
            marker = _MODES[mode][2] if mode in _MODES else "D"
            ax.plot(places, part.error, marker=marker, linestyle="", color=colours[mode], label=label, **_EDGE)
        ax.set_yscale("log")
        ax.set_xticks(range(3), ["float32", "bfloat16", "float16"])
        title = "Gaussian activations" if kind == "gaussian" else "one activation of 20 standard deviations"
        ax.set(title=title, xlabel="activations and result in")
    axes[0].set_ylabel("‖y − y₆₄‖ / ‖y₆₄‖")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


@styled
def table_width(table: pd.DataFrame):
    """Time of plain Numba kernels against the activations a table covers, by bits.

    Parameters
    ----------
    table : pandas.DataFrame
        :func:`sfmp.tables_kernels.widths`.
    """
    needs(table, ["family", "mode", "bits", "cold_us", "table_bytes"], "table_width")
    figure, ax = plt.subplots(figsize=(COLUMN, 2.6))
    plain = table[table.family == "plain"]
    for colour, marker, (bits, rows) in zip(_INK, "os^", plain.groupby("bits"), strict=False):
        ax.plot(range(len(rows)), rows.cold_us, color=colour, marker=marker, label=f"{bits:g} bits", **_EDGE)
        vector = table[(table.family == "sfmp") & (table.bits == bits)]
        ax.plot(1, vector.cold_us.iloc[0], color=colour, marker=marker, markerfacecolor="none", linestyle="",
                markersize=7)
    first = plain[plain.bits == plain.bits.min()]
    labels = [f"{mode.split()[1]}\n{size / 1024:g} kB" for mode, size in zip(first["mode"], first.table_bytes,
                                                                           strict=True)]
    ax.set_xticks(range(len(labels)), labels)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(FixedLocator([100, 200, 500, 1000, 2000, 5000]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set(xlabel="activations of a table; size of all float32 tables", ylabel="µs per token")
    ax.plot([], [], marker="o", linestyle="", markerfacecolor="none", markeredgecolor="0.35", markersize=7,
            label="vector look-ups (exact)")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


@styled
def decode_speed(table: pd.DataFrame):
    """Tokens per second of generate; one panel per model.

    Parameters
    ----------
    table : pandas.DataFrame
        :func:`sfmp.tables_kernels.decoding`.
    """
    needs(table, ["model", "weights", "bpw", "tokens_per_second"], "decode_speed")
    models = list(dict.fromkeys(table.model))
    figure, axes = plt.subplots(1, len(models), figsize=(PAGE, 2.6), squeeze=False)
    for ax, model in zip(axes[0], models, strict=True):
        rows = table[table.model == model].reset_index(drop=True)
        labels = [row.weights if pd.isna(row.bpw) else f"{row.weights.split()[-1]} {row.bpw:g} bpw"
                  for row in rows.itertuples()]
        colours = [_MODES[mode][1] if mode in _MODES else _INK[7] for mode in rows["mode"]]
        ax.barh(-rows.index, rows.tokens_per_second, color=colours, height=0.75)
        for place, value in zip(-rows.index, rows.tokens_per_second, strict=True):
            ax.annotate(f"{value:.0f}" if value >= 20 else f"{value:.1f}", (value, place), (2, 0),
                        textcoords="offset points", va="center", fontsize=6.5)
        ax.set_yticks(-rows.index, labels, fontsize=6.5)
        ax.set_xlim(right=rows.tokens_per_second.max() * 1.14)
        ax.grid(axis="y", visible=False)
        random = " (random weights)" if rows.random.any() else ""
        ax.set(title=f"{model} model{random}", xlabel="tokens per second, one sequence")
    return figure
