"""Uploads, against a Hub of our own on this machine: nothing leaves it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import PLAN, quantize_randomly
from hub_stub import TOKEN, running_hub
from huggingface_hub import ModelCard

from sfmp import hf
from sfmp.checks import SfmpError
from sfmp.push import push_checkpoint

ROOT = Path(__file__).resolve().parents[1]
RESULTS = [{"dataset": "python:evaluation", "metric": "perplexity", "value": 5.5}]


@pytest.fixture(autouse=True)
def plain_uploads(monkeypatch):
    """The stub speaks the Hub's LFS protocol, not Xet; the home folder's login is not looked at."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def hub():
    with running_hub() as running:
        yield running


@pytest.fixture
def folder(tiny_llama, tmp_path):
    hf.attach(quantize_randomly(tiny_llama), PLAN, source="someone/tiny")
    return hf.save_checkpoint(tiny_llama, tmp_path / "model", max_shard_size="30KB")


def push(hub, folder, **options):
    return push_checkpoint(folder, "me/tiny-sfmp", token=TOKEN, endpoint=hub.url, **options)


def test_every_file_arrives_in_one_commit(hub, folder):
    (folder / ".cache").mkdir()
    (folder / ".cache" / "junk").write_text("x")
    (folder / ".README.md.1.tmp").write_text("x")
    (folder / "more").mkdir()
    (folder / "more" / ".env").write_text("secret")
    assert push(hub, folder, private=True) == f"{hub.url}/me/tiny-sfmp/commit/1"
    local = {path.name: path.read_bytes() for path in folder.iterdir()
             if path.is_file() and not path.name.startswith(".")}
    assert hub.files == {("me/tiny-sfmp", "main"): local}
    assert len(hub.commits) == 1 and hub.commits[0]["summary"] == "Upload a model quantized by sfmp"
    assert len(hub.objects) == len(list(folder.glob("*.safetensors"))) > 2
    created = hub.created["me/tiny-sfmp"]
    assert created.get("private") is True or created.get("visibility") == "private"


def test_the_card_arrives_with_the_results(hub, folder):
    push(hub, folder, results=RESULTS)
    data = ModelCard(hub.files["me/tiny-sfmp", "main"]["README.md"].decode()).data
    assert data.base_model == "someone/tiny" and data.base_model_relation == "quantized"
    assert [result.metric_value for result in data.eval_results] == [5.5]
    assert set(hub.validated) == {hub.files["me/tiny-sfmp", "main"]["README.md"].decode()}
    own = "---\nlicense: mit\n---\nmine\n"
    (folder / "README.md").write_text(own)
    push(hub, folder)
    assert hub.files["me/tiny-sfmp", "main"]["README.md"].decode() == own  # an edited card is kept


def test_weights_of_an_earlier_upload_do_not_stay(hub, folder, tiny_llama, tmp_path):
    one = hf.save_checkpoint(tiny_llama, tmp_path / "one")  # one file, where the other has many and an index
    push(hub, one)
    hub.files["me/tiny-sfmp", "main"]["notes.txt"] = b"kept"
    assert "model.safetensors" in hub.files["me/tiny-sfmp", "main"]
    push(hub, folder)
    local = {path.name for path in folder.iterdir()}
    assert "model.safetensors" not in local and set(hub.files["me/tiny-sfmp", "main"]) == local | {"notes.txt"}
    push(hub, one)
    assert set(hub.files["me/tiny-sfmp", "main"]) == {path.name for path in one.iterdir()} | {"notes.txt"}


def test_what_is_no_part_of_a_checkpoint_stays_here(hub, folder):
    expected = {path.name for path in folder.iterdir()} | {"tokenizer.json", "LICENSE.txt", "bits [3].png"}
    for name in ("tokenizer.json", "LICENSE.txt", "bits [3].png", "notes.txt", "pytorch_model.bin", "results.json",
                 "optimizer.pt", "salience.safetensors.part"):
        (folder / name).write_text("{}")
    (folder / "runs").mkdir()
    (folder / "runs" / "config.json").write_text("{}")
    with pytest.warns(UserWarning, match="notes.txt, optimizer.pt, pytorch_model.bin, results.json, runs, salience"):
        push(hub, folder)
    assert set(hub.files["me/tiny-sfmp", "main"]) == expected


def test_the_card_loads_from_the_repository(hub, folder):
    assert 'from_pretrained("this folder")' in (folder / "README.md").read_text()
    for name in ("me/first", "me/tiny-sfmp"):
        push_checkpoint(folder, name, token=TOKEN, endpoint=hub.url)
        assert f'from_pretrained("{name}")' in hub.files[name, "main"]["README.md"].decode()
    push(hub, folder, results=RESULTS)
    card = hub.files["me/tiny-sfmp", "main"]["README.md"]
    push(hub, folder)
    assert b'from_pretrained("me/tiny-sfmp")' in card and hub.files["me/tiny-sfmp", "main"]["README.md"] == card


def test_another_branch(hub, folder):
    push(hub, folder, revision="three-bits")
    assert "config.json" in hub.files["me/tiny-sfmp", "three-bits"] and ("me/tiny-sfmp", "main") not in hub.files


def test_refusals_are_one_error_and_change_nothing(hub, folder, tmp_path):
    with pytest.raises(SfmpError, match="log in"):
        push_checkpoint(folder, "me/tiny-sfmp", token="hf_wrong", endpoint=hub.url)
    with pytest.raises(SfmpError, match="OWNER/NAME"):
        push_checkpoint(folder, "tiny", token=TOKEN, endpoint=hub.url)
    with pytest.raises(SfmpError, match="quantized by sfmp"):
        push(hub, tmp_path)
    with pytest.raises(SfmpError, match="value"):
        push(hub, folder, results=[{"dataset": "x", "metric": "acc", "value": None}])
    assert not hub.files and not hub.objects
    card = (folder / "README.md").read_bytes()
    with pytest.raises(SfmpError, match="the network"):
        push_checkpoint(folder, "me/tiny-sfmp", token=TOKEN, endpoint="http://127.0.0.1:9", results=RESULTS)
    assert (folder / "README.md").read_bytes() == card  # it names no repository that was never made
    (folder / "README.md").unlink()
    with pytest.raises(SfmpError, match="the network"):
        push_checkpoint(folder, "me/tiny-sfmp", token=TOKEN, endpoint="http://127.0.0.1:9")
    assert not (folder / "README.md").exists()
    own = b"---\r\nlicense: mit\r\n---\r\nmine\r\n"
    (folder / "README.md").write_bytes(own)
    with pytest.raises(SfmpError, match="the network"):
        push_checkpoint(folder, "me/tiny-sfmp", token=TOKEN, endpoint="http://127.0.0.1:9")
    assert (folder / "README.md").read_bytes() == own
    (folder / "README.md").write_text("---\n- no mapping\n---\n")
    with pytest.raises(SfmpError, match="card"):
        push(hub, folder)
    assert not hub.files


def _environment(hub, tmp_path):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return {**kept, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home")}


def test_the_command_line_pushes(hub, folder, tmp_path):
    results = tmp_path / "results.json"
    results.write_text(json.dumps(RESULTS))
    done = subprocess.run([sys.executable, "-m", "sfmp", "push", folder, "me/tiny-sfmp", "--results", results],
                          capture_output=True, text=True, timeout=120, env=_environment(hub, tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub.url}/me/tiny-sfmp/commit/1\n"
    assert b"perplexity" in hub.files["me/tiny-sfmp", "main"]["README.md"]


def test_push_to_hub_of_transformers_uploads_a_loadable_checkpoint(hub, folder, tmp_path):
    code = ("import sys, sfmp\nfrom transformers import AutoModelForCausalLM\n"
            "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\nmodel.push_to_hub('me/other')\n")
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=120,
                          env=_environment(hub, tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    files = hub.files["me/other", "main"]
    assert {"config.json", "model.safetensors", "README.md"} <= set(files)
    again = tmp_path / "again"
    again.mkdir()
    for name, content in files.items():
        (again / name).write_bytes(content)
    from transformers import AutoModelForCausalLM

    assert len(hf.quantized_layers(AutoModelForCausalLM.from_pretrained(again))) == 14
