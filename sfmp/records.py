"""Measured numbers as one tidy frame: the design (``config/runs.tsv``) joined with the JSON file of every
run.

The only inputs are ``runs.tsv``, ``eval/*.json`` and ``quantized/*.json``; no clock is read here, so
everything made from the frame is reproducible to the byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from sfmp.checks import SfmpError

FP = "fp16"  # the value of `method` that names the unquantized control row

_NUMBERS = ("bpw", "group_size", "block_rows", "seed")  # columns of the design that are no text
#: every method of the comparison in the order of tables and legends: controls, uniform, rivals, SFMP, oracle
METHODS = (
    FP, "rtn", "awq", "gptq", "efficient_qat", "slim_llm", "layer_wise", "amq", "bitstack", "scalebits",
    "sfmp-rtn", "sfmp-gptq", "sfmp-awq", "sfmp-efficient_qat", "element",
)


def read_runs(path) -> pd.DataFrame:
    """Read the experimental design, one row per run.

    Parameters
    ----------
    path : path-like
        Tab-separated file with the columns of ``config/runs.tsv``.

    Returns
    -------
    pandas.DataFrame
        Text columns as str, `bpw` as float64, in file order.

    Raises
    ------
    SfmpError
        If a needed column is missing or a run is listed twice.
    """
    frame = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, comment="#")
    missing = [c for c in ("run", "method", "bpw", "experiments") if c not in frame]
    if missing:
        raise SfmpError(
            f"{path}: columns {missing} are missing; found {list(frame.columns)}. Restore the header of "
            f"runs.tsv."
        )
    twice = sorted(frame.run[frame.run.duplicated()])
    if twice:
        raise SfmpError(f"{path}: runs {twice} are listed twice; every run needs one name of its own.")
    for column in frame.columns.intersection(_NUMBERS):
        frame[column] = pd.to_numeric(frame[column].replace({"": None, "-": None}))
    return frame


def json_files(source) -> list[Path]:
    """Flatten a path, folder, list or (nested) mapping of them into the sorted list of JSON files it names.

    Manifests (``*.manifest.json``) and files of other types are left out.
    """
    if isinstance(source, Mapping):
        source = list(source.values())
    if isinstance(source, str | Path):
        path = Path(source)
        found = sorted(path.glob("*.json")) if path.is_dir() else [path]
        return [p for p in found if p.suffix == ".json" and not p.name.endswith(".manifest.json")]
    return sorted({p for item in source for p in json_files(item)})


def load_results(runs, *sources) -> pd.DataFrame:
    """Join the design with what was measured.

    Parameters
    ----------
    runs : pandas.DataFrame or path-like
        The design (see :func:`read_runs`).
    *sources : path-like, iterable or mapping of path-like
        JSON files or folders of them: evaluations (key ``perplexity``) and records of quantization (key
        ``bpw``).

    Returns
    -------
    pandas.DataFrame
        The rows of the design that were evaluated, in design order, with `perplexity`, `perplexity_ratio`
        (over the fp control of the same model), `rtn_perplexity` (of
        rounding to one bit-width at the same bpw), `acc`/`acc_norm` (unweighted mean over tasks, with
        `*_stderr`), `retention` (acc over the control's), `bpw_achieved`, `bpw_stored`, `wbits`,
        `model_bytes`, `stored_bytes` and `bpw_bytes` (what the method itself must store), `reached` (see
        :func:`reached_text`), `method_order` (place in ``METHODS``), `manifest`.

    Raises
    ------
    SfmpError
        If a file cannot be read, names an unknown run, or two files disagree about one value of a run.
    """
    frame = runs.copy() if isinstance(runs, pd.DataFrame) else read_runs(runs)
    known, measured = set(frame.run), {}
    for path in json_files(list(sources)):
        record = _read_record(path)
        run = record["run"]
        if run not in known:
            raise SfmpError(
                f"{path}: run {run!r} is not in the design; remove the stale file or add the run to runs.tsv."
            )
        row = measured.setdefault(run, {})
        clash = [k for k in record if k in row and row[k] != record[k] and k != "manifest"]
        if clash:
            raise SfmpError(
                f"{path}: {clash} of run {run!r} differ from another file's; delete the stale one and rerun."
            )
        row.update(record)
    columns = pd.DataFrame.from_dict(measured, orient="index")
    columns = columns.drop(columns=[c for c in frame.columns if c in columns], errors="ignore")
    frame = frame.join(columns, on="run", how="left")
    for column in (
        "perplexity",
        "acc",
        "acc_stderr",
        "acc_norm",
        "acc_norm_stderr",
        "bpw_achieved",
        "bpw_stored",
        "bpw_bytes",
        "bpw_tolerance",
        "wbits",
        "model_bytes",
        "stored_bytes",
        "quantized_weights",
        "matrices",
    ):
        frame[column] = pd.to_numeric(frame[column]) if column in frame else np.nan
    frame = frame[frame.perplexity.notna()].reset_index(drop=True)
    control = frame[frame.method == FP].drop_duplicates("model").set_index("model")
    frame["perplexity_ratio"] = frame.perplexity / frame.model.map(control.perplexity)
    rounded = frame[frame.method == "rtn"].groupby(["model", "bpw"]).perplexity.mean()
    frame["rtn_perplexity"] = [rounded.get(key, np.nan) for key in zip(frame.model, frame.bpw, strict=True)]
    frame["retention"] = frame.acc / frame.model.map(control.acc)
    frame["reached"] = [reached_text(row) for row in frame.to_dict("records")]
    order = {method: place for place, method in enumerate(METHODS)}
    frame["method_order"] = frame.method.map(order).fillna(len(order)).astype(int)
    return frame


NEAR = 0.005  # bits per weight below a budget that count as hitting it: AMQ's published tolerance


def reached_text(row: Mapping) -> str:
    """Say whether a run hit its budget: ``yes``, else what it reached, ``-`` for the control.

    Parameters
    ----------
    row : mapping
        One run: `bpw` (the budget) and what its record says: `reached` (absent in the record of a run that
        only has a tolerance), `bpw_achieved`, `bpw_bytes`, `bpw_tolerance`, and `budget` of the design.

    Examples
    --------
    >>> reached_text({"bpw": 2.5, "reached": False, "bpw_achieved": 2.4808})
    '2.48 of 2.50'
    """
    counted = "bpw_bytes" if row.get("budget") == "stored" else "bpw_achieved"
    budget, found = row["bpw"], row.get(counted, np.nan)
    if row.get("method") == FP or pd.isna(budget) or pd.isna(found):
        return "-"
    hit = row.get("reached")
    if hit is None or pd.isna(hit):
        hit = abs(found - budget) <= row.get("bpw_tolerance", 0.0)
    if hit and budget - found <= NEAR:
        return "yes"
    digits = next((d for d in (2, 3, 4) if f"{found:.{d}f}" != f"{budget:.{d}f}"), 6)
    return f"{found:.{digits}f} of {budget:.{digits}f}"


def _read_record(path: Path) -> dict:
    """One JSON file as a flat dict: task scores become `task.acc` keys and their means `acc`, `acc_norm`."""
    try:
        raw = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise SfmpError(
            f"{path}: expected a JSON result, found {error}; delete it and rerun its rule."
        ) from error
    if not isinstance(raw, dict) or "run" not in raw:
        raise SfmpError(f"{path}: expected a JSON object with the key 'run'; delete it and rerun its rule.")
    tasks = raw.pop("tasks", None) or {}
    record = {k: v for k, v in raw.items() if not isinstance(v, dict | list)}
    if "perplexity" in record:
        record["manifest"] = f"{path.name}.manifest.json"
    elif "bpw" in record:
        record["bpw_achieved"] = record.pop("bpw")
    scores = pd.DataFrame.from_dict(tasks, orient="index")
    for metric in ("acc", "acc_norm"):
        if metric not in scores:
            continue
        record[metric] = float(scores[metric].mean())
        record.update({f"{task}.{metric}": float(v) for task, v in scores[metric].items()})
        if f"{metric}_stderr" in scores:  # tasks are disjoint items, so variances add
            record[f"{metric}_stderr"] = float(np.sqrt((scores[f"{metric}_stderr"] ** 2).sum()) / len(scores))
    return record
