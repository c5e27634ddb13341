"""Tables of cost: seconds, memory and model evaluations of every method by stage, and what the rivals cost beside
SFMP. Clocks differ from run to run, so these tables are kept apart from all others.

A method with reduced knobs also says what its own settings would cost on the same model: measured seconds of one
unit of work, times the units its publication needs, times how much dearer a unit is then.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from sfmp.checks import SfmpError
from sfmp.records import METHODS, json_files, read_runs

COMMON_BPW = 3.5  # every method has a run there; at 3.25 bpw SliM-LLM has next to nothing to choose
OURS = "sfmp-awq"
#: stages that decide the bits; every other stage quantizes, which no method is spared
DECIDING = (
    "salience", "allocation", "proxy quantization", "sensitivity", "prediction", "search", "bit search (SBA)",
    "sorting", "greedy allocation", "sensitivity refresh",
)
_UNIFORM = ("rtn", "awq", "gptq", "efficient_qat")  # decide nothing
_STAGE = [
    "stage", "wall_seconds", "cpu_seconds", "peak_bytes", "evaluations", "unit", "units", "full_units", "unit_scale",
    "full_seconds",
]


def cost_by_stage(timings, runs) -> pd.DataFrame:
    """What each method costs at one budget, stage by stage.

    Parameters
    ----------
    timings : path-like, iterable or mapping of path-like
        JSON files ``timing/{quantization,rival}/{run}.json`` and ``timing/salience/{model}.{source}.json``, each
        with a list `stages` (:meth:`sfmp.cost.CostRecord.rows`).
    runs : path-like or pandas.DataFrame
        The design.

    Returns
    -------
    pandas.DataFrame
        `model, method, run, bpw, part` (allocation or quantization) and the columns of a stage, `full_seconds`
        extrapolated from CPU seconds (jobs of one core; on a GPU wall seconds would be the measure). Of each method
        the run of the main comparison nearest 3.5 bpw is taken. A salience that several runs share is a stage
        of each of them, and a stage that only one run of a method went through (AMQ's search serves every
        budget) is taken from it.

    Raises
    ------
    SfmpError
        If no file has stages.

    Source: experiment C1 of METHOD §4.
    """
    design = runs if isinstance(runs, pd.DataFrame) else read_runs(runs)
    records = [(path, json.loads(path.read_text())) for path in json_files(timings)]
    salience = {path.stem: record["stages"] for path, record in records if path.parent.name == "salience"}
    measured = {r["run"]: r["stages"] for p, r in records if p.parent.name != "salience" and r.get("stages")}
    main = design[design.experiments.str.split(",").map(lambda words: "main" in words)]
    main = main[main.run.isin(measured) & (main.objective != "measured")]
    if main.empty:
        raise SfmpError("timings: expected files of runs of the main comparison with `stages`, found none; run them")
    parts = [_method_stages(group, measured, salience) for _, group in main.groupby(["model", "method"], sort=False)]
    table = pd.concat(parts, ignore_index=True)
    # Jobs run beside each other on shared cores: CPU seconds are what a stage costs, wall seconds what it waited too.
    table["full_seconds"] *= (table.cpu_seconds / table.wall_seconds).where(table.wall_seconds > 0, 1.0)
    table["part"] = table.stage.isin(DECIDING).map({True: "allocation", False: "quantization"})
    order = {method: place for place, method in enumerate(METHODS)}
    table["place"] = table.method.map(order).fillna(len(order))
    table = table.sort_values(["model", "place"], kind="stable", ignore_index=True)
    return table[["model", "method", "run", "bpw", "part", *_STAGE]]


def _method_stages(runs, measured, salience):
    """Stages of one method: of the run nearest the common budget, completed by what its runs share."""
    runs = runs.iloc[(runs.bpw - COMMON_BPW).abs().argsort(kind="stable")]
    chosen = runs.iloc[0]
    stages = list(measured[chosen.run])
    names = {stage["stage"] for stage in stages}
    for run in runs.run.iloc[1:]:
        shared = [stage for stage in measured[run] if stage["stage"] not in names]
        stages, names = shared + stages, names | {stage["stage"] for stage in shared}
    source = f"{chosen.model}.{chosen.get('salience', '-')}"
    if chosen.method not in _UNIFORM and "salience" not in names and source in salience:
        stages = [{**stage, "stage": "salience"} for stage in salience[source]] + stages
    frame = pd.DataFrame(stages).reindex(columns=_STAGE)
    return frame.assign(model=chosen.model, method=chosen.method, run=chosen.run, bpw=chosen.bpw)


def cost_ratios(table: pd.DataFrame) -> pd.DataFrame:
    """What each method costs beside SFMP on AWQ, with the knobs used here and with the published ones.

    Parameters
    ----------
    table : pandas.DataFrame
        :func:`cost_by_stage`.

    Returns
    -------
    pandas.DataFrame
        `model, method, part` (allocation, i.e. all that decides the bits, or total), `knobs` (reduced; full for
        the allocation only, because AWQ and GPTQ are not extrapolated to their published calibration),
        `seconds, ours_seconds, ratio`. A part that a method does not have is left out.
    """
    rows = []
    for model, frame in table.groupby("model", sort=False):
        for part in ("allocation", "total"):
            kept = frame if part == "total" else frame[frame.part == part]
            for knobs, column in (("reduced", "cpu_seconds"), ("full", "full_seconds")):
                if part == "total" and knobs == "full":
                    continue  # AWQ and GPTQ themselves are not extrapolated to their published calibration
                seconds = kept.groupby("method", sort=False)[column].sum()
                if OURS not in seconds:
                    continue
                for method, value in seconds.drop(OURS).items():
                    rows.append((model, method, part, knobs, value, seconds[OURS], value / seconds[OURS]))
    columns = ["model", "method", "part", "knobs", "seconds", "ours_seconds", "ratio"]
    return pd.DataFrame(rows, columns=columns)


def needed_evaluations(table: pd.DataFrame) -> pd.DataFrame:
    """Units of work by stage, here and with the published settings: the part of the cost that reads no clock."""
    shown = table[["method", "stage", "unit", "units", "full_units", "unit_scale"]]
    return shown[shown.unit != "run"].reset_index(drop=True)


def timing_files(folder) -> list[Path]:
    """Every timing file of a tier's ``timing`` folder."""
    return [path for part in ("quantization", "rival", "salience") for path in json_files(Path(folder) / part)]
