"""The loss curve of the embedded model's training run."""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt

from sfmp.plots import _INK, COLUMN, needs, styled


@styled
def loss_curve(log: pd.DataFrame):
    """Bits per byte of held-out text against training tokens.

    Parameters
    ----------
    log : pandas.DataFrame
        ``training_log.csv`` of :mod:`sfmp.train`: `tokens, bits_per_byte_calibration, bits_per_byte_evaluation`.

    Returns
    -------
    matplotlib.figure.Figure
    """
    columns = {"bits_per_byte_evaluation": "evaluation modules", "bits_per_byte_calibration": "calibration modules"}
    needs(log, ["tokens", *columns], "loss_curve")
    figure, axes = plt.subplots(figsize=(COLUMN, 2.4))
    for (column, label), colour, marker in zip(columns.items(), _INK, "os", strict=False):
        axes.plot(log.tokens / 1e6, log[column], color=colour, marker=marker, markersize=2.5, label=label)
    best = log[list(columns)].iloc[-1]
    # The first points are the steep part of any run; the axis shows what is learnt after them.
    axes.set_ylim(best.min() * 0.95, np.quantile(log[list(columns)], 0.95))
    axes.set(xlabel="training tokens (millions)", ylabel="held-out loss (bits per byte)")
    axes.legend(loc="upper right")
    return figure


def write_loss_curve(log_path) -> None:
    """Draw ``training_log.csv`` to ``loss_curve.png`` and ``loss_curve.svg`` in the same folder."""
    log = pd.read_csv(log_path)
    figure = loss_curve(log)
    with matplotlib.rc_context({"svg.hashsalt": "sfmp", "svg.fonttype": "path"}):
        for kind, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
            figure.savefig(log_path.with_name(f"loss_curve.{kind}"), dpi=150, bbox_inches="tight", metadata=metadata)
    plt.close(figure)
