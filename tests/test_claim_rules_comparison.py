"""Rules of the full comparison, each on tables where the answer is known; every rule can come out negative."""

import pandas as pd
import pytest

from sfmp import claim_rules_comparison as rules

OURS = {"method": "ours"}


def equal_bytes(ours=(10, 9), rival=11, budget=300, rival_bytes=300):
    """Ours at one budget counted in bits (310 bytes) and in bytes (300), and one rival."""
    rows = [("ours", 310, ours[1]), ("ours", 300, ours[0]), ("rival", rival_bytes, rival)]
    table = pd.DataFrame(rows, columns=["method", "stored_bytes", "perplexity"])
    return table.assign(model="m", bpw=3.0, budget_bytes=budget)


@pytest.mark.parametrize(
    ("options", "verdict", "mean"),
    [
        ({}, "replicated", 10 / 11),
        ({"rival": 9.5}, "not-replicated", 10 / 9.5),  # ours with more bytes would win, but may not compete
        ({"rival": 9.5, "rival_bytes": 310}, "replicated", 9 / 9.5),  # the rival stores as much as ours does
        ({"rival": 9.5, "rival_bytes": 280}, "not-replicated", 10 / 9.5),  # less than its budget: its own loss
    ],
)
def test_in_bytes_the_largest_run_that_fits_competes(options, verdict, mean):
    table = {"t": equal_bytes(**options)}
    result = rules.not_worse_in_bytes(table, table="t", better=OURS, rivals=["rival"])
    assert result["verdict"] == verdict and f"mean ratio {mean:.4f}" in result["ours"]


def test_nothing_that_fits_is_no_evidence():
    table = {"t": equal_bytes(budget=200, rival_bytes=200)}
    for tables in (table, {}):
        result = rules.not_worse_in_bytes(tables, table="t", better=OURS, rivals=["rival"])
        assert result["verdict"].startswith("not-run")


@pytest.mark.parametrize(("rival", "verdict"), [(9.5, "not-replicated"), (11, "replicated"), (8, "replicated")])
def test_order_kept_compares_winners_not_margins(rival, verdict):
    bits = pd.DataFrame({"model": "m", "method": ["ours", "rival"], "bpw": 3.0, "perplexity": [9, rival]})
    tables = {"bits": bits, "bytes": equal_bytes(rival=rival)}
    result = rules.order_kept(tables, bits="bits", table="bytes", better=OURS, rivals=["rival"])
    assert result["verdict"] == verdict


@pytest.mark.parametrize(
    ("rival", "verdict"),
    [
        ((12, 11, 10), "replicated"),
        ((11, 10.5, 10.9), "direction-only"),  # largest at 2.5, but not smallest at the end
        ((10.1, 10.2, 12), "not-replicated"),
        ((9, 9, 9), "not-replicated"),  # no lead at all
    ],
)
def test_lead_must_peak_at_low_bits(rival, verdict):
    rows = [("ours", bpw, 10) for bpw in (2.5, 3.0, 3.5)]
    rows += [("rival", bpw, value) for bpw, value in zip((2.5, 3.0, 3.5), rival, strict=True)]
    rows += [("worse", bpw, 99) for bpw in (2.5, 3.0, 3.5)]  # the best rival counts
    table = pd.DataFrame(rows, columns=["method", "bpw", "perplexity"]).assign(model="m")
    result = rules.lead_at_low_bits({"t": table}, table="t", better=OURS, rivals=["rival", "worse"], limit=3.0)
    assert result["verdict"] == verdict


@pytest.mark.parametrize(("value", "verdict"), [(9, "replicated"), (12, "not-replicated")])
def test_best_of(value, verdict):
    table = pd.DataFrame({"model": "m", "bpw": 2.25, "method": ["a", "b"], "perplexity": [value, 10]})
    arguments = {"table": "t", "where": {"bpw": 2.25}, "column": "method", "name": "a", "among": ["b"]}
    assert rules.best_of({"t": table}, **arguments)["verdict"] == verdict
    assert rules.best_of({"t": table.iloc[1:]}, **arguments)["verdict"].startswith("not-run")


@pytest.mark.parametrize(
    ("ours", "verdict"), [((10.1, 10), "replicated"), ((10.4, 9), "direction-only"), ((11, 11), "not-replicated")]
)
def test_within_ratio(ours, verdict):
    rows = [("a", 2.5, ours[0]), ("a", 3.0, ours[1]), ("b", 2.5, 10), ("b", 3.0, 10)]
    table = pd.DataFrame(rows, columns=["method", "bpw", "perplexity"]).assign(model="m")
    arguments = {"table": "t", "better": {"method": "a"}, "worse": {"method": "b"}, "limit": 0.02}
    assert rules.within_ratio({"t": table}, **arguments)["verdict"] == verdict


@pytest.mark.parametrize(("best", "verdict"), [(0.9995, "replicated"), (0.99, "not-replicated")])
def test_not_beaten_looks_at_every_case(best, verdict):
    rows = [("x", 2.5, "ours", 1.0), ("x", 2.5, "ilp", best), ("y", 2.5, "ours", 1.0), ("y", 2.5, "ilp", 1.0)]
    table = pd.DataFrame(rows, columns=["objective", "bpw", "method", "loss"])
    arguments = {"name": "ours", "among": ["ilp"], "keys": ["objective", "bpw"], "spare": 0.001}
    result = rules.not_beaten({"t": table}, table="t", **arguments)
    assert result["verdict"] == verdict and result["ours"].endswith(f"{1 / best:.6f}")
    assert rules.not_beaten({}, table="t", **arguments)["verdict"].startswith("not-run")


@pytest.mark.parametrize(
    ("reordered", "verdict"), [(11, "replicated"), (13, "direction-only"), (15, "not-replicated")]
)
def test_gap_closed_is_a_share_of_the_distance_to_the_ideal(reordered, verdict):
    rows = [("element", "-", "element", 10), ("64", "none", "s", 14), ("64", "both", "s", reordered)]
    table = pd.DataFrame(rows, columns=["unit", "reorder", "method", "perplexity"]).assign(bpw=3.0)
    arguments = {"ideal": {"method": "element"}, "column": "reorder", "low": "none", "high": "both", "unit": "unit"}
    result = rules.gap_closed({"t": table}, table="t", **arguments)
    assert result["verdict"] == verdict and f"{100 * (14 - reordered) / 4:.0f} % at 64" in result["ours"]
    assert rules.gap_closed({"t": table[:2]}, table="t", **arguments)["verdict"].startswith("not-run")


def test_no_run_may_exceed_its_budget():
    table = pd.DataFrame({"bpw": [3.0, 2.5], "bpw_achieved": [3.0, 2.4], "reached": ["yes", "2.40 of 2.50"]})
    result = rules.never_above({"t": table}, table="t")
    assert result == {"ours": "2/2 runs within; 1 could only reach less", "verdict": "replicated"}
    assert rules.never_above({"t": table.assign(bpw=2.9)}, table="t")["verdict"] == "not-replicated"


def test_the_plain_control_bounds_the_table():
    rows = [("fp16", None, 5), ("rtn", 3.0, 10), ("a", 3.0, 9), ("b", 3.0, 9), ("c", 3.0, 11), ("a", 2.5, 99)]
    table = pd.DataFrame(rows, columns=["method", "bpw", "perplexity"]).assign(model="m")
    result = rules.control_last({"t": table}, table="t")  # at 2.5 there is no control
    assert result == {"ours": "2/3 runs; worse: c", "verdict": "direction-only"}
    assert rules.control_last({"t": table[table.method != "c"]}, table="t")["verdict"] == "replicated"


@pytest.mark.parametrize(("ratio", "verdict"), [(101, "replicated"), (50, "direction-only"), (1.5, "not-replicated")])
def test_cost_verdicts_hold_thresholds_not_readings(ratio, verdict):
    table = pd.DataFrame({"method": ["amq"], "part": ["allocation"], "ratio": [float(ratio)]})
    result = rules.at_least_times({"t": table}, table="t", where={"method": "amq"}, times=100)
    assert result["verdict"] == verdict and str(ratio) not in result["ours"]
    missing = rules.at_least_times({"t": table}, table="t", where={"method": "b"}, times=1)
    assert missing["verdict"].startswith("not-run")


@pytest.mark.parametrize(
    ("own", "other", "verdict"),
    [(0.0, 1.0, "replicated"), (0.0, 0.2, "direction-only"), (1.0, 1.0, "not-replicated")],
)
def test_needs_grow(own, other, verdict):
    rows = [("sfmp", "salience", own), ("amq", "sensitivity", 1.0), ("bitstack", "sorting", other)]
    table = pd.DataFrame(rows, columns=["method", "stage", "needed_exponent"]).assign(axis="layers")
    arguments = {"axis": "layers", "ours": ["sfmp", "salience"]}
    arguments["rivals"] = [["amq", "sensitivity"], ["bitstack", "sorting"]]
    assert rules.needs_grow({"t": table}, table="t", **arguments)["verdict"] == verdict
    assert rules.needs_grow({"t": table[:1]}, table="t", **arguments)["verdict"].startswith("not-run")


@pytest.mark.parametrize(
    ("values", "verdict"),
    [((0.9, 0.95), "replicated"), ((0.89, 0.95), "direction-only"), ((0.89, 0.9), "not-replicated")],
)
def test_at_least(values, verdict):
    table = pd.DataFrame({"comparison": ["a", "b", "c"], "spearman": [*values, -1.0]})
    arguments = {"table": "t", "column": "spearman", "limit": 0.9, "where": {"comparison": ["a", "b"]}}
    result = rules.at_least({"t": table}, **arguments)
    assert result["verdict"] == verdict and f"lowest {min(values):.3f}" in result["ours"]
    gap = {"t": pd.concat([table, pd.DataFrame({"comparison": ["b"]})])}
    assert rules.at_least(gap, **arguments)["verdict"] == verdict
    assert rules.at_least(gap, **arguments, whole=True)["verdict"] == "not-run (1 of 3 values were not measured)"
    for tables in ({}, {"t": table[2:]}, {"t": table.drop(columns="spearman")}):
        assert rules.at_least(tables, **arguments)["verdict"].startswith("not-run")
