"""Experimental design: every tier is valid, and configuration errors name file, row and column."""

import shutil
from collections import Counter
from pathlib import Path

import pytest

from sfmp.design import load_design, run_spec
from sfmp.spec import SfmpError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"tier": "embedded", "seed": 0}
TIERS = ("embedded", "small", "paper")


@pytest.fixture
def config_folder(tmp_path):
    return Path(shutil.copytree(ROOT / "config", tmp_path / "config"))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize("tier", TIERS)
def test_every_tier_is_valid_and_separate(tier):
    design = load_design({**CONFIG, "tier": tier}, ROOT / "config")
    assert design.results == f"results/{tier}"
    assert all(design.models[row["model"]]["tier"] == tier for row in design.runs.values())
    controls = Counter(row["model"] for row in design.runs.values() if row["method"] == "fp16")
    assert controls == dict.fromkeys(design.models, 1)  # one unquantized control for each model
    assert set(design.config["needs"]) == {"time", "hardware", "disk", "status"}
    assert (design.config["needs"]["status"] == "run") == (tier == "embedded")


def test_embedded_design_has_every_comparison():
    design = load_design(CONFIG, ROOT / "config")
    rows = list(design.runs.values())

    def values(word, column):
        return {
            row[column] for row in rows if word in row["experiments"].split(",") and row["method"] != "fp16"
        }

    assert values("main", "method") == {"rtn", "awq", "gptq", "sfmp-rtn", "sfmp-awq", "sfmp-gptq"}
    assert values("main", "bpw") >= {"2.25", "2.5", "3", "3.25", "3.5"}
    assert values("reorder", "reorder") == {"none", "rows", "cols", "both"}
    assert values("block", "block_rows") >= {"32", "64", "128", "256"}
    assert values("group", "group_size") >= {"32", "64", "128", "256"} and values("group", "bpw") == {"3"}
    assert values("levels", "levels") >= {"auto", "2,3,4", "2,3,4,5,6,7,8"}
    assert values("salience", "salience") == {"fisher", "magnitude", "activation", "random"}
    assert values("objective", "objective") == {"paper", "measured"}
    assert all(
        len(run_spec(row).candidate_levels) == 1 and row["reorder"] == "none"
        for row in rows
        if row["method"] in ("rtn", "awq", "gptq")
    )
    assert {row["tasks"] for row in rows if "main" not in row["experiments"].split(",")} == {"no"}


SHOWCASE = "embedded.sfmp-awq.bpw3.00.g128.b64"
ROW = f"{SHOWCASE}\tembedded\tmain,reorder,objective\tsfmp-awq\t3\t128\t64\t2,3,4\tboth\t"


@pytest.mark.parametrize(
    "file, old, new, message",
    [
        ("tiers/embedded.yaml", "seqlen: 512", "seqlenn: 512", "seqlen"),
        ("tiers/embedded.yaml", "seqlen: 512", "seqlen: many", "seqlen"),
        ("tiers/embedded.yaml", "showcase: embedded.sfmp", "showcase: embedded.sfpm", "showcase"),
        (
            "runs.tsv",
            ROW,
            ROW.replace("\tboth\t", "\tbooth\t"),
            r"runs\.tsv, row embedded\.sfmp-awq.*, reorder: .*'booth'",
        ),
        (
            "runs.tsv",
            ROW,
            ROW.replace("\t128\t", "\t100\t"),
            r"runs\.tsv, row embedded\.sfmp-awq.*group_size.*100",
        ),
        ("runs.tsv", ROW, ROW.replace("\t3\t", "\t7\t"), r"runs\.tsv, row embedded\.sfmp-awq.*bpw: 7"),
        (
            "runs.tsv",
            ROW,
            ROW.replace("\t3\t", "\t-\t"),
            r"runs\.tsv, row embedded\.sfmp-awq.*, bpw: expected a value",
        ),
        (
            "runs.tsv",
            ROW,
            ROW.replace("\tembedded\t", "\tembeded\t"),
            r"runs\.tsv, row .*, model: .*'embeded'",
        ),
        ("runs.tsv", ROW, "x" + ROW, r"runs\.tsv, row xembedded.*, run: "),
        ("runs.tsv", ROW, ROW.replace("main,reorder", "main,order"), r"runs\.tsv, row .*, experiments"),
        (
            "runs.tsv",
            ROW,
            ROW.replace("\t128\t64\t", "\t128 64\t"),
            r"runs\.tsv, row 20 .*expected 14 cells, found 13",
        ),
        ("runs.tsv", "run\tmodel", "run\tnet", r"runs\.tsv, row embedded\.fp16"),
        (
            "runs.tsv",
            "embedded.fp16\t",
            "embedded.fp16\tembedded\tmain\tfp16\t-\t-\t-\t-\t-\t-\t-\t-\tyes\t0\nembedded.fp16\t",
            r"runs\.tsv, row embedded\.fp16, run: listed twice",
        ),
        (
            "models.tsv",
            "\tno\t5.8",
            "\tnope\t5.8",
            r"models\.tsv, row embedded, gated: expected one of .*'nope'",
        ),
    ],
)
def test_configuration_errors_name_file_row_and_column(config_folder, file, old, new, message):
    edit(config_folder / file, old, new)
    with pytest.raises(SfmpError, match=message):
        load_design(CONFIG, config_folder)


def test_unknown_tier_and_unknown_key_are_named():
    with pytest.raises(SfmpError, match="tier: expected one of embedded, paper, small, found 'smoke'"):
        load_design({**CONFIG, "tier": "smoke"}, ROOT / "config")
    with pytest.raises(SfmpError, match="sede"):
        load_design({**CONFIG, "sede": 1}, ROOT / "config")
