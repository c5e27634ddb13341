"""Rules of the claims ledger: small named functions from result tables to a verdict.

Rules see tables only, never files, so a verdict cannot rest on anything that is not in a published CSV. A
rule never raises because data are missing: the verdict says so.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from sfmp.checks import SfmpError
from sfmp.records import FP

VERDICTS = ("replicated", "direction-only", "not-replicated", "not-run", "not-possible-here")


def outcome(verdict: str, ours: str, reason: str = "") -> dict:
    """One verdict; `reason` is put in brackets and is required for the two verdicts that mean "no
    evidence".
    """
    if verdict not in VERDICTS:
        raise SfmpError(f"verdict {verdict!r} is not in the closed list {VERDICTS}.")
    if verdict in VERDICTS[3:]:
        if not reason:
            raise SfmpError(f"verdict {verdict!r} needs a reason.")
        return {"ours": ours, "verdict": f"{verdict} ({reason})"}
    return {"ours": ours, "verdict": verdict}


def rows(frame: pd.DataFrame, where: Mapping) -> pd.DataFrame:
    """Rows whose columns equal the values of `where`, or one of a list of them, compared as text (so 128 and
    "128" are the same setting).
    """
    for column, value in where.items():
        if column not in frame:
            return frame.iloc[0:0]
        allowed = [_text(v) for v in (value if isinstance(value, list) else [value])]
        frame = frame[frame[column].map(_text).isin(allowed)]
    return frame


def _text(value) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def paired(frame: pd.DataFrame, left: Mapping, right: Mapping, metric: str) -> pd.DataFrame:
    """Mean `metric` of two selections at every budget both have; columns `left`, `right`. Repeats are
    averaged.

    Budgets are matched per model, and per method too unless the selections name the methods themselves.
    """
    keys = ["model", "bpw"] if "method" in left else ["model", "method", "bpw"]
    if frame.empty or not {*keys, metric} <= set(frame):
        return pd.DataFrame(columns=["left", "right"])
    sides = [rows(frame, where).groupby(keys)[metric].mean() for where in (left, right)]
    return pd.concat(sides, axis=1, keys=["left", "right"]).dropna()


# ---- rules: (tables, **args) -> outcome
# -------------------------------------------------------------------------------


def not_worse(tables, *, table, better, worse, metric="perplexity", lower=True):
    """Is `better` at least as good as `worse` at every common budget?

    replicated: all budgets; direction-only: better on (geometric) average and at more than half of them; else
    not-replicated.
    """
    pairs = paired(tables.get(table, pd.DataFrame()), better, worse, metric)
    if pairs.empty:
        return outcome("not-run", "", f"no budget with both in {table}")
    ratio = pairs.left / pairs.right if lower else pairs.right / pairs.left
    return judged(ratio, _noise(tables[table], pairs, metric))


def judged(ratio: pd.Series, note: str = "") -> dict:
    """Verdict on ratios that should be at most 1: all; most, and on geometric average; or neither."""
    wins, mean = int((ratio <= 1).sum()), float(np.exp(np.log(ratio).mean()))
    mostly = mean < 1 and 2 * wins > len(ratio)
    verdict = "replicated" if wins == len(ratio) else "direction-only" if mostly else "not-replicated"
    return outcome(verdict, f"{wins}/{len(ratio)} comparisons; mean ratio {mean:.4f}, worst {ratio.max():.4f}{note}")


def _noise(frame, pairs, metric) -> str:
    """How many pairs differ by less than one standard error, for a metric that has one."""
    errors = frame.get(f"{metric}_stderr", pd.Series(dtype=float)).dropna()
    if errors.empty:
        return ""
    within = int(((pairs.left - pairs.right).abs() <= errors.max()).sum())
    return f"; {within} within one standard error"


def monotone(tables, *, table, where, x="bpw", metric="perplexity", falling=True):
    """Does `metric` fall (or rise) at every step of `x`? direction-only if only its ends do."""
    frame = rows(tables.get(table, pd.DataFrame()), where)
    if len(frame) < 2 or not {x, metric} <= set(frame):
        return outcome("not-run", "", f"fewer than two points in {table}")
    curve = frame.groupby(x)[metric].mean().dropna().sort_index()
    if len(curve) < 2:
        return outcome("not-run", "", f"fewer than two points in {table}")
    steps = np.diff(curve) * (-1 if falling else 1)
    good, ends = int((steps > 0).sum()), (curve.iloc[-1] - curve.iloc[0]) * (-1 if falling else 1) > 0
    verdict = "replicated" if good == len(steps) else "direction-only" if ends else "not-replicated"
    return outcome(
        verdict, f"{good}/{len(steps)} steps; {metric} {curve.iloc[0]:.4g} to {curve.iloc[-1]:.4g}"
    )


def non_monotone(tables, *, table, factor, metric="perplexity", where=None):
    """Is the best value of `factor` inside its range, at every budget? direction-only if at some budgets
    only.
    """
    frame = rows(tables.get(table, pd.DataFrame()), where or {})
    found = []
    complete = len(frame) and {"bpw", factor, metric} <= set(frame)
    for bpw, part in frame.groupby("bpw") if complete else ():
        curve = part.groupby(factor)[metric].mean().sort_index()
        if len(curve) >= 3:
            found.append((bpw, curve.idxmin(), curve.index[0] < curve.idxmin() < curve.index[-1]))
    if not found:
        return outcome("not-run", "", f"no budget with three values of {factor} in {table}")
    inside = sum(ok for *_, ok in found)
    verdict = "replicated" if inside == len(found) else "direction-only" if inside else "not-replicated"
    best = ", ".join(f"{bpw:g} bpw: {value:g}" for bpw, value, _ in found)
    return outcome(
        verdict, f"optimum inside the range at {inside}/{len(found)} budgets; best {factor} at {best}"
    )


def budget_met(tables, *, table):
    """Is |achieved - target| bpw at most one block's largest increment, for every mixed run?"""
    frame = tables.get(table, pd.DataFrame())
    if "levels" in frame:  # one level meets its budget by design
        frame = frame[frame.levels.astype(str).str.contains(",|auto")]
    needed = ["bpw", "bpw_achieved", "bpw_tolerance"]
    if frame.empty or not set(needed) <= set(frame) or frame[needed].dropna().empty:
        return outcome("not-run", "", f"{table} has no achieved budgets")
    frame = frame.dropna(subset=needed)
    gap = (frame.bpw_achieved - frame.bpw).abs()
    good = int((gap <= frame.bpw_tolerance).sum())
    verdict = "replicated" if good == len(frame) else "not-replicated"
    return outcome(verdict, f"{good}/{len(frame)} mixed runs; largest gap {gap.max():.2e} bpw")


def control_first(tables, *, table, metric="perplexity"):
    """Does the fp control beat every quantized run of its model? The gate of all other verdicts."""
    frame = tables.get(table, pd.DataFrame())
    if not {"method", "model", metric} <= set(frame) or FP not in set(frame.method):
        return outcome("not-run", "", f"no {FP} row in {table}")
    control = frame[frame.method == FP].groupby("model")[metric].min()
    others = frame[frame.method != FP]
    good = int((others[metric] >= others.model.map(control)).sum())
    verdict = "replicated" if good == len(others) else "not-replicated"
    return outcome(verdict, f"{good}/{len(others)} quantized runs have {metric} >= the control's")


def all_true(tables, *, table, column, where=None):
    """Is every entry of a yes/no column true?"""
    frame = rows(tables.get(table, pd.DataFrame()), where or {})
    if frame.empty or column not in frame:
        return outcome("not-run", "", f"{table} has no column {column}")
    good = int(frame[column].astype(str).str.lower().eq("true").sum())
    return outcome("replicated" if good == len(frame) else "not-replicated", f"{good}/{len(frame)} rows true")


def within_seconds(tables, *, table, column, limit, where=None):
    """Is every duration within `limit` seconds? The seconds stay in `table`: verdict files hold no clock
    readings.
    """
    frame = rows(tables.get(table, pd.DataFrame()), where or {})
    if frame.empty or column not in frame or frame[column].dropna().empty:
        return outcome("not-run", "", f"{table} has no {column}")
    values = frame[column].dropna()
    if (values <= limit).all():
        return outcome("replicated", f"all {len(values)} within {limit:g} s")
    return outcome("not-replicated", f"not all {len(values)} within {limit:g} s")


def not_run(tables, *, reason):
    """A claim this tier does not test, with the reason."""
    return outcome("not-run", "", reason)


def not_possible_here(tables, *, reason):
    """A claim that cannot be tested by anyone with this artifact, with the reason."""
    return outcome("not-possible-here", "", reason)


RULES = {
    rule.__name__: rule
    for rule in (
        not_worse,
        monotone,
        non_monotone,
        budget_met,
        control_first,
        all_true,
        within_seconds,
        not_run,
        not_possible_here,
    )
}
