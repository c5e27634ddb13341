"""Workflow: configuration errors that name the cell, parameters that match the notebooks, DAGs, caps, recovery."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from sfmp import locks, workflow
from sfmp.design import load_design, run_spec
from sfmp.report import publish, render_notebooks
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


# --- configuration -------------------------------------------------------------------------------------------------


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


ROW = "embedded.sfmp-awq.bpw3.00.g128.b64\tembedded\tmain,reorder,objective\tsfmp-awq\t3\t128\t64\t2,3,4\tboth\tglobal\t"


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
            "\tno\t6.2",
            "\tnope\t6.2",
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


# --- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", workflow.NOTEBOOKS)
def test_rule_sends_exactly_the_parameters_of_its_notebook(rule):
    """papermill only warns of an unknown parameter, so a misspelling would silently run the default."""
    stem, names = workflow.NOTEBOOKS[rule]
    cells = json.loads((ROOT / "notebooks" / f"{stem}.ipynb").read_text(encoding="utf-8"))["cells"]
    [source] = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    body = ast.parse(source).body
    assigned = [node.target.id if isinstance(node, ast.AnnAssign) else node.targets[0].id for node in body]
    assert sorted(assigned) == sorted((*workflow.COMMON, *names))


class Named(dict):
    """Stands in for Snakemake's named list."""


def test_parameters_keep_their_types_and_describe_the_run():
    design = load_design(CONFIG, ROOT / "config")
    make = workflow.notebook_params(design, "quantization")
    figure = ["results/x.svg", "results/x.png", "results/x.csv"]
    sent = json.loads(
        make(
            SimpleNamespace(run=design.showcase),
            Named(notebook="notebooks/05_quantization.ipynb", windows="w", weights=["a", "b"]),
            Named(plan="p.safetensors", picture=figure),
        )
    )
    assert sent["spec"] == run_spec(design.runs[design.showcase]).to_dict()
    assert (
        sent["spec"]["bpw"] == 3.0 and sent["spec"]["levels"] == [2, 3, 4] and sent["spec"]["method"] == "awq"
    )
    assert sent["inputs"] == {"windows": "w", "weights": ["a", "b"]}
    assert sent["out"] == {"plan": "p.safetensors", "picture": "results/x.png"}
    assert (sent["model"], sent["run"], sent["seed"], sent["tier"]) == (
        "embedded",
        design.showcase,
        0,
        "embedded",
    )


def test_only_marked_rows_run_the_tasks():
    design = load_design(CONFIG, ROOT / "config")
    make = workflow.notebook_params(design, "evaluation")
    for run, row in design.runs.items():
        sent = json.loads(make(SimpleNamespace(run=run), Named(), Named()))
        assert sent["tasks"] == (design.config["tasks"] if row["tasks"] == "yes" else [])


# --- caps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "machine, memory, job", [(2, 8000, 2000), (2, 3000, 2000), (16, 16000, 2000), (3, 9000, 100)]
)
@pytest.mark.parametrize("cores", [1, 2, 3, 8, 64])
def test_jobs_that_run_together_fit_the_machine(monkeypatch, cores, machine, memory, job):
    monkeypatch.setattr(workflow, "available_cores", lambda: machine)
    monkeypatch.setattr(workflow, "available_memory_mb", lambda: memory)
    threads = workflow.job_threads(cores, job)
    together = cores // threads
    assert 1 <= together <= max(1, min(machine, cores))
    assert together == 1 or together * job <= memory
    assert workflow.job_threads(cores, job, alone=True) == cores


def test_caps_do_not_apply_on_a_cluster():
    assert workflow.job_threads(None, 1000) == workflow.job_threads(2**31, 1000, alone=True) == 1


# --- recovery --------------------------------------------------------------------------------------------------------


@pytest.fixture
def locked(tmp_path, monkeypatch):
    """A working directory locked by a process that is dead, with one of its jobs still running."""
    monkeypatch.chdir(tmp_path)
    locks.take_lock()
    [note] = locks.HOLDERS.glob("*.json")
    dead = {**json.loads(note.read_text()), "pid": 2**22 + 1, "mark": "4194305@1.00"}
    note.write_text(json.dumps(dead))
    locks.LOCKS.mkdir()
    (locks.LOCKS / "0.input.lock").touch()
    job = subprocess.Popen(["sleep", "60"], env={**os.environ, locks.MARK: dead["mark"]})
    yield note, dead, job
    job.kill()
    job.wait()


def test_lock_of_a_killed_run_is_released_and_its_jobs_ended(locked):
    _, _, job = locked
    message = locks.release_stale_lock()
    assert "killed" in message and "1 processes" in message
    job.wait(5)
    assert not list(locks.LOCKS.iterdir()) and not list(locks.HOLDERS.iterdir())
    assert locks.release_stale_lock() is None


@pytest.mark.parametrize("change", ["alive", "other host", "unknown holder"])
def test_lock_that_may_be_held_is_left_alone(locked, change):
    note, dead, job = locked
    if change == "alive":
        locks.take_lock()
    elif change == "other host":
        note.write_text(json.dumps({**dead, "host": "elsewhere"}))
    else:
        note.unlink()
    assert locks.release_stale_lock() is None
    assert job.poll() is None and list(locks.LOCKS.iterdir())


# --- closing steps ---------------------------------------------------------------------------------------------------


def result(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    manifest = {
        "notebook": "e1",
        "started": "now",
        "wall_seconds": 1.0,
        "outputs": [{"path": path.as_posix()}],
    }
    Path(f"{path}.manifest.json").write_text(json.dumps(manifest))


def test_publish_copies_small_evidence_with_its_manifests(tmp_path):
    source, target = tmp_path / "results", tmp_path / "reference"
    result(source, "tables/e1.csv", "a\n")
    result(source, "claims.csv", "b\n")
    result(source, "figures/big.svg", "c\n")
    publish(source, target)
    assert sorted(p.name for p in target.rglob("*") if p.is_file()) == [
        "claims.csv",
        "e1.csv",
        "manifests.jsonl",
    ]
    assert len((target / "manifests.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "flaw, message", [("no manifest", "no manifest says"), ("too large", "too large to commit")]
)
def test_publish_refuses(tmp_path, flaw, message):
    result(tmp_path, "claims.csv", "b" * (400_000 if flaw == "too large" else 1))
    if flaw == "no manifest":
        Path(f"{tmp_path / 'claims.csv'}.manifest.json").unlink()
    with pytest.raises(SfmpError, match=message):
        publish(tmp_path, tmp_path / "reference")


def test_executed_notebooks_become_pages(tmp_path):
    write_notebook(tmp_path / "logs/eval/x.ipynb", "a = 1", "print(a)")
    render_notebooks(tmp_path / "logs", tmp_path / "html/index.html")
    assert 'href="eval/x.html"' in (tmp_path / "html/index.html").read_text()
    assert "print" in (tmp_path / "html/eval/x.html").read_text()
    with pytest.raises(SfmpError, match="expected executed notebooks"):
        render_notebooks(tmp_path / "none", tmp_path / "html/index.html")


# --- Snakemake itself ------------------------------------------------------------------------------------------------


def test_snakefile_is_short_and_imports_only_the_workflow_helpers():
    text = (ROOT / "Snakefile").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    assert set(re.findall(r"^from (sfmp\S*) import", text, re.M)) <= {"sfmp.workflow", "sfmp.provenance"}


def write_notebook(path: Path, parameters: str, body: str) -> None:
    def cell(text, tags):
        return {
            "cell_type": "code",
            "id": f"cell-{len(tags)}",
            "metadata": {"tags": tags},
            "source": text,
            "outputs": [],
            "execution_count": None,
        }

    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = {
        "cells": [cell(parameters, ["parameters"]), cell(body, [])],
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook))


STUB = """
import time
from pathlib import Path
from sfmp.provenance import start
while Path("wait").exists():
    time.sleep(0.1)
run = start("stub", {"out": out, "inputs": inputs}, seed)
for name in out:
    run.save_text(name, f"{name} {seed}")
run.finish()
"""


@pytest.fixture
def checkout(tmp_path):
    """The workflow of the repository with notebooks that do nothing but write what they are asked for."""
    for name in ("config", "profiles", "report"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "Snakefile", tmp_path)
    for stem, names in workflow.NOTEBOOKS.values():
        parameters = "\n".join(f"{name} = None" for name in (*workflow.COMMON, *names))
        write_notebook(tmp_path / "notebooks" / f"{stem}.ipynb", parameters, STUB)
    for name in ("claims", "paper_values"):
        (tmp_path / "config" / f"{name}.tsv").touch()
    return tmp_path


def snakemake(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *arguments],
        cwd=folder,
        text=True,
        timeout=240,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def jobs(text: str) -> dict[str, int]:
    """Jobs per rule that a dry run announces."""
    table = text.split("Job stats:")[1].split("\n\n")[0]
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", table, re.M)}


@pytest.mark.workflow
@pytest.mark.parametrize("tier", TIERS)
def test_dry_run_plans_every_run_once(checkout, tier):
    text = snakemake(checkout, "-n", "--cores", "8", "--config", f"tier={tier}")
    planned = jobs(text)
    design = load_design({**CONFIG, "tier": tier}, ROOT / "config")
    assert planned["evaluation"] == len(design.runs)
    assert planned["quantization"] == len(design.quantized)
    assert planned["calibration"] == len(design.models)
    sources = {(row["model"], row["salience"]) for row in design.runs.values() if row["method"] != "fp16"}
    assert planned["salience"] == len(sources)
    assert {"e1", "e3", "e9", "overview", "html", "report", "summary"} <= set(planned)
    for job in text.split("\nrule ")[1:]:  # a run that is timed takes all cores, so nothing runs beside it
        if job.startswith("quantization:") and re.search(r"wildcards: run=(\S+)", job)[
            1
        ] in design.with_experiment("cost"):
            assert "threads: 8" in job


TARGET = "results/embedded/salience/embedded.random.safetensors"


@pytest.mark.workflow
def test_kill_then_same_command_then_nothing_then_only_what_an_edit_touches(checkout):
    (checkout / "wait").touch()
    process = subprocess.Popen(
        [sys.executable, "-m", "snakemake", "--cores", "2", TARGET],
        cwd=checkout,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = checkout / "results/embedded/logs/calibration/embedded.ipynb"
    deadline = time.monotonic() + 120
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert log.exists() and not (checkout / TARGET).exists()
    (checkout / "wait").unlink()

    text = snakemake(checkout, "--cores", "2", TARGET)
    assert "was killed; released its lock" in text
    assert (checkout / TARGET).read_text() == "salience 0"
    assert Path(f"{checkout / TARGET}.manifest.json").is_file()

    os.utime(checkout / "notebooks" / "01_calibration.ipynb")
    assert "Nothing to be done" in snakemake(checkout, "--cores", "8", TARGET)

    edit(checkout / "notebooks" / "02_salience.ipynb", "run.finish()", "run.finish()  # edited")
    assert jobs(snakemake(checkout, "-n", "--cores", "8", TARGET)) == {"salience": 1, "total": 1}
