"""Experimental design: every tier is valid, and configuration errors name file, row and column."""

import dataclasses
import inspect
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from sfmp import baselines, embedded, stage_rivals
from sfmp.baselines import bitstack
from sfmp.baselines.bitstack_linear import level_bytes
from sfmp.design import RIVALS, load_design, read_table, rival_settings, run_spec
from sfmp.salience import linear_modules
from sfmp.spec import SfmpError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"tier": "embedded", "seed": 0, "cpu_bench": "results/reference/cpu/bench.json",
          "memory_bench": "results/reference/cpu/memory.json",
          "gpu_bench": "results/reference/gpu"}
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

    uniform = {"rtn", "awq", "gptq"}
    rivals = {"slim_llm", "amq", "bitstack", "scalebits", "efficient_qat"}
    assert values("main", "method") == {*uniform, "sfmp-rtn", "sfmp-awq", "sfmp-gptq", "sfmp-efficient_qat", *rivals}
    assert values("bytes", "method") == {*uniform, "sfmp-awq", *rivals}
    for method in (*uniform, *rivals, "sfmp-awq"):  # all meet at the same budgets, or at 3.25 have none of their own
        budgets = {row["bpw"] for row in rows if row["method"] == method and "bytes" in row["experiments"]}
        assert budgets >= {"2.5", "3", "3.5"}, method
    ours = [row for row in rows if row["method"] == "sfmp-awq" and "bytes" in row["experiments"]]
    assert {row["budget"] for row in ours} == {"stored"}
    assert values("quantizer", "bpw") == {"2.25", "3"}
    mixed = {method for method in values("quantizer", "method") if method.startswith("sfmp-")}
    assert {f"sfmp-{method}" for method in values("quantizer", "method") - mixed} == mixed
    assert values("scope", "scope") == {"global", "layer", "matrix"}
    assert values("granularity", "method") == {"rtn", "sfmp-rtn", "layer_wise", "element"}
    assert values("granularity", "block_rows") >= {"32", "64", "128", "256", "768"}
    assert values("guided", "salience") == {"fisher", "guided"}
    assert values("main", "bpw") >= {"2.25", "2.5", "3", "3.25", "3.5"}
    assert values("reorder", "reorder") == {"none", "rows", "cols", "both", "shared"}
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
    apart = [row for row in rows if not {"main", "bytes"} & set(row["experiments"].split(","))]
    assert {row["tasks"] for row in apart} == {"no"}
    tasked = {row["bpw"] for row in rows if row["tasks"] == "yes" and row["method"] in RIVALS}
    assert tasked == {"2.5", "3.5"}


def parameters(method):
    """Keywords of a rival that are knobs: not settings of a row, nor what a run is by definition."""
    found = inspect.signature(baselines.methods()[method]).parameters.values()
    fixed = {name for arguments in stage_rivals.FIXED.values() for name in arguments}
    settings = {"seed", "group_size", "block_rows", "levels", "reorder", "salience", "skip", "plan", "found"}
    keywords = {p.name: p.default for p in found if p.kind is p.KEYWORD_ONLY}
    return {name: default for name, default in keywords.items() if name not in settings | fixed}


@pytest.mark.parametrize("method", sorted({name.removeprefix("sfmp-") for name in RIVALS}))
def test_knobs_are_those_of_the_method_and_full_is_its_default(method):
    rows = [row for row in read_table(ROOT / "config" / "knobs.tsv") if row["method"] == method]
    full = {row["knob"]: json.loads(row["full"]) for row in rows}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in parameters(method).items()}
    assert full == plain


def test_one_switch_chooses_the_knobs():
    reduced = load_design(CONFIG, ROOT / "config").knobs
    full = load_design({**CONFIG, "knobs": "full"}, ROOT / "config").knobs
    assert full["amq"]["n_initial"] == 250 > reduced["amq"]["n_initial"]
    assert full.keys() == reduced.keys() and all(full[m].keys() == reduced[m].keys() for m in full)
    assert load_design({**CONFIG, "tier": "small"}, ROOT / "config").knobs == full


def test_the_published_knobs_can_meet_every_budget_of_bitstack_on_the_embedded_model():
    design = load_design({**CONFIG, "knobs": "full"}, ROOT / "config")
    knobs, shapes = design.knobs["bitstack"], {
        name: linear.weight.shape for name, linear in linear_modules(embedded.load()[0]).items()}
    rank = knobs["rank"] or bitstack.default_rank(shapes.values())
    sizes = {name: level_bytes(*shape, rank) for name, shape in shapes.items()}
    weights = sum(rows * columns for rows, columns in shapes.values())
    budgets = [float(row["bpw"]) for row in design.runs.values() if row["method"] == "bitstack"]
    assert budgets
    for bpw in budgets:
        budget = bitstack._Budget(bpw, sizes, weights, knobs["n_levels"])
        assert 1 <= budget.whole_levels < knobs["n_levels"]
    with pytest.raises(SfmpError, match="lower rank"):  # as published for 4096 it would not
        bitstack._Budget(2.5, {name: level_bytes(*shape, 16) for name, shape in shapes.items()}, weights, 16)


def test_settings_of_a_rival_are_its_row():
    design = load_design(CONFIG, ROOT / "config")
    settings = {run: rival_settings(design.runs[run]) for run in design.rivals}
    assert settings["embedded.scalebits.bpw2.50.g128.b64"] == {"bpw": 2.5, "group_size": 128, "block_rows": 64}
    assert settings["embedded.bitstack.bpw3.25"] == {"bpw": 3.25}
    assert not set(design.rivals) & set(design.planned)
    assert len(design.rivals) + len(design.planned) == len(design.quantized)


def test_shared_columns_are_the_only_difference_of_their_rows():
    runs = load_design(CONFIG, ROOT / "config").runs
    shared = [name for name, row in runs.items() if row["reorder"] == "shared"]
    assert len(shared) == 3
    for name in shared:
        own = run_spec(runs[name.removesuffix(".reorder-shared")])
        assert run_spec(runs[name]) == dataclasses.replace(own, shared_columns=True) != own


SHOWCASE = "embedded.sfmp-awq.bpw3.00.g128.b64"
WORDS = "main,reorder,objective,quantizer"
ROW = f"{SHOWCASE}\tembedded\t{WORDS}\tsfmp-awq\t3\tbpw\t128\t64\t2,3,4\tboth\t"
SLIM = "embedded.slim_llm.bpw2.50.g64\tembedded\tmain,bytes\tslim_llm\t2.5\tbpw\t64\t-\t"


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
            r"runs\.tsv, row 20 .*expected 15 cells, found 14",
        ),
        ("runs.tsv", ROW, ROW.replace("\tbpw\t", "\tall\t"), r"runs\.tsv, row embedded\.sfmp-awq.*, budget: .*'all'"),
        ("runs.tsv", SLIM, SLIM.replace("\tbpw\t", "\tstored\t"), r"runs\.tsv, row .*slim.*, budget: expected bpw"),
        ("runs.tsv", SLIM, SLIM.replace("\t-\t", "\t64\t"), r"row .*slim.*, block_rows: expected -, found '64'"),
        ("runs.tsv", SLIM, SLIM.replace("\t64\t", "\t-\t"), r"row .*slim.*, group_size: expected a value"),
        ("runs.tsv", SLIM, SLIM.replace("\t64\t", "\t65\t"), r"row .*slim.*group_size.*65"),
        ("runs.tsv", SLIM, SLIM.replace("\t2.5\t", "\t1.2\t"), r"row .*slim.*bpw: 1\.2"),
        ("knobs.tsv", "amq\tn_initial\t250\t", "amq\tn_initial\t2 50\t", r"knobs\.tsv, row amq n_initial: .*JSON"),
        ("knobs.tsv", "amq\titerations", "amq\tn_initial", r"knobs\.tsv, row amq n_initial: listed twice"),
        ("tiers/embedded.yaml", "knobs: embedded", "knobs: reduced", r"knobs: expected one of .*'reduced'"),
        ("runs.tsv", "run\tmodel", "run\tnet", r"runs\.tsv, row embedded\.fp16"),
        (
            "runs.tsv",
            "embedded.fp16\t",
            "embedded.fp16\tembedded\tmain\tfp16" + 9 * "\t-" + "\tyes\t0\nembedded.fp16\t",
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
