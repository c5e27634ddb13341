"""Rules of the claims ledger for the full comparison: equal bytes, leads, units, and orders of magnitude of cost.

As in :mod:`sfmp.claim_rules`, rules see tables only and never raise because data are missing. Rules about cost name
thresholds, never readings: the ledger must be the same in every run.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from sfmp.claim_rules import VERDICTS, _text, judged, outcome, paired, rows
from sfmp.records import FP

SPARE = 1e-3  # share of its bytes by which a run may exceed another's and count as equal: a block more or less


def not_worse_in_bytes(tables, *, table, better, rivals, metric="perplexity", lower=True):
    """Is `better` at least as good as each rival at every budget, with no more bytes than the rival's?

    Of `better`, the largest run at that budget is taken that stores no more than the rival's budget in bytes, or
    than the rival does, whichever is more. Verdicts as in ``not_worse``; of several rivals the worst decides.
    """
    pairs = _pairs_in_bytes(tables.get(table, pd.DataFrame()), better, rivals, metric)
    if pairs.empty:
        return outcome("not-run", "", f"no budget with both in bytes in {table}")
    ratio = pairs.ours / pairs.rival if lower else pairs.rival / pairs.ours
    each = [judged(part) for _, part in ratio.groupby(pairs.method, sort=False)]
    worst = max((one["verdict"] for one in each), key=VERDICTS.index)
    return outcome(worst, judged(ratio)["ours"])


def _pairs_in_bytes(frame, better, rivals, metric):
    """Columns model, method, bpw, ours, rival: see :func:`not_worse_in_bytes`."""
    columns = ["model", "method", "bpw", "ours", "rival"]
    if not {"model", "method", "bpw", "stored_bytes", "budget_bytes", metric} <= set(frame):
        return pd.DataFrame(columns=columns)
    ours = rows(frame, better).dropna(subset=[metric, "stored_bytes"])
    found = []
    for row in rows(frame, {"method": rivals}).dropna(subset=[metric, "stored_bytes"]).itertuples():
        same = ours[(ours.model == row.model) & (ours.bpw == row.bpw)]
        fits = same[same.stored_bytes <= max(row.stored_bytes, row.budget_bytes) * (1 + SPARE)]
        if len(fits):
            best = fits.loc[fits.stored_bytes.idxmax(), metric]
            found.append((row.model, row.method, row.bpw, best, getattr(row, metric)))
    return pd.DataFrame(found, columns=columns)


def order_kept(tables, *, bits, table, better, rivals, metric="perplexity"):
    """Is whoever is ahead at equal bits also ahead at equal bytes, for every rival and budget?

    replicated: everywhere; else not-replicated.
    """
    pairs = _pairs_in_bytes(tables.get(table, pd.DataFrame()), better, rivals, metric)
    frame, kept = tables.get(bits, pd.DataFrame()), []
    for rival in rivals if len(pairs) else ():
        equal = paired(frame, better, {"method": rival}, metric)
        for row in pairs[pairs.method == rival].itertuples():
            if (row.model, row.bpw) in equal.index:
                here = equal.loc[(row.model, row.bpw)]
                kept.append((here.left <= here.right) == (row.ours <= row.rival))
    if not kept:
        return outcome("not-run", "", f"no comparison in both {bits} and {table}")
    good = sum(kept)
    verdict = "replicated" if good == len(kept) else "not-replicated"
    return outcome(verdict, f"{good}/{len(kept)} comparisons have the same winner")


def lead_at_low_bits(tables, *, table, better, rivals, limit, metric="perplexity"):
    """Is the lead over the best rival largest at or below `limit` bpw, and smallest at the highest budget?

    Only budgets at which every rival has a run are compared.

    direction-only: largest there, but not smallest at the highest; not-replicated also where no lead is positive.
    """
    frame = tables.get(table, pd.DataFrame())
    if not {"method", "model", "bpw", metric} <= set(frame):
        return outcome("not-run", "", f"{table} has no {metric} by method and budget")
    keys = ["model", "bpw"]
    ours = rows(frame, better).groupby(keys)[metric].mean()
    theirs = rows(frame, {"method": rivals}).dropna(subset=[metric]).groupby(keys)
    best = theirs[metric].min()[theirs.method.nunique() == len(set(rivals))]
    lead = (best / ours - 1).dropna()
    if len(lead) < 2:
        return outcome("not-run", "", f"fewer than two budgets with both in {table}")
    by_bpw = lead.groupby("bpw").mean().sort_index()
    low = by_bpw.max() > 0 and by_bpw.idxmax() <= limit
    verdict = "replicated" if low and by_bpw.idxmin() == by_bpw.index[-1] else "direction-only" if low else None
    shown = ", ".join(f"{100 * value:+.1f} % at {bpw:g}" for bpw, value in by_bpw.items())
    return outcome(verdict or "not-replicated", f"lead over the best rival {shown} bpw")


def best_of(tables, *, table, where, column, name, among, metric="perplexity"):
    """Has `name` the lowest `metric` of the `among` at every budget? direction-only if at some."""
    frame = rows(rows(tables.get(table, pd.DataFrame()), where), {column: [name, *among]})
    found = []
    for _, part in frame.groupby(["model", "bpw"]) if len(frame) else ():
        means = part.groupby(column)[metric].mean()
        if name in means and len(means) > 1:
            found.append((means.idxmin() == name, means))
    if not found:
        return outcome("not-run", "", f"{table} has no {name} beside another {column}")
    good = sum(best for best, _ in found)
    verdict = "replicated" if good == len(found) else "direction-only" if good else "not-replicated"
    shown = ", ".join(f"{key} {value:.4g}" for key, value in found[0][1].sort_values().items())
    return outcome(verdict, f"best at {good}/{len(found)} budgets; {shown}")


def within_ratio(tables, *, table, better, worse, limit, metric="perplexity"):
    """Is `better` at most the share `limit` above `worse` at every common budget? direction-only if on average."""
    pairs = paired(tables.get(table, pd.DataFrame()), better, worse, metric)
    if pairs.empty:
        return outcome("not-run", "", f"no budget with both in {table}")
    ratio = pairs.left / pairs.right
    good, mean = int((ratio <= 1 + limit).sum()), float(np.exp(np.log(ratio).mean()))
    verdict = "replicated" if good == len(ratio) else "direction-only" if mean <= 1 + limit else "not-replicated"
    shown = f"mean ratio {mean:.4f}, worst {ratio.max():.4f}"
    return outcome(verdict, f"{good}/{len(ratio)} within {100 * limit:g} %; {shown}")


def at_least(tables, *, table, column, limit, where, whole=False):
    """Is `column` at least `limit` in every row of `where`? direction-only if on average.

    If `whole`, the claim stays open while a row has no value; else such rows do not count.
    """
    frame = rows(tables.get(table, pd.DataFrame()), where)
    values = frame[column].dropna() if column in frame else pd.Series(dtype=float)
    if values.empty:
        return outcome("not-run", "", f"{table} has no {column} of {', '.join(map(_text, where.values()))}")
    if whole and len(values) < len(frame):
        return outcome("not-run", "", f"{len(frame) - len(values)} of {len(frame)} values were not measured")
    good = int((values >= limit).sum())
    verdict = "replicated" if good == len(values) else "direction-only" if values.mean() >= limit else "not-replicated"
    shown = f"mean {values.mean():.3f}, lowest {values.min():.3f}"
    return outcome(verdict, f"{good}/{len(values)} at least {limit:g}; {shown}")


def not_beaten(tables, *, table, name, among, keys, spare, metric="loss"):
    """Is no other method more than the share `spare` below `name`, in any case (every combination of `keys`)?"""
    frame = tables.get(table, pd.DataFrame())
    if not {"method", metric, *keys} <= set(frame):
        return outcome("not-run", "", f"{table} has no {metric} by method")
    ours = rows(frame, {"method": name}).groupby(keys)[metric].min()
    best = rows(frame, {"method": among}).groupby(keys)[metric].min()
    ratio = (ours / best).dropna()
    if ratio.empty:
        return outcome("not-run", "", f"no case with both in {table}")
    good = int((ratio <= 1 + spare).sum())
    verdict = "replicated" if good == len(ratio) else "not-replicated"
    return outcome(verdict, f"{good}/{len(ratio)} cases; worst ratio {ratio.max():.6f}")


def gap_closed(tables, *, table, ideal, column, low, high, unit, share=0.5, metric="perplexity"):
    """How much of the distance between `low` and the ideal does `high` close, for every `unit` that has both?

    replicated: at least `share` everywhere; direction-only: something everywhere; else not-replicated.
    """
    frame = tables.get(table, pd.DataFrame())
    if not {unit, column, metric, "bpw"} <= set(frame):
        return outcome("not-run", "", f"{table} has no {metric} by {unit} and {column}")
    best = rows(frame, ideal).groupby("bpw")[metric].min()
    sides = [rows(frame, {column: value}).groupby(["bpw", unit])[metric].mean() for value in (low, high)]
    pairs = pd.concat(sides, axis=1, keys=["low", "high"]).dropna().reset_index()
    pairs = pairs[pairs.bpw.isin(best.index)]
    if pairs.empty:
        return outcome("not-run", "", f"{table} has no {unit} with {column} {low} and {high} beside the ideal")
    closed = (pairs.low - pairs.high) / (pairs.low - pairs.bpw.map(best))
    verdict = "not-replicated" if (closed <= 0).any() else "replicated" if (closed >= share).all() else "direction-only"
    shown = ", ".join(f"{100 * value:.0f} % at {name}" for name, value in zip(pairs[unit], closed, strict=True))
    return outcome(verdict, f"closed: {shown}")


def never_above(tables, *, table):
    """Does no run spend more bits per weight than its budget? One that spends less says so in `reached`."""
    frame = tables.get(table, pd.DataFrame())
    if not {"bpw", "bpw_achieved"} <= set(frame) or frame[["bpw", "bpw_achieved"]].dropna().empty:
        return outcome("not-run", "", f"{table} has no achieved budgets")
    frame = frame.dropna(subset=["bpw", "bpw_achieved"])
    good = int((frame.bpw_achieved <= frame.bpw + 1e-9).sum())
    short = int(frame.reached.str.contains(" of ").sum()) if "reached" in frame else 0
    verdict = "replicated" if good == len(frame) else "not-replicated"
    return outcome(verdict, f"{good}/{len(frame)} runs within; {short} could only reach less")


def control_last(tables, *, table, control="rtn", metric="perplexity"):
    """Is no method worse than the plain control at the same budget? direction-only if most are not."""
    frame = tables.get(table, pd.DataFrame())
    if not {"method", "model", "bpw", metric} <= set(frame) or control not in set(frame.method):
        return outcome("not-run", "", f"no {control} row in {table}")
    bound = rows(frame, {"method": control}).groupby(["model", "bpw"])[metric].min()
    others = frame[~frame.method.isin([control, FP])].set_index(["model", "bpw"])
    others = others[others.index.isin(bound.index)]
    held = others[metric] <= bound.reindex(others.index)
    beyond = sorted(set(others.method[~held]))
    good = int(held.sum())
    verdict = "replicated" if good == len(held) else "direction-only" if 2 * good > len(held) else "not-replicated"
    return outcome(verdict, f"{good}/{len(held)} runs" + (f"; worse: {', '.join(beyond)}" if beyond else ""))


def at_least_times(tables, *, table, where, times, column="ratio"):
    """Is a ratio of costs at least `times`? direction-only if it is at least 2; readings stay in `table`."""
    frame = rows(tables.get(table, pd.DataFrame()), where)
    if frame.empty or column not in frame or frame[column].dropna().empty:
        return outcome("not-run", "", f"{table} has no {column} of {', '.join(map(_text, where.values()))}")
    values = frame[column].dropna()
    if (values >= times).all():
        return outcome("replicated", f"at least {times:g} times")
    if (values >= 2).all():
        return outcome("direction-only", f"at least 2, less than {times:g} times")
    return outcome("not-replicated", "less than 2 times")


def needs_grow(tables, *, table, axis, ours, rivals, column="needed_exponent"):
    """Do the rivals' stages need work in proportion to the size, and ours a fixed amount? From counts, no clocks."""
    frame = rows(tables.get(table, pd.DataFrame()), {"axis": axis})
    found = {}
    for method, stage in [ours, *rivals] if column in frame else ():
        part = rows(frame, {"method": method, "stage": stage})[column].dropna()
        if len(part):
            found[f"{method} {stage}"] = float(part.iloc[0])
    if len(found) < 1 + len(rivals):
        return outcome("not-run", "", f"{table} lacks {column} of a stage")
    own, *others = found.values()
    good = sum(value >= 0.9 for value in others)
    good = good if abs(own) <= 0.1 else 0
    verdict = "replicated" if good == len(others) else "direction-only" if good else "not-replicated"
    shown = ", ".join(f"{name} {round(value, 1) + 0.0:.1f}" for name, value in found.items())  # no -0.0
    return outcome(verdict, f"exponents {shown}")


RULES = {
    rule.__name__: rule
    for rule in (
        not_worse_in_bytes, order_kept, lead_at_low_bits, best_of, within_ratio, at_least, not_beaten, gap_closed,
        never_above, control_last, at_least_times, needs_grow,
    )
}
