"""Runs that are killed go on and end with the same bytes; runs that would make something else are refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from command_line import ENVIRONMENT, ROOT
from tiny_models import contents, text_file, write

from sfmp import cli
from sfmp.resume import work_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and a text."""
    folder = tmp_path_factory.mktemp("resume")
    write(folder / "model")
    text_file(folder)
    return folder


def _arguments(place, out, *more, method="awq"):
    return ["quantize", str(place / "model"), str(out), "--calibration", str(place / "text.txt"), "--windows", "4",
            "--seqlen", "64", "--group-size", "32", "--block-rows", "32", "--bpw", "4", "--method", method,
            "--device", "cpu", "--quiet", *more]


@pytest.fixture(scope="module")
def whole(place):
    """What a run that nobody ends makes, by method."""
    made = {}
    for method in ("awq", "gptq"):
        assert cli.main(_arguments(place, place / method, method=method)) == 0
        made[method] = contents(place / method)
    return made


def _killed(arguments, kills):
    """Exit statuses of runs killed at these renames, and of the last."""
    environment = {**ENVIRONMENT, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "tiny_models.py"), json.dumps(kills), *arguments],
                          capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_a_killed_run_goes_on_to_the_same_bytes(place, whole, tmp_path):
    kills = [12, 2, 5]
    statuses, _ = _killed(_arguments(place, tmp_path / "out"), kills)
    assert statuses == [-9] * len(kills) + [0]
    assert contents(tmp_path / "out") == whole["awq"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("method, step", [("awq", 3), ("gptq", 5)])
def test_killed_again_and_again(place, whole, tmp_path, method, step):
    # Each run makes some files and dies before or after a rename by turns.
    statuses, _ = _killed(_arguments(place, tmp_path / "out", method=method), [step] * 40)
    assert len(statuses) > 15 / step and statuses == [-9] * (len(statuses) - 1) + [0]
    assert contents(tmp_path / "out") == whole[method]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _environment():
    """Of a process with as many threads as this one: resuming with another number is refused."""
    import torch

    return {**ENVIRONMENT, "OMP_NUM_THREADS": str(torch.get_num_threads())}


@pytest.mark.slow
def test_a_run_killed_by_the_clock_goes_on(place, whole, tmp_path):
    arguments = _arguments(place, tmp_path / "out")
    run = subprocess.Popen([sys.executable, "-m", "sfmp", *arguments], env=_environment(), stderr=subprocess.PIPE)
    while run.poll() is None and not list(work_folder(tmp_path / "out").glob("layer-*")):
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert run.returncode == -9 and not (tmp_path / "out").exists()
    layer = next(work_folder(tmp_path / "out").glob("layer-*"))
    before = layer.stat().st_mtime_ns
    kept = tmp_path / "kept"
    os.link(layer, kept)
    assert cli.main([*arguments, "--resume"]) == 0
    assert kept.stat().st_mtime_ns == before and contents(tmp_path / "out") == whole["awq"]


def _interrupt(place, out):
    """Leave the work of a run that was interrupted while it quantized."""
    import sfmp.stream_quantize as stream_quantize

    original, calls = stream_quantize._save_layer, []

    def save(*arguments):
        original(*arguments)
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt

    stream_quantize._save_layer = save
    try:
        assert cli.main(_arguments(place, out)) == 130
    finally:
        stream_quantize._save_layer = original


def test_interrupted_work_is_kept_and_used(place, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    _interrupt(place, out)
    work = work_folder(out)
    assert not out.exists() and len(list(work.glob("layer-*"))) == 2 and (work / "plan.safetensors").exists()
    import sfmp.stream_quantize as stream_quantize

    saved = []
    original = stream_quantize._save_layer
    monkeypatch.setattr(stream_quantize, "_save_layer", lambda path, *rest: (saved.append(path), original(path, *rest)))
    monkeypatch.setattr(stream_quantize, "fisher_by_layer", None)  # the salience is not computed again
    assert cli.main([*_arguments(place, out), "--resume"]) == 0
    assert [path.name for path in saved] == ["layer-00002.safetensors"]
    assert contents(out) == whole["awq"] and not work.exists()


def test_work_of_an_earlier_run_is_not_thrown_away(place, whole, tmp_path, capsys):
    out = tmp_path / "out"
    _interrupt(place, out)
    capsys.readouterr()
    assert cli.main(_arguments(place, out)) == 2
    error = capsys.readouterr().err
    assert "--resume" in error and len(error.strip().splitlines()) == 1
    assert len(list(work_folder(out).glob("layer-*"))) == 2
    assert cli.main(_arguments(place, out, "--overwrite")) == 0
    assert contents(out) == whole["awq"]


def test_another_run_is_refused_with_one_error(place, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    _interrupt(place, out)
    work, copy = work_folder(out), tmp_path / "copy"
    shutil.copytree(place, copy, ignore=shutil.ignore_patterns("awq", "gptq"))
    kept = {path.name for path in work.iterdir()}

    def refused(title, arguments):
        capsys.readouterr()
        assert cli.main([*arguments, "--resume"]) == 2
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1 and f"{title}: expected" in error and "found" in error, error
        assert {path.name for path in work.iterdir()} == kept and not out.exists()

    same = _arguments(place, out)
    refused("specification", [*same, "--bpw", "3.5"])
    refused("calibration", [*same, "--windows", "5"])
    refused("salience", [*same, "--salience", "magnitude"])
    refused("max_shard_size", [*same, "--max-shard-size", "1MB"])
    weights = copy / "model" / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    refused("model", _arguments(copy, out))
    monkeypatch.setattr("sfmp.code_hash.code_hash", lambda *modules: "0" * 16)
    refused("code of sfmp", same)
    monkeypatch.undo()
    monkeypatch.setattr("torch.get_num_threads", lambda: 63)
    refused("threads", same)


def test_changed_configuration_or_tokenizer_is_another_model(place, tmp_path):
    from types import SimpleNamespace

    from sfmp.resume import _model_fingerprint

    folder = tmp_path / "model"
    shutil.copytree(place / "model", folder)
    config = SimpleNamespace(_commit_hash=None)
    before = _model_fingerprint(str(folder), config)
    assert _model_fingerprint(str(folder), config) == before
    (folder / "notes.md").write_text("not of the model")
    assert _model_fingerprint(str(folder), config) == before
    for name in ("config.json", "tokenizer.json"):
        text = (folder / name).read_text("utf-8")
        (folder / name).write_text(text.replace("1", "2", 1), "utf-8")
        assert _model_fingerprint(str(folder), config) != before
        (folder / name).write_text(text, "utf-8")
        assert _model_fingerprint(str(folder), config) == before  # content counts, not the time
    hub = SimpleNamespace(_commit_hash="abc")
    assert _model_fingerprint("owner/name@main", hub) == "owner/name abc"


@pytest.mark.parametrize("bytes_allowed", [12_000, 300_000])
def test_a_full_disk_is_one_error_and_the_work_is_kept(place, whole, tmp_path, bytes_allowed):
    """No file may grow past a limit: the work, the layers, at last the checkpoint. Nothing is left half written."""
    arguments = _arguments(place, tmp_path / "out", method="gptq")
    limited = (f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes_allowed},) * 2); "
               "from sfmp.cli import main; sys.exit(main(sys.argv[1:]))")
    done = subprocess.run([sys.executable, "-c", limited, *arguments], capture_output=True, text=True,
                          env=_environment())
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "expected room to write, found a file larger than allowed" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists() and not list(work_folder(tmp_path / "out").glob(".*.tmp"))
    assert cli.main([*arguments, "--resume"]) == 0
    assert contents(tmp_path / "out") == whole["gptq"] and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_where_nothing_may_be_written_is_one_error(place, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert cli.main(_arguments(place, tmp_path / "file" / "out")) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and "expected room to write, found a file where a folder should be" in error
