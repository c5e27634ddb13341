"""Mean bits of every matrix of a model, by layer and projection: a frame, a table, a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from sfmp.checks import SfmpError, write_atomically


def bits_frame(matrices: Mapping):
    """Mean code bits of every matrix.

    Parameters
    ----------
    matrices : mapping of name to StoredMatrix or PackedMatrix

    Returns
    -------
    pandas.DataFrame
        `name, layer` (first number in the name, or –), `projection` (last component without ``_proj``, or as many
        components as tell it from others: ``attn.c_proj``, ``mlp.c_proj``), `weights`, `bits`; layers in order.
    """
    import pandas as pd

    names = sorted(matrices, key=lambda n: (not _place(n)[0], [int(t) if t.isdigit() else t
                                                               for t in re.split(r"(\d+)", n)]))
    labels = _labels({_place(name)[1] for name in names})
    rows = [(name, _place(name)[0] or "–", labels[_place(name)[1]],
             matrices[name].shape[0] * matrices[name].shape[1], matrices[name].wbits) for name in names]
    return pd.DataFrame(rows, columns=["name", "layer", "projection", "weights", "bits"])


def _place(name) -> tuple[str, tuple[str, ...]]:
    """First number of a dotted name, "" if there is none; the words after it."""
    parts = name.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    words = tuple(part for part in parts[0 if at is None else at:] if not part.isdigit())
    return ("" if at is None else parts[at]), words


def _labels(paths) -> dict[tuple, str]:
    """The shortest end of each path that no other path has.

    Examples
    --------
    >>> _labels([("attn", "q_proj"), ("experts", "up_proj"), ("shared", "up_proj")])[("shared", "up_proj")]
    'shared.up_proj'
    """
    def ends(path, count):
        return sum(other[-count:] == path[-count:] for other in paths)

    found = {}
    for path in paths:
        count = next((count for count in range(1, len(path)) if ends(path, count) == 1), len(path))
        found[path] = ".".join(path[-count:]) if count > 1 else path[-1].removesuffix("_proj")
    return found


def bits_by_layer_table(frame):
    """Mean code bits, one row per layer and one column per projection, with an ``all`` of each.

    Parameters
    ----------
    frame : pandas.DataFrame
        `bits_frame`.

    Returns
    -------
    pandas.DataFrame
        Means are weighted by real weights; NaN where a layer has no such projection.
    """
    import pandas as pd

    everything = [frame, frame.assign(projection="all"), frame.assign(layer="all"),
                  frame.assign(layer="all", projection="all")]
    long = pd.concat(everything, ignore_index=True)
    long["total"] = long.bits * long.weights
    sums = long.groupby(["layer", "projection"], sort=False)[["total", "weights"]].sum()
    table = (sums.total / sums.weights).unstack()
    layers, projections = ([*dict.fromkeys(frame[key]), "all"] for key in ("layer", "projection"))
    return table.loc[layers, projections]


def picture(matrices: Mapping):
    """Draw mean bits by layer and projection; matrices as in `bits_frame`. Returns a matplotlib figure."""
    from sfmp.plots_pipeline import bits_by_layer

    frame = bits_frame(matrices)
    sums = frame.assign(bits=frame.bits * frame.weights).groupby(["layer", "projection"], sort=False)[
        ["bits", "weights"]].sum()
    figure = bits_by_layer((sums.bits / sums.weights).rename("bits").reset_index())
    axes = figure.axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    most = 32 if len(labels) <= 100 else 16  # of two, of three digits side by side
    step = next(step for step in (1, 2, 5, 10, 20, 50, len(labels)) if len(labels) <= step * most)
    axes.set_xticks(range(0, len(labels), step), labels[::step])
    return figure


def save_picture(matrices: Mapping, path) -> None:
    """Write `picture` into an image file (its suffix names the format), atomically."""
    from matplotlib import pyplot as plt

    kind = Path(path).suffix.removeprefix(".").lower()
    figure = picture(matrices)
    try:
        if kind not in figure.canvas.get_supported_filetypes():
            raise SfmpError(f"{path}: expected a picture such as FILE.png, .pdf or .svg, found suffix {kind!r}")
        write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=200, bbox_inches="tight"))
    finally:
        plt.close(figure)
