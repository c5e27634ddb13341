"""Bad input on the command line: one line that names it, exit status 2, and nothing written or replaced."""

import json
import shutil

import pytest

from sfmp import cli

QUICK = ["--block-rows", "64", "--windows", "2", "--seqlen", "64", "--device", "cpu", "--quiet"]
FAST = ["--method", "rtn", "--salience", "magnitude", "--group-size", "32", *QUICK]


@pytest.fixture(scope="module")
def stories(shared_data):
    return shared_data / "models" / "stories260K"


@pytest.fixture(scope="module")
def made(tmp_path_factory, stories):
    """The smallest model, quantized."""
    folder = tmp_path_factory.mktemp("made") / "model"
    assert cli.main(["quantize", str(stories), str(folder), "--bpw", "4", *FAST]) == 0
    return folder


def test_an_existing_output_is_left_alone(made, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    before = (made / "model.safetensors").stat().st_mtime_ns
    for folder in (tmp_path, made):
        assert cli.main(["quantize", "embedded", str(folder), *QUICK]) == 2
        assert "--overwrite" in capsys.readouterr().err
    assert cli.main(["quantize", "embedded", str(tmp_path), "--overwrite", *QUICK]) == 2
    assert "something else" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert (made / "model.safetensors").stat().st_mtime_ns == before


def test_overwrite_replaces_a_checkpoint(stories, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["quantize", str(stories), str(out), *FAST]
    assert cli.main([*arguments, "--bpw", "3"]) == 0
    assert cli.main([*arguments, "--bpw", "4", "--overwrite"]) == 0
    assert capsys.readouterr().err == ""  # --quiet
    assert cli.main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["spec"]["bpw"] == 4.0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_takes_no_model_that_is_not_quantized(stories, tmp_path, capsys):
    shutil.copytree(stories, tmp_path / "mine")
    assert cli.main(["quantize", "embedded", str(tmp_path / "mine"), "--overwrite", *QUICK]) == 2
    assert "something else" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == sorted(p.name for p in stories.iterdir())


@pytest.mark.parametrize("arguments", [["eval", "{}", "--quiet"], ["generate", "{}", "x"], ["quantize", "{}", "{}-q"]])
def test_weights_that_are_cut_off(stories, tmp_path, capsys, arguments):
    shutil.copytree(stories, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:300_000])
    extra = ["--group-size", "32", *QUICK] if arguments[0] == "quantize" else ["--device", "cpu"]
    assert cli.main([argument.format(tmp_path / "cut") for argument in arguments] + extra) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'cut'}" in error.splitlines()[-1] and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]


WRONG = {
    "no such model": (["quantize", "no/such/model", "{out}"], "checkpoint folder"),
    "a folder without a model": (["eval", "{here}"], "config.json"),
    "budget out of reach": (["quantize", "embedded", "{out}", "--bpw", "9"], "choose bpw"),
    "group size": (["quantize", "embedded", "{out}", "--group-size", "100"], "multiple of 32"),
    "calibration": (["quantize", "embedded", "{out}", "--calibration", "nowhere.txt"], "nowhere.txt"),
    "no such device": (["eval", "embedded", "--device", "abacus"], "abacus"),
    "no checkpoint": (["inspect", "{here}"], "quantized by sfmp"),
    "no such task": (["eval", "embedded", "--tasks", "chess"], "chess"),
    "no such picture": (["inspect", "{made}", "--picture", "{here}/bits.doc"], "suffix"),
    "no place for a picture": (["inspect", "{made}", "--picture", "{made}/config.json/bits.png"], "found a file"),
    "quantized twice": (["quantize", "{made}", "{out}"], "not quantized"),
    "too long a text": (["generate", "embedded", "x", "--tokens", "9999"], "at most 512"),
    "no authors' folder": (["convert", "{here}", "{out}"], "config.json"),
    "base model": (["quantize", "embedded", "{out}", "--base-model", "llama"], "OWNER/NAME"),
    "windows beyond the context": (["eval", "embedded", "--seqlen", "2000"], "at most the 512"),
    "windows of nothing": (["quantize", "embedded", "{out}", "--seqlen", "0"], "seqlen"),
    "size of files": (["quantize", "embedded", "{out}", "--max-shard-size", "many"], "such as 5GB"),
    "left alone": (["quantize", "embedded", "{out}", "--skip", "lm_head", "down_prj"], "'down_prj', which none has"),
    "device without numbers": (["generate", "embedded", "x", "--device", "meta"], "--device cpu"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line_and_2(case, made, tmp_path, capsys):
    arguments, message = WRONG[case]
    places = {"out": tmp_path / "out", "here": tmp_path, "made": made}
    assert cli.main([argument.format(**places) for argument in arguments]) == 2
    error = capsys.readouterr().err
    line = error.strip().splitlines()[-1]
    assert line.startswith(f"sfmp {arguments[0]}: ") and message in line and "Traceback" not in error
    assert not (tmp_path / "out").exists() and not list(tmp_path.iterdir())
