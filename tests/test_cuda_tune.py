"""Measuring a launch table, with times that are given."""

import json

import pytest
import torch
from cuda_stand_in import Library, stand_in

from kernels_numba.gpu import cubins, devices, launch

pytest.importorskip("kernels_numba.gpu.weight", reason="needs numba-cuda")
from kernels_numba.gpu import check, tune  # noqa: E402
from sfmp.bench.random_model import random_packed  # noqa: E402
from sfmp.checks import SfmpError  # noqa: E402


@pytest.fixture
def device(monkeypatch):
    found = stand_in(Library(), multiprocessors=3)
    monkeypatch.setattr(devices, "get", lambda index: found)
    monkeypatch.setattr(cubins, "get", lambda launch, capability: b"code")
    monkeypatch.setattr(check, "demand", lambda index, mode: None)
    monkeypatch.setattr(tune, "COLD", 1 << 10)
    monkeypatch.setattr(tune, "copies", lambda packed, mode, device, **options: (mode, options))
    monkeypatch.setattr(tune, "products", lambda weights, tokens, dequantized=False: (*weights, tokens, dequantized))
    return found


def test_the_entry_of_a_device_is_what_was_fastest(device, monkeypatch, tmp_path):
    def seconds(asked):
        mode, options, tokens, dequantized = asked
        if options.get("warps") == 16 and mode == "lut":
            raise SfmpError("too many warps")
        if tokens > 1:
            assert options == {"warps": 4}
            return (100 + tokens / 10 if dequantized else tokens) * 1e-6
        best = {"mma": {"warps": 4}, "lut": {"warps": 8}}
        return (1 if options in (best[mode], {"blocks": 4 * 3}) else 2) * 1e-6

    monkeypatch.setattr(tune, "seconds", seconds)
    monkeypatch.setattr(devices, "why_not", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA stand-in")
    path = tmp_path / "launch.json"
    path.write_text(json.dumps(launch.table()))
    tune.main(["--rows", "64", "--columns", "128", "--output", str(path)])
    assert device.counts["guard"] == 1, "everything is measured on the device that was named"
    table = json.loads(path.read_text())["devices"]
    assert table.pop(launch.DEFAULT) == launch.table()["devices"][launch.DEFAULT]
    entry = table.pop("NVIDIA stand-in")
    assert not table and entry["warps"] == {"mma": 4, "lut": 8} and entry["waves"] == 4
    assert entry["crossover"] == 128, "the first number of tokens from which on it is always faster"
    assert entry["measured"]["shape"] == [64, 128] and "16" not in entry["measured"]["microseconds"]["lut warps"]
    assert entry["measured"]["microseconds"]["tokens"]["16"] == [16, 101.6]


def test_codes_that_are_never_slower_have_no_crossover(device, monkeypatch):
    monkeypatch.setattr(tune, "seconds", lambda asked: 2e-6 if asked[3] else 1e-6)
    assert tune.crossover(None, None, 8)[0] is None
    monkeypatch.setattr(tune, "seconds", lambda asked: 1e-6 if asked[3] else 2e-6)
    assert tune.crossover(None, None, 8)[0] == tune.BATCHES[0]


def test_without_a_device_it_says_why(monkeypatch, capsys):
    monkeypatch.setattr(devices, "why_not", lambda: "no GPU here")
    with pytest.raises(SystemExit):
        tune.main([])
    assert "no GPU here" in capsys.readouterr().err


def test_copies_lie_in_different_places(monkeypatch):
    found = stand_in(Library())
    monkeypatch.setattr(devices, "get", lambda index: found)
    monkeypatch.setattr(tune, "COLD", 100_000)
    packed = random_packed(64, 256, 3.25)
    weights = tune.copies(packed, "lut", torch.device("cpu"), warps=4)
    assert len({weight.image.data_ptr() for weight in weights}) == len(weights) > 2
    assert all(torch.equal(weight.image, weights[0].image) for weight in weights)
    assert {weight.structure.options["warps"] for weight in weights} == {4}
    assert packed.wbits == 3 and len(tune.products(weights, 2)) == len(weights)
