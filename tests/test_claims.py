"""The claims ledger: each rule on tables where the answer is known, and the shipped ledger itself."""

import re
from pathlib import Path

import pandas as pd
import pytest

from sfmp import claim_rules as rules
from sfmp import claims
from sfmp.checks import SfmpError
from sfmp.tables import read_paper_values

CONFIG = Path(__file__).resolve().parents[1] / "config"
SFMP, RTN = {"method": "sfmp-rtn"}, {"method": "rtn"}


def main(fp=8.0, ours=(12, 10), rival=(14, 11)):
    rows = [("m", "fp16", None, fp)]
    rows += [("m", "sfmp-rtn", bpw, ppl) for bpw, ppl in zip((2.5, 3.0), ours, strict=True)]
    rows += [("m", "rtn", bpw, ppl) for bpw, ppl in zip((2.5, 3.0), rival, strict=True)]
    return pd.DataFrame(rows, columns=["model", "method", "bpw", "perplexity"])


@pytest.mark.parametrize(
    ("ours", "verdict", "count"),
    [
        ((12, 10), "replicated", "2/2"),
        ((14, 11), "replicated", "2/2"),
        ((10, 11.5), "not-replicated", "1/2"),  # better on average, but not at most budgets
        ((15, 10.9), "not-replicated", "1/2"),
        ((15, 12), "not-replicated", "0/2"),
    ],
)
def test_not_worse_counts_every_budget(ours, verdict, count):
    result = rules.not_worse({"e1_main": main(ours=ours)}, table="e1_main", better=SFMP, worse=RTN)
    assert result["verdict"] == verdict and result["ours"].startswith(count)


def test_most_budgets_and_the_average_make_a_direction():
    frame = pd.concat([main(ours=(10, 11.5)), main(ours=(10, 10)).assign(model="n")])
    assert rules.not_worse({"t": frame}, table="t", better=SFMP, worse=RTN)["verdict"] == "direction-only"


def test_differences_within_a_standard_error_are_counted():
    frame = main(ours=(0.52, 0.60), rival=(0.50, 0.50)).rename(columns={"perplexity": "acc"}).assign(acc_stderr=0.03)
    result = rules.not_worse({"t": frame}, table="t", better=SFMP, worse=RTN, metric="acc", lower=False)
    assert result["ours"].endswith("1 within one standard error")


def test_a_missing_value_is_no_step():
    frame = pd.DataFrame({"bpw": [1, 2, 3], "retention": [0.5, float("nan"), 0.6]})
    result = rules.monotone({"t": frame}, table="t", where={}, metric="retention", falling=False)
    assert result["ours"].startswith("1/1 steps") and result["verdict"] == "replicated"


def test_not_worse_for_higher_is_better():
    table = {"t": main().rename(columns={"perplexity": "acc"})}
    assert (
        rules.not_worse(table, table="t", better=RTN, worse=SFMP, metric="acc", lower=False)["verdict"]
        == "replicated"
    )
    assert (
        rules.not_worse(table, table="t", better=SFMP, worse=RTN, metric="acc", lower=False)["verdict"]
        == "not-replicated"
    )


def test_not_worse_averages_repeats_and_keeps_quantizers_apart():
    rows = [("rtn", "fisher", 10), ("rtn", "random", 9), ("rtn", "random", 12), ("awq", "fisher", 5)]
    table = pd.DataFrame(rows, columns=["method", "salience", "perplexity"]).assign(model="m", bpw=3.0)
    result = rules.not_worse(
        {"t": table}, table="t", better={"salience": "fisher"}, worse={"salience": "random"}
    )
    assert (
        result["ours"].startswith("1/1") and result["verdict"] == "replicated"
    )  # 10 against 10.5; awq has no rival


def test_no_common_budget_is_not_run():
    result = rules.not_worse({"t": main()}, table="t", better=SFMP, worse={"method": "gptq"})
    assert result["verdict"].startswith("not-run (")
    assert rules.not_worse({}, table="t", better=SFMP, worse=RTN)["verdict"].startswith("not-run (")


@pytest.mark.parametrize(
    ("curve", "verdict"),
    [((9, 7, 5), "replicated"), ((9, 4, 5), "direction-only"), ((5, 4, 9), "not-replicated")],
)
def test_monotone(curve, verdict):
    table = pd.DataFrame({"method": "a", "bpw": [3, 2, 4], "perplexity": [curve[1], curve[0], curve[2]]})
    assert rules.monotone({"t": table}, table="t", where={"method": "a"})["verdict"] == verdict


@pytest.mark.parametrize(
    ("curves", "verdict"),
    [
        (((3, 1, 2),), "replicated"),
        (((1, 2, 3),), "not-replicated"),
        (((3, 1, 2), (1, 2, 3)), "direction-only"),
    ],
)
def test_non_monotone(curves, verdict):
    rows = [(bpw, g, ppl) for bpw, c in enumerate(curves) for g, ppl in zip((32, 64, 128), c, strict=True)]
    table = pd.DataFrame(rows, columns=["bpw", "group_size", "perplexity"])
    assert rules.non_monotone({"t": table}, table="t", factor="group_size")["verdict"] == verdict


def test_budget_met_uses_the_tolerance_of_each_run():
    table = pd.DataFrame({"bpw": [3.0, 2.5], "bpw_achieved": [2.99, 2.5], "bpw_tolerance": [0.02, 0.0]})
    assert rules.budget_met({"t": table}, table="t")["verdict"] == "replicated"
    assert (
        rules.budget_met({"t": table.assign(bpw_tolerance=0.005)}, table="t")["verdict"] == "not-replicated"
    )


def test_budget_met_is_about_runs_with_several_levels():
    table = pd.DataFrame({"bpw": [3.0, 2.5], "bpw_achieved": 3.0, "bpw_tolerance": 0.1, "levels": ["2,3,4", "2"]})
    assert rules.budget_met({"t": table}, table="t") == {
        "ours": "1/1 mixed runs; largest gap 0.00e+00 bpw",
        "verdict": "replicated",
    }
    assert rules.budget_met({"t": table.iloc[1:]}, table="t")["verdict"].startswith("not-run")


def test_every_verdict_names_the_manifest_of_its_evidence(tmp_path):
    main().to_csv(tmp_path / "e1_main.csv", index=False)
    tables = claims.load_tables([tmp_path], allocation_speed=claims.allocation_speed(blocks=10))
    judged = claims.evaluate(CONFIG / "claims.tsv", tables, read_paper_values(CONFIG / "paper_values.tsv"))
    found = judged.set_index("claim").manifest
    assert found["C01"] == "e1_main.csv.manifest.json" and found["C25"] == found["C23"] == ""
    assert found["C20"] == "claims.csv.manifest.json"  # measured by the notebook that writes the ledger


def test_control_must_be_best():
    assert rules.control_first({"t": main()}, table="t")["verdict"] == "replicated"
    assert rules.control_first({"t": main(fp=13)}, table="t")["verdict"] == "not-replicated"
    assert rules.control_first({"t": main().iloc[1:]}, table="t")["verdict"].startswith("not-run")


def test_all_true_and_within_seconds():
    table = {"t": pd.DataFrame({"ok": [True, False], "seconds": [1.0, 3.0]})}
    assert rules.all_true(table, table="t", column="ok")["verdict"] == "not-replicated"
    assert rules.all_true({"t": table["t"].iloc[:1]}, table="t", column="ok")["verdict"] == "replicated"
    assert rules.within_seconds(table, table="t", column="seconds", limit=2)["verdict"] == "not-replicated"
    within = rules.within_seconds(table, table="t", column="seconds", limit=5)
    assert within["verdict"] == "replicated" and "3.0" not in within["ours"]  # no clock reading in the ledger


def test_verdicts_are_a_closed_list():
    with pytest.raises(SfmpError, match="closed list"):
        rules.outcome("promising", "")
    with pytest.raises(SfmpError, match="reason"):
        rules.outcome("not-run", "")


def test_settings_compare_as_text():
    frame = pd.DataFrame({"group_size": [128.0, 64.0], "levels": ["2,3,4", "2"]})
    assert len(rules.rows(frame, {"group_size": 128})) == 1 and len(rules.rows(frame, {"levels": 2})) == 1
    assert rules.rows(frame, {"weather": "fine"}).empty


def test_shipped_ledger_is_valid_and_never_green_without_evidence():
    paper = read_paper_values(CONFIG / "paper_values.tsv")
    judged = claims.evaluate(CONFIG / "claims.tsv", {}, paper)
    assert judged.verdict.str.match(r"not-(run|possible-here) \(.+\)$").all()
    assert not judged.expected.str.contains("paper:").any() and judged.expected.str.contains("98.9 %").any()
    counts = claims.summary(judged)
    assert counts.claims.sum() == len(judged) and tuple(counts.verdict) == rules.VERDICTS


def test_without_the_control_nothing_measured_is_judged():
    paper = read_paper_values(CONFIG / "paper_values.tsv")
    table = pd.DataFrame({"round_trip": [True]})
    judged = claims.evaluate(CONFIG / "claims.tsv", {"packing": table}, paper).set_index("claim")
    assert judged.verdict["C23"] == "not-run (no fp control)"
    judged = claims.evaluate(CONFIG / "claims.tsv", {"packing": table, "e1_main": main()}, paper).set_index(
        "claim"
    )
    assert judged.verdict["C23"] == "replicated" and judged.verdict["C05"].startswith(
        "not-run"
    )  # no objective column


def test_ledger_selectors_name_columns_that_the_tables_have():
    from sfmp.tables import FACTORS

    known = FACTORS | {"granularity": ["block_rows", "group_size", "reorder"], "quantizer": []}
    for row in claims.read_claims(CONFIG / "claims.tsv").itertuples():
        for column in re.findall(r'"(reorder|salience|levels|objective|group_size|block_rows)":', row.args):
            name = re.search(r'"table":"e3_(\w+)"', row.args)
            assert name is None or column in known[name[1]], row.claim


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("not_worse", "looks_good", "rule 'looks_good' is unknown"),
        ("C02\t", "C01\t", "twice"),
        ('{"table":"e1_main","better"', '["e1_main","better"', "one JSON object"),
        ("claim\t", "id\t", "columns"),
        ("At equal bits per weight", "word " * 20, "at most 25"),
    ],
)
def test_broken_ledgers_are_refused(tmp_path, old, new, message):
    path = tmp_path / "claims.tsv"
    path.write_text((CONFIG / "claims.tsv").read_text().replace(old, new, 1))
    with pytest.raises(SfmpError, match=message):
        claims.read_claims(path)


def test_unknown_paper_value_is_refused(tmp_path):
    path = tmp_path / "claims.tsv"
    path.write_text((CONFIG / "claims.tsv").read_text().replace("paper:retention", "paper:nothing", 1))
    with pytest.raises(SfmpError, match="paper_values"):
        claims.evaluate(path, {}, read_paper_values(CONFIG / "paper_values.tsv"))


def test_model_zoo_is_complete():
    paper = read_paper_values(CONFIG / "paper_values.tsv")
    zoo = paper[paper.id.str.startswith("zoo.")]
    assert zoo.groupby("metric").size().to_dict() == {"acc": 10, "perplexity": 10}
    assert zoo.source.str.len().min() > 10 and paper.unit.isin(["token perplexity", "%", "h"]).all()
