"""Figures of products on a GPU: bytes and operations by storage, time against bits, and what was measured beside peers.

A panel without measured rows says "not measured"; predicted times are drawn in grey and labelled as predictions.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sfmp.plots import _INK, PAGE, needs, styled
from sfmp.tables_gpu import ours

_STORAGE = {"checkpoint": ("checkpoint", _INK[7], "v"), "gpu lut": ("GPU lut", _INK[0], "o"),
            "gpu mma": ("GPU mma", _INK[1], "s"), "cpu": ("CPU", _INK[2], "^"), "float16": ("float16", "0.35", "D")}
_MOVED = {"planes": _INK[0], "scales": _INK[1], "metadata": _INK[2], "activations": _INK[4], "partial_sums": _INK[3],
          "results": _INK[8]}
_MOVED_LABELS = {"planes": "planes (float16: weights)"}
_MODES = {"mma": ("mma (tensor cores)", _INK[1], "s"), "lut": ("lut (look-ups)", _INK[0], "o")}
_WAYS = {**_MODES, "dequantize": ("dequantize, then torch", _INK[4], "P")}
_FAMILIES = {"sfmp": ("this project", _INK[0]), "torch": ("torch", _INK[7]), "gemlite": ("gemlite", _INK[1]),
             "triton": ("plain Triton kernel", _INK[2])}
_EDGE = {"markeredgecolor": "white", "markeredgewidth": 0.4}
_SHOWN_BITS = 3.0
_MEGA = 1e6


@styled
def memory_traffic(table: pd.DataFrame):
    """Bytes of one token's product by storage at 3 bits, and operations per weight against bits.

    Parameters
    ----------
    table : pandas.DataFrame
        :func:`sfmp.gemm_traffic.traffic_table`.
    """
    needs(table, ["storage", "bits", *_MOVED, "lookups", "additions", "multiply_adds", "unpacked_codes"],
          "memory_traffic")
    figure, (left, right) = plt.subplots(1, 2, figsize=(PAGE, 2.7), width_ratios=(3, 2))
    shown = table[table.bits.isin([_SHOWN_BITS, 16.0])].reset_index(drop=True)
    before = np.zeros(len(shown))
    for column, colour in _MOVED.items():
        left.barh(-shown.index, shown[column] / _MEGA, left=before, color=colour, height=0.7,
                  label=_MOVED_LABELS.get(column, column.replace("_", " ")))
        before += shown[column].to_numpy() / _MEGA
    for place, row in enumerate(shown.itertuples()):
        left.annotate(f"{row.bits_per_weight:.2f} bits per weight", (before[place], -place), (3, 0),
                      textcoords="offset points", va="center", fontsize=6.5)
    left.set_yticks(-shown.index, [_STORAGE[storage][0] for storage in shown.storage])
    left.set(xlabel="megabytes of one product, codes of 3 bits", xlim=(0, before.max() * 1.32))
    left.grid(axis="y", visible=False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=6)
    work = table[["lookups", "additions", "multiply_adds", "unpacked_codes"]].sum(axis=1)
    weights = table.multiply_adds[table.storage == "float16"].iloc[0]
    per_weight = table.assign(work=work / weights)
    for storage in ("gpu lut", "gpu mma", "cpu"):
        rows = per_weight[per_weight.storage == storage]
        label, colour, marker = _STORAGE[storage]
        right.plot(rows.bits, rows.work, color=colour, marker=marker, label=label, **_EDGE)
    right.axhline(1, color="0.35", linestyle=":", label="float16")
    right.set(xlabel="mean bits of a code", ylabel="scalar operations per weight", ylim=(0, None))
    right.legend(fontsize=6.5)
    return figure


@styled
def gpu_bits(predicted: pd.DataFrame, products: pd.DataFrame, lines: pd.DataFrame):
    """Time of one token against mean bits: predicted (grey), and measured with fitted lines where there is evidence.

    Parameters
    ----------
    predicted : pandas.DataFrame
        :func:`sfmp.gpu_targets.predictions`; its shapes are drawn.
    products, lines : pandas.DataFrame
        :func:`sfmp.tables_gpu.products`, :func:`sfmp.tables_gpu.fits`; may be empty. Drawn are permuted matrices of
        blocks with float16 activations.
    """
    products, lines = (frame[frame.dtype == "float16"] for frame in (ours(products), lines))
    needs(predicted, ["shape", "bits", "predicted_us", "predicted_float16_us"], "gpu_bits")
    shapes = list(dict.fromkeys(predicted["shape"]))
    figure, axes = plt.subplots(1, len(shapes), figsize=(PAGE, 2.5), squeeze=False)
    for ax, shape in zip(axes[0], shapes, strict=True):
        model = predicted[predicted["shape"] == shape]
        if len(model):
            ax.plot(model.bits, model.predicted_us, color="0.55", linestyle="--", label="prediction, not measured")
        rows = products[products["shape"] == shape]
        for mode, (label, colour, marker) in _MODES.items():
            mine = rows[rows["mode"] == mode]
            if len(mine):
                ax.plot(mine.bits, mine.us, color=colour, marker=marker, linestyle="", label=f"{label}, measured",
                        **_EDGE)
            for fit in lines[(lines["shape"] == shape) & (lines["mode"] == mode)].itertuples():
                ends = np.array([mine.bits.min(), mine.bits.max()])
                ax.plot(ends, fit.fixed_us + fit.us_per_bit * ends, color=colour)
        if rows.empty:
            _nothing(ax, "not measured", 0.12)
        ax.set(title=shape, xlabel="mean bits of a code", ylim=(0, None))
    axes[0, 0].set_ylabel("µs per product, one token")
    handles = {label: handle for ax in axes[0] for handle, label in
               zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=3)
    return figure


@styled
def gpu_kernels(products: pd.DataFrame, batches: pd.DataFrame, widths: pd.DataFrame, decoded: pd.DataFrame):
    """Four panels of what was measured: peers, tokens of a product, table width, decoding.

    Parameters
    ----------
    products, batches, widths, decoded : pandas.DataFrame
        Tables of :mod:`sfmp.tables_gpu`; each may be empty, and its panel then says so.
    """
    most = _peer_rows(products)
    figure, axes = plt.subplots(2, 2, figsize=(PAGE, max(3.4, 3 + 0.16 * len(most))))
    (peers, tokens), (tables, decode) = axes
    peers.set_title("one token" if most.empty else f"one token, {most['shape'].iloc[0]}")
    tokens.set_title("tokens of a product, 3 bits")
    tables.set_title("activations of a table (lut)")
    decode.set_title("decoding")
    for ax, rows, draw in ((peers, most, _peers), (tokens, batches.dropna(subset=["times_fp16"]), _batches),
                           (tables, widths.dropna(subset=["table_width"]), _widths), (decode, decoded, _decode)):
        if rows.empty:
            _nothing(ax, "not measured", 0.5)
            ax.set(xticks=[], yticks=[])
        else:
            draw(ax, rows)
    return figure


def _nothing(ax, text, height):
    ax.annotate(text, (0.5, height), xycoords="axes fraction", ha="center", va="center", fontsize=9, color="0.35")


def _peer_rows(products):
    """Ours with float16 activations and the peers on the largest shape, the fastest last."""
    mine = products.index.isin(ours(products).index) & (products.dtype == "float16")
    rows = products[mine | (products.family != "sfmp")].dropna(subset=["times_fp16"])
    if rows.empty:
        return rows
    largest = rows.packed_bytes.groupby(rows["shape"]).max().idxmax()
    return rows[rows["shape"] == largest].sort_values("times_fp16")


def _peers(ax, rows):
    colours = [_FAMILIES.get(family, (family, _INK[8]))[1] for family in rows.family]
    ax.barh(range(len(rows)), rows.times_fp16, color=colours, height=0.75)
    ax.set_yticks(range(len(rows)), rows.name, fontsize=5.5)
    ax.set(xlabel="speed, torch float16 = 1", xlim=(0, 1.2 * rows.times_fp16.max()), ylim=(-0.6, len(rows) - 0.4))
    ax.grid(axis="y", visible=False)
    found = [family for family in _FAMILIES if family in set(rows.family)]
    marks = [plt.Rectangle((0, 0), 1, 1, color=_FAMILIES[family][1]) for family in found]
    ax.legend(marks, [_FAMILIES[family][0] for family in found], fontsize=6, loc="lower right")


def _batches(ax, rows):
    rows = rows[(rows.bits == _SHOWN_BITS) & (rows.family == "sfmp")]
    rows = rows[rows["shape"] == rows["shape"].iloc[0]] if len(rows) else rows
    for way, (label, colour, marker) in _WAYS.items():
        part = rows[rows.way == way].groupby("tokens").times_fp16.max()
        if len(part):
            ax.plot(part.index, part, color=colour, marker=marker, label=label, **_EDGE)
    ax.axhline(1, color="0.25", linestyle=":", linewidth=1, label="torch float16")
    ticks = sorted(rows.tokens.unique())
    ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel="speed, torch float16 = 1")
    ax.set_ylim(bottom=rows.times_fp16.min() / 8)  # room for the legend
    ax.set_xticks(ticks, [f"{count:g}" for count in ticks], fontsize=6)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(FixedLocator([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.legend(fontsize=6, loc="lower left")


def _widths(ax, rows):
    rows = rows[rows["shape"] == rows["shape"].iloc[0]]
    for (colour, marker), ((bits, size), part) in zip(zip(_INK, "os^vDP", strict=False),
                                                      rows.groupby(["bits", "group_size"]), strict=False):
        part = part.sort_values("table_width")
        ax.plot(part.table_width, part.us, color=colour, marker=marker, label=f"{bits:g} bits, group {size:g}", **_EDGE)
    first = rows.drop_duplicates("table_width").sort_values("table_width")
    ax.set_xticks(first.table_width, [f"{row.table_width:g}\n{row.table_bytes / 1024:.3g} KB" for row in
                                      first.itertuples()])
    ax.set(xlabel="activations of a table; its shared memory", ylabel="µs per product", ylim=(0, None))
    ax.legend(fontsize=6)


def _decode(ax, rows):
    rows = rows[rows.model == rows.model.iloc[0]]
    rows = rows[rows.graph == rows.graph.any()].reset_index(drop=True)  # without graphs only where there are none
    labels = [" ".join(filter(None, [row.weights, "" if pd.isna(row.bpw) else f"{row.bpw:g} bpw",
                                     "fused" if row.fused else "", "compiled" if row.compiled is True else ""]))
              for row in rows.itertuples()]
    colours = [_FAMILIES["sfmp" if weights.startswith("sfmp") else "torch"][1] for weights in rows.weights]
    ax.barh(-rows.index, rows.tokens_per_second, color=colours, height=0.75)
    ax.set_yticks(-rows.index, labels, fontsize=6)
    random = ", random weights" if rows.random.astype(bool).any() else ""
    graphs = ", CUDA graphs" if rows.graph.any() else ""
    ax.set(title=f"{rows.model.iloc[0]}{random}{graphs}", xlabel="tokens per second, one sequence")
    ax.grid(axis="y", visible=False)
