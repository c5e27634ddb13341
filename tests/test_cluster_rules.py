"""Rules of scattered layers and of downloads: which runs are cut, what jobs hand on, plans that add up."""

import json
import re
import shlex
from types import SimpleNamespace

import pytest
from test_workflow import CONFIG, ROOT, jobs, snakemake
from test_workflow import checkout as checkout  # a fixture

from sfmp import scatter_job
from sfmp.design import load_design, run_spec
from sfmp.workflow_downloads import data_command, model_command
from sfmp.workflow_scatter import Scatter

AWQ = "embedded.sfmp-awq.bpw3.00.g128.b64"


def _scatter(**config):
    return Scatter(load_design({**CONFIG, **config}, ROOT / "config"))


def test_runs_of_awq_are_cut_and_no_others():
    scatter = _scatter(scatter=2)
    methods = {run: run_spec(scatter.design.runs[run]).method for run in scatter.design.planned}
    assert scatter.runs == [run for run, method in methods.items() if method == "awq"] and AWQ in scatter.runs
    assert {"gptq", "rtn"} <= {methods[run] for run in set(methods) - set(scatter.runs)}


def test_files_of_pieces_fit_together():
    scatter, piece = _scatter(scatter=3), SimpleNamespace(run=AWQ, piece="2")
    assert len(scatter.inputs()) == len(scatter.layers()) == scatter.jobs == 3
    assert scatter.inputs_of_piece(piece) == scatter.inputs()[2].format(model="embedded")
    assert scatter.source(piece) == scatter.source(SimpleNamespace(model="embedded")) == "embedded"
    assert _scatter().jobs == 0


def test_a_piece_takes_one_gpu_where_its_model_takes_any():
    embedded, paper = _scatter(scatter=2), _scatter(tier="paper", scatter=2)
    assert embedded.gpus(SimpleNamespace(run=AWQ)) == 0
    large = next(run for run in paper.runs if "70b" in run)
    assert paper.gpus(SimpleNamespace(run=large)) == 1


def test_the_plan_is_asked_for_as_the_notebook_makes_it(monkeypatch):
    scatter, seen = _scatter(scatter=2), []
    monkeypatch.setattr(scatter_job, "write_plan", seen.append)
    for run in (AWQ, f"{AWQ}.stored"):
        words = shlex.split(scatter.settings(SimpleNamespace(run=run)))
        assert scatter_job.main(["plan", "--model", "embedded", "--salience", "s", "--out", "p", *words]) == 0
    spec = run_spec(scatter.design.runs[AWQ])
    assert [one.budget for one in seen] == ["bpw", "stored"]
    assert seen[0].spec == json.loads(json.dumps(spec.to_dict()))


def test_bad_input_is_one_line(tmp_path, capsys):
    words = ["inputs", "--model", str(tmp_path / "none"), "--windows", "none", "--out", str(tmp_path / "a")]
    assert scatter_job.main(words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("sfmp.scatter_job: model") and shown.count("\n") == 1
    for words in (["layers", "--plan", "none", "--inputs", "none", "--windows", "none"],
                  ["inputs", "--windows", str(tmp_path / "none")], ["plan", "--salience", "none", "--spec", "{}"]):
        assert scatter_job.main([*words, "--model", "embedded", "--out", "o"]) == 2
        shown = capsys.readouterr().err
        assert "none" in shown and shown.count("\n") == 1


@pytest.mark.workflow
def test_a_dry_run_plans_every_piece_once(checkout):
    runs = [AWQ, "embedded.awq.bpw3.25.g128", "embedded.gptq.bpw3.25.g128", "embedded.rtn.bpw3.25.g128"]
    targets = [f"results/embedded/quantized/{run}.json" for run in runs]
    planned = jobs(snakemake(checkout, "-n", "--cores", "8", *targets, "--config", "scatter=3"))
    assert planned == {"calibration": 1, "salience": 1, "piece_inputs": 1, "piece_plan": 2, "piece": 6, "gathering": 2,
                       "quantization": 2, "total": 15}


def test_downloads_are_commands_with_revisions_and_roots():
    design = load_design({**CONFIG, "tier": "small"}, ROOT / "config")
    design.models["qwen3-1.7b"]["revision"] = "abc"
    assert model_command(design, "qwen3-1.7b") == "hf download Qwen/Qwen3-1.7B --revision abc --exclude 'original/*'"
    assert data_command(design).startswith("echo no data.root")
    design.config |= {"models": {"root": "/a b"}, "data": {"root": "/d"}}
    assert model_command(design, "qwen3-1.7b").endswith("--local-dir '/a b/Qwen/Qwen3-1.7B'")
    command = shlex.split(data_command(design))
    assert command[:6] == ["python", "-m", "sfmp", "fetch", "c4", "wikitext2"] and command[-2:] == ["--data-root", "/d"]
    assert set(design.config["tasks"]) <= set(command)


@pytest.mark.workflow
def test_downloads_are_asked_for_by_name(checkout):
    planned = jobs(snakemake(checkout, "-n", "--cores", "1", "downloads", "--config", "tier=small"))
    models = load_design({**CONFIG, "tier": "small"}, ROOT / "config").models
    assert planned == {"downloads": 1, "download_data": 1, "download_model": len(models), "total": len(models) + 2}


def test_only_downloads_are_tried_again():
    files = [ROOT / "Snakefile", *(ROOT / "rules").glob("*.smk")]
    rules = [rule for file in files for rule in re.split(r"\n(?=(?:use )?rule )", file.read_text("utf-8"))]
    again = {re.match(r"(?:use )?rule (\w+)", rule)[1] for rule in rules if re.search(r"^ +retries:", rule, re.M)}
    assert again == {"download_model", "download_data"}
    profile = (ROOT / "profiles" / "slurm" / "profile.yaml").read_text("utf-8")
    assert re.search(r"^retries: 0$", profile, re.M)
