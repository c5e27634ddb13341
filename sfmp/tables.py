"""Tables of the paper's experiments from the tidy frame of :mod:`sfmp.records`; numbers are selected, never
typed.

No clock is read, so every table is reproducible to the byte (costs: :mod:`sfmp.tables_cost`); numbers of the
paper come from ``config/paper_values.tsv`` alone.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from sfmp.checks import SfmpError
from sfmp.records import FP

#: what each ablation varies; every other column is held fixed by the design
FACTORS = {
    "reorder": ["reorder"],
    "block": ["block_rows", "group_size"],
    "group": ["group_size"],
    "levels": ["levels"],
    "salience": ["salience", "seed"],
    "objective": ["objective"],
    "scope": ["scope"],
    "guided": ["salience"],
}

_MAIN = [
    "run",
    "model",
    "method",
    "method_order",
    "objective",
    "bpw",
    "bpw_achieved",
    "reached",
    "bpw_tolerance",
    "bpw_stored",
    "bpw_bytes",
    "stored_bytes",
    "wbits",
    "group_size",
    "block_rows",
    "levels",
    "reorder",
    "salience",
    "knobs",
    "model_bytes",
    "perplexity",
    "perplexity_ratio",
    "acc",
    "acc_stderr",
    "acc_norm",
    "acc_norm_stderr",
    "retention",
]


def select(results: pd.DataFrame, experiment: str) -> pd.DataFrame:
    """Rows of one experiment (a word of the comma list `experiments`), in design order."""
    words = results.experiments.str.split(",").map(lambda ws: experiment in [w.strip() for w in ws])
    return results[words].reset_index(drop=True)


def main_table(results: pd.DataFrame, paper: pd.DataFrame) -> pd.DataFrame:
    """Main comparison: every method at every budget, beside the paper's number where one exists for that
    model.

    Parameters
    ----------
    results : pandas.DataFrame
        From :func:`load_results`.
    paper : pandas.DataFrame
        From :func:`read_paper_values`.

    Returns
    -------
    pandas.DataFrame
        Per run, controls first: settings, whether the budget was `reached`, bits by the paper's account
        (`bpw_achieved`) and by every byte the method must store (`bpw_bytes`), ours, `paper_perplexity`,
        `delta_perplexity`, `paper_acc`, `delta_acc` (NaN where the paper has no such row), task columns,
        `manifest`.

    Source: experiment E1 of METHOD §4 (the paper's main table).
    """
    rows = select(results, "main")
    tasks = sorted(c for c in rows.columns if c.endswith((".acc", ".acc_norm")))
    table = rows.reindex(columns=[*_MAIN, *tasks, "manifest"])
    paper = paper.assign(value=paper.value.where(paper.unit != "%", paper.value / 100))
    for metric in ("perplexity", "acc"):
        values = paper[paper.metric == metric].set_index(["model", "method", "bpw"]).value
        keys = list(
            zip(
                table.model,
                table.method,
                table.bpw.map(lambda b: "-" if np.isnan(b) else f"{b:g}"),
                strict=True,
            )
        )
        table[f"paper_{metric}"] = [values.get(key, np.nan) for key in keys]
        table[f"delta_{metric}"] = table[metric] - table[f"paper_{metric}"]
    keys = ["model", "method_order", "method", "objective", "bpw", "run"]
    return table.sort_values(keys, kind="stable", ignore_index=True)


def ablation_table(results: pd.DataFrame, experiment: str) -> pd.DataFrame:
    """One ablation: what varied, at which budget, and the quality it gave.

    Parameters
    ----------
    results : pandas.DataFrame
        From :func:`load_results`.
    experiment : str
        A key of ``FACTORS``.

    Returns
    -------
    pandas.DataFrame
        `run, model, method, bpw`, the factor's columns, `bpw_achieved, bpw_stored, perplexity,
        perplexity_ratio, fp_perplexity, rtn_perplexity` (controls: none, and rounding at the same bpw), `
        manifest`, sorted by budget and factor.

    Raises
    ------
    SfmpError
        If `experiment` is unknown.
    """
    if experiment not in FACTORS:
        raise SfmpError(f"experiment {experiment!r} is unknown; expected one of {sorted(FACTORS)}.")
    rows = select(results, experiment)
    rows = rows[rows.method != FP].copy()
    rows["fp_perplexity"] = rows.perplexity / rows.perplexity_ratio
    factors = FACTORS[experiment]
    columns = [
        "run",
        "model",
        "method",
        "bpw",
        *factors,
        "bpw_achieved",
        "bpw_stored",
        "perplexity",
        "perplexity_ratio",
        "fp_perplexity",
        "rtn_perplexity",
        "manifest",
    ]
    return rows.reindex(columns=columns).sort_values(
        ["model", "bpw", *factors, "run"], kind="stable", ignore_index=True
    )


def read_paper_values(path) -> pd.DataFrame:
    """Read ``paper_values.tsv``: `id, version, where, model, method, bpw, metric, value, unit, source, note`;
    `value` is float64.
    """
    frame = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, comment="#")
    if frame.id.duplicated().any():
        raise SfmpError(
            f"{path}: ids {sorted(frame.id[frame.id.duplicated()])} are listed twice; ids must be unique."
        )
    frame["value"] = frame.value.astype(float)
    return frame


def to_markdown(frame: pd.DataFrame, digits: int = 4) -> str:
    """Render a frame as a GitHub table; floats rounded to `digits` significant digits, missing values as a
    dash.

    >>> print(to_markdown(pd.DataFrame({"run": ["a"], "perplexity": [3.14159], "paper": [float("nan")]})))
    | run | perplexity | paper |
    |---|---|---|
    | a | 3.142 | – |
    """

    def cell(value):
        if value is None or (isinstance(value, float) and np.isnan(value)):
            return "–"
        return f"{value:.{digits}g}" if isinstance(value, float) else str(value).replace("|", "\\|")

    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "|" + "---|" * frame.shape[1]]
    lines += ["| " + " | ".join(map(cell, row)) + " |" for row in frame.itertuples(index=False)]
    return "\n".join(lines)
