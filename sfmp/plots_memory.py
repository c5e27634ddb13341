"""Figure of memory: the peak of quantizing against the size of the model, and every step of one large model."""

from __future__ import annotations

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.patheffects import withStroke

from sfmp.plots import _INK, PAGE, needs, styled


@styled
def memory(sizes: pd.DataFrame, steps: pd.DataFrame):
    """Peak resident memory, MB and GB.

    Parameters
    ----------
    sizes, steps : pandas.DataFrame
        :func:`sfmp.tables_memory.sizes` and :func:`sfmp.tables_memory.steps`.
    """
    needs(sizes, ["size", "model", "imports", "above_imports"], "memory")
    needs(steps, ["step", "peak", "model", "limit"], "memory")
    figure, (left, right) = plt.subplots(1, 2, figsize=(PAGE, 2.5), width_ratios=(1, 1.15))
    y = -sizes.index.to_numpy(dtype=float)
    left.barh(y, sizes.imports / 1e6, height=0.55, color="0.8", label="Python and libraries")
    left.barh(y, sizes.above_imports / 1e6, left=sizes.imports / 1e6, height=0.55, color=_INK[0], label="the work")
    left.barh(y - 0.38, sizes.model / 1e6, height=0.16, color=_INK[1], label="weights of the model")
    left.set_yticks(y, [f"{row.size.replace('x', '×')}" for row in sizes[["size"]].itertuples(index=False)],
                    fontsize=6.5)
    left.set(xlabel="peak of sfmp quantize, MB", title="width × intermediate × layers")
    y = -steps.index.to_numpy(dtype=float)
    right.barh(y, steps.peak / 1e9, height=0.55, color=_INK[0])
    for place, value in zip(y, steps.peak / 1e9, strict=True):
        right.annotate(f"{value:.2f}", (value, place), (2, 0), textcoords="offset points", va="center", fontsize=6.5,
                       path_effects=[withStroke(linewidth=2, foreground="white")])
    model, limit = steps.model.iloc[0] / 1e9, steps.limit.iloc[0] / 1e9
    right.axvline(model, color=_INK[1], label="weights of the model")
    right.axvline(limit, color="0.25", linestyle="--", label="allowed: model + 4 GB")
    right.set_yticks(y, steps.step, fontsize=6.5)
    right.set_xlim(0, limit * 1.06)
    right.set(xlabel="peak of a process, GB", title="one large model, step by step")
    for ax in (left, right):
        ax.grid(axis="y", visible=False)
    marks = {label: handle for ax in (left, right)
             for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    marks["weights of the model"] = plt.Rectangle((0, 0), 1, 1, color=_INK[1])
    figure.legend(marks.values(), marks, loc="outside upper center", ncols=4)
    return figure
