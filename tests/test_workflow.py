"""Workflow: parameters that match the notebooks, jobs that fit the machine, Snakemake with stub notebooks."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from sfmp import workflow
from sfmp.checks import SfmpError
from sfmp.design import load_design, run_spec

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"tier": "embedded", "seed": 0, "cpu_bench": "results/reference/cpu/bench.json",
          "memory_bench": "results/reference/cpu/memory.json",
          "gpu_bench": "results/reference/gpu"}
TIERS = ("embedded", "small", "paper")


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


def test_a_rival_gets_its_settings_its_knobs_and_only_the_inputs_it_uses():
    config = {"embedded": CONFIG, "full": {**CONFIG, "knobs": "full"}}
    run = SimpleNamespace(run="embedded.sfmp-efficient_qat.bpw2.25.g256.b64")
    sent = {}
    for name, chosen in config.items():
        design = load_design(chosen, ROOT / "config")
        sent[name] = json.loads(workflow.notebook_params(design, "rival")(run, Named(), Named()))
        assert sent[name]["knobs"] == design.knobs["efficient_qat"]  # mixed or not, the quantizer has the same knobs
    assert sent["full"].pop("knobs") != sent["embedded"].pop("knobs")
    assert sent["full"] == sent["embedded"]
    assert sent["full"]["settings"] == {"bpw": 2.25, "group_size": 256, "block_rows": 64}
    assert sent["full"]["method"] == "sfmp-efficient_qat"
    rules = workflow.Rules(load_design(CONFIG, ROOT / "config"))
    assert rules.salience(run) == {"salience": "results/embedded/salience/embedded.fisher.safetensors"}
    amq = SimpleNamespace(run="embedded.amq.bpw3.00.g128")
    assert rules.salience(amq) == rules.search(run) == {}
    searched = {"search": "results/embedded/search/embedded.json"}
    assert rules.search(amq) == {**searched, "search_cost": "results/embedded/timing/search/embedded.json"}


def test_the_search_gets_the_knobs_of_amq():
    design = load_design(CONFIG, ROOT / "config")
    sent = json.loads(workflow.notebook_params(design, "search")(SimpleNamespace(model="embedded"), Named(), Named()))
    assert sent["knobs"] == design.knobs["amq"] and sent["model"] == "embedded"


def test_a_run_belongs_to_one_rule():
    design = load_design(CONFIG, ROOT / "config")
    rules = workflow.Rules(design)
    planned, rivals = (re.compile(rules.one_of(runs)) for runs in (design.planned, design.rivals))
    for run in design.quantized:
        assert bool(planned.fullmatch(run)) != bool(rivals.fullmatch(run)) == (run in design.rivals)
    assert not re.compile(rules.one_of([])).fullmatch("")
    assert len(rules.timings()) == len(set(rules.timings())) == len(design.quantized) + len(workflow.SOURCES)


def test_every_executed_notebook_becomes_a_page():
    design = load_design(CONFIG, ROOT / "config")
    logs = workflow.Rules(design).executed()
    assert len(logs) == len(set(logs))
    stems = {log.removeprefix("results/embedded/logs/").removesuffix(".ipynb") for log in logs}
    assert {stem.split("/")[0] for stem in stems} == set(workflow.NOTEBOOKS)
    assert {f"rival/{run}" for run in design.rivals} <= stems and "salience/embedded.fisher" in stems


def test_gpu_evidence_is_an_input_where_there_is_some(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rules = workflow.Rules(load_design(CONFIG, ROOT / "config"))
    assert rules.gpu_evidence(None) == {}
    folder = tmp_path / "results/reference/gpu"
    folder.mkdir(parents=True)
    (folder / "decode.json").touch()
    assert rules.gpu_evidence(None) == {"gpu_decode": "results/reference/gpu/decode.json"}
    elsewhere = workflow.Rules(load_design({**CONFIG, "gpu_bench": "elsewhere"}, ROOT / "config"))
    with pytest.raises(SfmpError, match="expected kernels.json or decode.json in elsewhere"):
        elsewhere.gpu_evidence(None)


def test_only_marked_rows_run_the_tasks():
    design = load_design(CONFIG, ROOT / "config")
    make = workflow.notebook_params(design, "evaluation")
    for run, row in design.runs.items():
        sent = json.loads(make(SimpleNamespace(run=run), Named(), Named()))
        assert sent["tasks"] == (design.config["tasks"] if row["tasks"] == "yes" else [])


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


def test_caps_do_not_apply_on_a_cluster():
    assert workflow.job_threads(None, 1000) == workflow.job_threads(2**31, 1000) == 1


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
    for name in ("config", "profiles", "report", "rules", "results/reference/cpu"):
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
    assert f"tier {tier}: {len(design.runs)} runs" in text and ("GPU hours" in text) == (tier != "embedded")
    assert planned["evaluation"] == len(design.runs)
    assert planned["quantization"] == len(design.planned)
    assert planned.get("rival", 0) == len(design.rivals)
    assert planned["calibration"] == len(design.models)
    assert planned.get("search", 0) == len({row["model"] for row in design.runs.values() if row["method"] == "amq"})
    sources = {(row["model"], row["salience"]) for row in design.runs.values() if row["salience"] != "-"}
    compared = {(design.showcase_model, "fisher"), (design.showcase_model, "guided")}  # by the allocation notebook
    assert planned["salience"] == len(sources | compared)
    assert {"e1", "e3", "e5", "e9", "overview", "html", "report", "summary"} <= set(planned)


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
    assert "Nothing to be done" in snakemake(checkout, TARGET)  # --cores may be left out

    notebook = checkout / "notebooks" / "02_salience.ipynb"
    notebook.write_text(notebook.read_text().replace("run.finish()", "run.finish()  # edited"))
    assert jobs(snakemake(checkout, "-n", "--cores", "8", TARGET)) == {"salience": 1, "total": 1}


def test_settings_are_parameters_that_snakemake_compares():
    """Snakemake ignores a change of what is made from inputs or outputs, so settings must need wildcards only."""
    import inspect

    def settings(**config):
        rules = workflow.Rules(load_design({**CONFIG, **config}, ROOT / "config"))
        function = rules.params("rival")["settings"]
        assert list(inspect.signature(function).parameters) == ["wildcards"]
        return function(SimpleNamespace(run="embedded.slim_llm.bpw2.50.g64"))

    assert json.loads(settings())["knobs"] != json.loads(settings(knobs="full"))["knobs"]
