"""Tiers: what their jobs are told, what must be pinned before they run, what they would cost."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from sfmp import data, pin, places, tier_cost, tiers, workflow
from sfmp.checks import SfmpError
from sfmp.design import load_design, read_table

ROOT = Path(__file__).resolve().parents[1]
CONFIG = yaml.safe_load((ROOT / "config" / "config.yaml").read_text("utf-8"))
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB = ("small", "paper")
LINES = "two\u2028of\x85them"  # line ends to Python, and no line ends in JSON


def design_of(tier, folder=ROOT / "config", **config):
    return load_design({**CONFIG, "tier": tier, **config}, folder)


@pytest.fixture
def pinned(tmp_path):
    """The configuration with a revision in every row."""
    folder = Path(shutil.copytree(ROOT / "config", tmp_path / "config"))
    pin_tables(folder)
    return folder


def pin_tables(folder):
    for name in ("models", "datasets"):
        path = folder / f"{name}.tsv"
        rows = [line.split("\t") for line in path.read_text("utf-8").splitlines()]
        column = next(row.index("revision") for row in rows if "revision" in row)
        for row in rows:
            if len(row) > column and row[column] == "-" and row[0] != "embedded":
                row[column] = COMMIT
        path.write_text("\n".join("\t".join(row) for row in rows) + "\n", "utf-8")


def test_the_models_of_the_issue_are_in_their_tiers():
    small, paper = (design_of(tier).models for tier in HUB)
    assert {row["repository"] for row in small.values()} == {
        "Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "meta-llama/Llama-3.2-1B"}
    assert {row["repository"] for row in paper.values()} == {
        "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B", "Qwen/Qwen3-8B", "Qwen/Qwen3-14B", "Qwen/Qwen3-32B"}
    for row in (*small.values(), *paper.values()):
        assert (row["gated"] == "yes") == row["repository"].startswith("meta-llama")
        assert float(row["parameters_m"]) * 6 / 1000 <= float(row["gpu_gb"]) * 1.05  # weights, gradient, salience fit


def test_every_dataset_of_the_issue_is_in_the_table_and_every_task_is_known():
    from sfmp.standard_tasks import STOCK

    datasets = design_of("paper").datasets
    assert {"wikitext2", "c4", "c4_validation", "pile_val", "mmlu", "gsm8k"} < set(datasets)
    assert {name for name, row in datasets.items() if row["kind"] == "task"} == set(STOCK)
    for tier in HUB:
        tasks = design_of(tier).config["tasks"]
        assert len(tasks) == 6 and all(datasets[task]["shots"] == "0" for task in tasks)
    assert datasets["mmlu"]["shots"] == datasets["gsm8k"]["shots"] == "5"


def test_the_embedded_tier_sees_nothing_of_it(monkeypatch):
    """Its jobs get the parameters, inputs, resources and environment that they had before there were other tiers."""
    monkeypatch.setattr(workflow, "stage_code", str)  # hashing every module takes long, and is not in question
    design = design_of("embedded", data={"root": "/nowhere"}, models={"root": "/nowhere"})
    rules = workflow.Rules(design)
    job = SimpleNamespace(run=design.showcase, model="embedded")
    assert rules.texts(job) == rules.questions(job) == {}
    assert all(set(rules.params(rule)) == {"nb", "settings", "code"} for rule in workflow.NOTEBOOKS)
    assert (rules.memory(job), rules.gpus(job)) == (design.config["job_mem_mb"], 0)
    assert tiers.environment(design) == "HF_HUB_OFFLINE=1" and not tiers.unpinned(design)
    assert design.models["embedded"]["source"] == "embedded" and design.runs_table.endswith("config/runs.tsv")
    tiers.check_ready(design)


def test_jobs_of_a_hub_tier_are_told_where_to_compute_and_read(tmp_path):
    design = design_of("paper", data={"root": str(tmp_path / "a b")})
    text = subprocess.run(["bash", "-c", f"{tiers.environment(design)} env"], capture_output=True, text=True).stdout
    told = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    assert told[places.DEVICE] == "spread" and told[places.DTYPE] == "bfloat16"
    assert told[places.DATA_ROOT] == str(tmp_path / "a b") and told[places.MODELS_ROOT] == ""
    both = design_of("paper", data={"root": "/d"}, models={"root": "/m"})
    assert "HF_HUB_OFFLINE=1" in tiers.environment(both) and "HF_HUB_OFFLINE" not in tiers.environment(design)
    rules = workflow.Rules(design)
    seventy = SimpleNamespace(model="llama3.1-70b")
    assert rules.gpus(seventy) == 6 and rules.memory(seventy) > 4e5
    assert rules.gpus(SimpleNamespace(model="qwen3-8b")) == 1


def test_links_of_roots_are_not_followed(tmp_path):
    """They may lead elsewhere on another node; `..` after one means what it means to the system."""
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "inner")
    roots = {"data": str(tmp_path / "link"), "models": str(tmp_path / "link" / ".." / "models")}
    told = tiers.environment(design_of("small", **{kind: {"root": root} for kind, root in roots.items()}))
    assert all(f"={root} " in f"{told} " for root in roots.values())


@pytest.mark.parametrize("tier", HUB)
def test_a_tier_without_revisions_is_refused_and_with_them_is_not(tier, pinned):
    with pytest.raises(SfmpError, match=f"expected a revision of .*Qwen/.*sfmp pin --tier {tier}"):
        tiers.check_ready(design_of(tier))
    design = design_of(tier, pinned)
    tiers.check_ready(design)
    assert all(row["source"] == f"{row['repository']}@{COMMIT}" for row in design.models.values())
    calibration = workflow.Rules(design).params("calibration")
    assert calibration["data"] == {"c4": COMMIT, "wikitext2": COMMIT}  # a new revision reruns what reads it
    assert "data" not in workflow.Rules(design).params("salience")


def test_local_copies_replace_revisions_in_the_tier_small_only():
    roots = {"data": {"root": "/d"}, "models": {"root": "/m"}}
    assert tiers.unpinned(design_of("small", **roots)) == []
    assert set(tiers.unpinned(design_of("paper", **roots))) == {
        row["repository"] for row in design_of("paper").models.values()}
    assert "wikitext2" in tiers.unpinned(design_of("small", models={"root": "/m"}))


def test_the_tier_paper_refuses_a_sample_of_its_calibration_text(pinned, tmp_path):
    """From fewer documents it would cut other windows than the Hub's; the tier small is given what there is."""
    root = tmp_path / "data"
    of = {tier: design_of(tier, pinned, data={"root": str(root)}) for tier in HUB}
    tiers.check_ready(of["paper"])  # nothing was copied yet: `downloads` may run
    copy = places.copy_of(of["paper"].datasets["c4"], root)
    copy.parent.mkdir(parents=True)
    copy.write_text('{"text": "one"}\n' * 118, "utf-8")
    with pytest.raises(SfmpError, match=f"tier paper: expected 20000 rows in {copy}, found 118"):
        tiers.check_ready(of["paper"])
    tiers.check_ready(of["small"])
    copy.write_text('{"text": "one"}\n' * 20000, "utf-8")
    tiers.check_ready(of["paper"])


def test_cost_is_the_sum_of_jobs_and_grows_as_it_must():
    design = design_of("paper")
    every = tier_cost.jobs(design)
    assert {job.rule for job in every} == {"calibration", "salience", "quantization", "search", "rival", "allocation",
                                           "evaluation"}
    fisher = next(job for job in every if job.rule == "salience" and job.model == "llama3.1-8b")
    by_hand = 6 * 8.03e9 * 128 * 2048 / tier_cost.FLOPS + 2 * 8.03e9 / tier_cost.READ
    assert fisher.seconds == pytest.approx(by_hand) and fisher.bytes == 4 * 8.03e9
    words = tier_cost.cost_words(design)
    total = sum(job.seconds * job.gpus for job in every) / 3600
    assert f"{total:.1f}" in words.splitlines()[-1] and "ESTIMATES, nothing of this was measured" in words
    targets = words[words.index("  target"):]
    assert set(re.findall(r"^    ([a-z]+) ", targets, re.M)) == {
        "all", "tables", "figures", "claims", "costs", "html", "report", "summary", "publish", "downloads"}
    downloads = re.search(r"^    downloads +0.0 +0.0 +(\d+)$", targets, re.M)
    assert int(downloads[1]) == round(sum(job.bytes for job in every if job.rule == "calibration") / 1e9)
    assert sum(int(n) for n in re.findall(r"^    [a-z]+ +(\d+) ", words, re.M)) == len(every)
    reduced = tier_cost.jobs(design_of("paper", n_windows=64))
    assert sum(job.seconds for job in reduced) < sum(job.seconds for job in every)
    assert sum(job.bytes for job in tier_cost.jobs(design_of("paper", models={"root": "/m"}))) < sum(
        job.bytes for job in every)


class _Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path.split("?")[0])
        answer = json.dumps({"id": "x/y", "modelId": "x/y", "sha": self.server.commit}).encode()
        self.send_response(200 if self.server.commit else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch):
    """A Hub that knows the commit of everything."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.asked, server.commit = [], COMMIT
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run_pin(hub, folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "",
                   "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
    return subprocess.run([sys.executable, "-m", "sfmp", "pin", "--config", str(folder), *arguments], text=True,
                          capture_output=True, env=environment, timeout=120)


def test_pin_writes_what_the_hub_says_and_nothing_else(hub, tmp_path):
    folder = Path(shutil.copytree(ROOT / "config", tmp_path / "config"))
    done = run_pin(hub, folder, "--tier", "small")
    assert done.returncode == 0, done.stderr
    models = {row["model"]: row["revision"] for row in read_table(folder / "models.tsv")}
    assert {name for name, revision in models.items() if revision == COMMIT} == set(design_of("small").models)
    assert models["embedded"] == models["llama3.1-70b"] == "-"
    assert {row["revision"] for row in read_table(folder / "datasets.tsv")} == {COMMIT}
    before = (ROOT / "config" / "models.tsv").read_text("utf-8").replace("-\t-\tA", f"{COMMIT}\t-\tA", 1)
    changed = (folder / "models.tsv").read_text("utf-8")
    assert changed.replace(COMMIT, "-") == before.replace(COMMIT, "-")
    tiers.check_ready(design_of("small", folder))
    hub.asked.clear()
    assert "0 revisions" in run_pin(hub, folder, "--tier", "small").stdout and not hub.asked
    no_network = run_pin(SimpleNamespace(server_port=9), folder, "--tier", "paper")  # a port that no one listens on
    assert no_network.returncode == 2 and "expected the Hub to say its revision" in no_network.stderr
    hub.commit = None
    failed = run_pin(hub, folder, "--tier", "paper")
    assert failed.returncode == 2 and "expected the Hub to say its revision" in failed.stderr
    assert (folder / "models.tsv").read_text("utf-8") == changed


def test_fetch_writes_what_a_data_root_holds(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        if names[0] == "baber/piqa":
            return [{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}]
        return {"text": ["one", "", LINES]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = {name: {**row, "revision": COMMIT} for name, row in design_of("paper").datasets.items()}
    monkeypatch.setattr(places, "dataset", rows.__getitem__)
    with pytest.raises(SfmpError, match="Salesforce/wikitext: expected the 4358 rows of wikitext2 .test., found 3"):
        pin.fetch(["wikitext2"], tmp_path)
    asked.clear()
    rows["wikitext2"]["count"], rows["piqa"]["count"] = "3", "1"
    with pytest.warns(UserWarning, match="3 rows, where 20000 of c4 are read"):
        written = pin.fetch(["wikitext2", "c4", "piqa"], tmp_path)
    assert asked[1] == (("allenai/c4", None), {
        "split": "train[:20000]", "revision": COMMIT, "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}})
    assert [json.loads(line)["text"] for line in written[0].read_text().split("\n")[:-1]] == ["one", "", LINES]
    monkeypatch.setenv(places.DATA_ROOT, str(tmp_path))
    assert [places.local_data(design_of("paper").datasets[name]) for name in ("wikitext2", "c4", "piqa")] == written
    assert data.load_text("dataset:wikitext2", blank=True) == ["one", "", LINES]
    assert pin.fetch(["piqa"], tmp_path) == []
    rows["gsm8k"]["local"] = "-"
    with pytest.raises(SfmpError, match="gsm8k: expected a local form"):
        pin.fetch(["gsm8k"], tmp_path)


def test_fetch_copies_worked_examples_and_all_subjects(tmp_path, monkeypatch):
    import datasets

    rows = {name: {**row, "revision": COMMIT} for name, row in design_of("paper").datasets.items()}
    monkeypatch.setattr(places, "dataset", rows.__getitem__)
    rows["mmlu"] |= {"count": "114", "shot_count": "57"}
    rows["gsm8k"] |= {"count": "2", "shot_count": "1"}

    def load_dataset(source, config, split, revision):
        assert revision == COMMIT and config not in (None, "all")
        return [{"question": f"{config} {number}"} for number in range(2 if split == "test" else 1)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    names = [path.relative_to(tmp_path).as_posix() for path in pin.fetch(["mmlu", "gsm8k"], tmp_path)]
    assert names == ["tasks/mmlu.jsonl", "tasks/mmlu.dev.jsonl", "tasks/gsm8k.jsonl", "tasks/gsm8k.train.jsonl"]
    found = [json.loads(line) for line in (tmp_path / "tasks/mmlu.jsonl").read_text("utf-8").splitlines()]
    assert found[:2] == [{"question": f"abstract_algebra {n}", "subject": "abstract_algebra"} for n in range(2)]
    assert len({row["subject"] for row in found}) == 57
