"""Salience that one run keeps and others use: no second measurement, the same bytes, and nothing mixed up."""

import dataclasses
import json
import shutil

import pytest
from tiny_models import write

from sfmp import cli, stream_quantize
from sfmp.checks import SfmpError
from sfmp.pipeline import Calibration, quantize_to_folder
from sfmp.spec import QuantSpec

SPEC = QuantSpec(bpw=4.0, group_size=32, block_rows=32, levels=(2, 3, 4), method="rtn")
TEXT = Calibration("python:calibration", 2, 16)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return str(write(tmp_path_factory.mktemp("models") / "llama"))


@pytest.fixture(scope="module")
def kept(source, tmp_path_factory):
    root = tmp_path_factory.mktemp("kept")
    quantize_to_folder(source, root / "first", SPEC, TEXT, device="cpu", kept_salience=root / "salience")
    return root


def never(*_, **__):
    raise AssertionError("salience was measured again")


@pytest.mark.parametrize("changes", [{"bpw": 3.5}, {"levels": (2, 4)}, {"scope": "layer"}, {"method": "awq"}])
def test_other_budgets_measure_nothing_again_and_give_the_same_bytes(source, kept, tmp_path, monkeypatch, changes):
    spec = dataclasses.replace(SPEC, **changes)
    quantize_to_folder(source, tmp_path / "alone", spec, TEXT, device="cpu")
    monkeypatch.setattr(stream_quantize, "fisher_by_layer", never)
    quantize_to_folder(source, tmp_path / "kept", spec, TEXT, device="cpu", kept_salience=kept / "salience")
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "kept" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name


def test_a_run_on_kept_salience_that_was_killed_at_its_very_end_is_found_finished(source, kept, tmp_path, monkeypatch):
    from sfmp import resume

    arguments = dict(device="cpu", kept_salience=kept / "salience")
    with monkeypatch.context() as patch:
        move = resume._move

        def die(*given):
            move(*given)
            raise KeyboardInterrupt

        patch.setattr(resume, "_move", die)
        with pytest.raises(KeyboardInterrupt):
            quantize_to_folder(source, tmp_path / "out", SPEC, TEXT, **arguments)
    assert resume.in_place(tmp_path / "out")
    plan = quantize_to_folder(source, tmp_path / "out", SPEC, TEXT, resume=True, **arguments)
    assert plan.hash == json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["plan_hash"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("measured", [False, True])
def test_a_resumed_run_whose_kept_salience_is_gone_says_so(source, kept, tmp_path, monkeypatch, measured):
    shutil.copytree(kept / "salience", tmp_path / "salience")
    arguments = dict(device="cpu", kept_salience=tmp_path / "salience")

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if measured:  # a part of it, by a run that kept none
            save = stream_quantize.save_problem
            patch.setattr(stream_quantize, "save_problem", lambda *given: (save(*given), die()))
            with pytest.raises(KeyboardInterrupt):
                quantize_to_folder(source, tmp_path / "out", SPEC, TEXT, device="cpu")
            assert len(list((tmp_path / ".out.work").glob("salience-*.safetensors"))) == 1
        patch.setattr(stream_quantize, "assemble", die)
        with pytest.raises(KeyboardInterrupt):
            quantize_to_folder(source, tmp_path / "out", SPEC, TEXT, resume=measured, **arguments)
    shutil.rmtree(tmp_path / "salience")
    with pytest.raises(SfmpError, match="salience: expected the salience that this run's plan came from"):
        quantize_to_folder(source, tmp_path / "out", SPEC, TEXT, resume=True, **arguments)
    quantize_to_folder(source, tmp_path / "out", SPEC, TEXT, device="cpu", resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("spec", "text", "message"), [
    (SPEC, dataclasses.replace(TEXT, windows=3), "calibration: expected .*, found "),
    (SPEC, dataclasses.replace(TEXT, salience="magnitude"), "salience: expected fisher, found magnitude"),
    (dataclasses.replace(SPEC, block_rows=64), TEXT, "expected block_rows=64, found salience reduced with 32"),
    (dataclasses.replace(SPEC, objective="measured"), TEXT, "objective"),
])
def test_salience_of_something_else_is_refused(source, kept, tmp_path, spec, text, message):
    with pytest.raises(SfmpError, match=message):
        quantize_to_folder(source, tmp_path / "out", spec, text, device="cpu", kept_salience=kept / "salience")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_none_is_refused(source, tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(SfmpError, match="other: expected salience that an earlier run kept"):
        quantize_to_folder(source, tmp_path / "out", SPEC, TEXT, device="cpu", kept_salience=tmp_path / "other")


def test_a_model_that_is_not_streamed_is_refused(source, tmp_path):
    with pytest.raises(SfmpError, match="kept_salience: expected a model that is quantized layer by layer"):
        quantize_to_folder(source, tmp_path / "out", SPEC, TEXT, device="spread", kept_salience=tmp_path / "salience")
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept_is_small_and_says_what_it_is_of(kept):
    assert sorted(path.name for path in (kept / "salience").iterdir()) == ["blocks.safetensors", "identity.json"]
    told = json.loads((kept / "salience" / "identity.json").read_text())
    assert told["salience"] == "fisher" and "specification" not in told and told["seed"] == "0"


def test_the_command_line_keeps_it_too(source, tmp_path):
    arguments = ["quantize", source, str(tmp_path / "out"), "--bpw", "4", "--group-size", "32", "--block-rows", "32",
                 "--method", "rtn", "--windows", "2", "--seqlen", "16", "--device", "cpu", "--quiet"]
    assert cli.main([*arguments, "--keep-salience", str(tmp_path / "salience")]) == 0
    assert (tmp_path / "salience" / "blocks.safetensors").is_file()
