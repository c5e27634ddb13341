"""Models held whole in less memory: checkpointing, sums on the CPU or in files, weights spread by a device map."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_models import token_windows, write

from sfmp import pipeline, stages
from sfmp.allocate import make_plan
from sfmp.apply import quantize_model
from sfmp.model_source import load, load_placed
from sfmp.salience import SALIENCE_SOURCES, fisher_salience
from sfmp.spec import QuantSpec, SfmpError

CPU = torch.device("cpu")
SPEC = QuantSpec(bpw=4.0, group_size=32, block_rows=32)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder of a tiny model by family."""
    place = tmp_path_factory.mktemp("models")
    return {family: write(place / family, family) for family in ("llama", "mixtral")}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("place", [None, "cpu", "files"])
def test_less_memory_gives_the_same_salience(models, tmp_path, family, place):
    model, _ = load(str(models[family]), "float32", "cpu")
    expected = fisher_salience(model, token_windows())
    where = tmp_path / "sums" if place == "files" else place
    runs, layer = [], model.model.layers[1]
    handle = layer.self_attn.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    found = fisher_salience(model, token_windows(), checkpointing=True, accumulate=where)
    handle.remove()
    assert len(runs) == 2 * len(token_windows())  # forward, and again on the way back
    assert set(found) == set(expected) and found.readers == expected.readers
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "forward" not in vars(layer)
    if place == "files":
        files = sorted((tmp_path / "sums").iterdir())
        assert sum(file.stat().st_size for file in files) == 4 * sum(value.numel() for value in expected.values())
        first = next(iter(expected.values()))
        assert np.array_equal(np.fromfile(files[0], np.float32), first.numpy().ravel())


def test_spread_loads_by_a_device_map(models, monkeypatch):
    asked, original = [], stages.load_model
    monkeypatch.setattr(stages, "load_model",
                        lambda *args, **options: (asked.append(options), original(*args, **options))[1])
    ids = token_windows(1)
    plain, _ = load(str(models["llama"]), "float32", "cpu")
    spread, _ = load(str(models["llama"]), "float32", "spread")
    assert asked == [{}, {"device_map": "auto", "offload_folder": None}]
    with torch.no_grad():
        assert torch.allclose(spread(ids).logits.cpu(), plain(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_offloaded_weights_are_refused_with_what_to_do(models, tmp_path, place):
    """What ``device_map="auto"`` does with what no GPU holds; the advice is to go layer by layer."""
    parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    layers = {f"model.layers.{index}": place if index == 1 else "cpu" for index in range(3)}
    model, _ = load_placed(str(models["llama"]), "float32", CPU, parts | layers, tmp_path)
    windows, full = token_windows(), load(str(models["llama"]), "float32", "cpu")[0]
    expected = fisher_salience(full, windows)
    if place == "cpu":
        assert all(torch.equal(value, expected[name]) for name, value in fisher_salience(model, windows).items())
        return
    error = "expected every weight in memory, found 7 of 21 matrices offloaded .* model.layers.1.*one layer at a time"
    for source in ("fisher", "magnitude", "activation"):
        with pytest.raises(SfmpError, match=f"{source}_salience: {error}"):
            SALIENCE_SOURCES[source](model, windows)
    spec = dataclasses.replace(SPEC, method="rtn")
    with pytest.raises(SfmpError, match=f"quantize_model: {error}"):
        quantize_model(model, make_plan(expected, spec), windows)
    with pytest.raises(SfmpError, match="measured.*offloaded"):
        make_plan(expected, dataclasses.replace(spec, objective="measured"), model)
    with torch.no_grad():  # it is left as it was, and runs
        assert torch.allclose(model(windows).logits, full(windows).logits, rtol=1e-4, atol=1e-5)


def test_a_model_larger_than_the_gpus_together_is_streamed(models, tmp_path, monkeypatch):
    """No GPU here: a device map that leaves a layer on disk stands for one that does not fit."""
    parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    layers = {f"model.layers.{index}": "disk" if index == 1 else "cpu" for index in range(3)}
    source, calibration = str(models["llama"]), pipeline.Calibration("python:calibration", 2, 16)
    monkeypatch.setattr(pipeline, "load", lambda name, dtype, device: load_placed(name, dtype, CPU, parts | layers))
    with pytest.warns(UserWarning, match="device spread: the GPUs do not hold all of the model"):
        pipeline.quantize_to_folder(source, tmp_path / "spread", SPEC, calibration, device="spread")
    pipeline.quantize_to_folder(source, tmp_path / "cpu", SPEC, calibration, device="cpu")
    saved = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("spread", "cpu")]
    assert saved[0] == saved[1]


def test_a_spread_model_has_its_sums_on_the_cpu_and_the_same_bytes(models, tmp_path, monkeypatch):
    asked, original = [], SALIENCE_SOURCES["fisher"]
    monkeypatch.setitem(SALIENCE_SOURCES, "fisher",
                        lambda *args, **options: (asked.append(options), original(*args, **options))[1])
    source, calibration = str(models["llama"]), pipeline.Calibration("python:calibration", 2, 16)
    for device in ("spread", "cpu"):
        pipeline.quantize_to_folder(source, tmp_path / device, SPEC, calibration, device=device)
    assert asked[0]["checkpointing"] and asked[0]["accumulate"] == "cpu" and len(asked) == 1
    saved = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("spread", "cpu")]
    assert saved[0] == saved[1]


def test_sums_in_files_are_not_those_of_an_earlier_call(models, tmp_path):
    model, _ = load(str(models["llama"]), "float32", "cpu")
    first = fisher_salience(model, token_windows(), accumulate=tmp_path)
    kept = {name: value.clone() for name, value in first.items()}
    with pytest.raises(SfmpError, match="000000.float32: expected no sums of an earlier call"):
        fisher_salience(model, token_windows(), accumulate=tmp_path)
    assert all(torch.equal(value, kept[name]) for name, value in first.items())
