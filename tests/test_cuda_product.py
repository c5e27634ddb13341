"""Products through the launch path: in the simulator behind a driver's stand-in, and what is decided without one."""

import json
import os
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import packed_case
from cuda_stand_in import Library, stand_in
from simulation import ROUNDING, SUMS, TESTS

import kernels_numba
from kernels_numba.gpu import devices, launch
from sfmp.checks import SfmpError

pytest.importorskip("kernels_numba.gpu.weight", reason="needs numba-cuda")
from kernels_numba.gpu import check, product  # noqa: E402


@pytest.fixture(scope="module")
def simulated():
    folders = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run([sys.executable, str(TESTS / "cudasim_launch.py")], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.cudasim
@pytest.mark.slow
def test_what_the_driver_is_given_multiplies_right(simulated):
    """Layers, the operator, batches, a half-precision bias, panels: the kernels run on what parameters point to."""
    assert simulated.pop("waits") == 2, "one for the copy of a bias of each weight"
    assert {"mma layer", "lut vmap", "mma check, 3 tokens, dequantized", "panels", "float32"} <= set(simulated)
    for name, error in simulated.items():
        bound = ROUNDING["float32" if name == "float32" else "float16"]
        assert 0 < error <= bound * (2 if "dequantized" in name or name == "panels" else 1) + SUMS, name


def test_no_device_is_told_why():
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    assert kernels_numba.available()["cuda"].startswith("no: ")
    with pytest.raises(SfmpError, match=r"can run here, found cuda \(no: .*NVIDIA GPU"):
        kernels_numba.matmul(torch.zeros(1, 100), packed_case(0), "cuda")


@pytest.mark.parametrize("facts,told", [
    ({"available": False, "cuda": None}, "built without CUDA"),
    ({"available": False, "cuda": "13.0"}, "finds no CUDA device"),
    ({"available": True, "cuda": None}, "AMD"),
    ({"available": True, "cuda": "13.0", "capability": (7, 5)}, "capability 7.5; needs 8.0"),
    ({"available": True, "cuda": "13.0"}, "does not start: forked"),
    ({"available": True, "cuda": "13.0", "capability": (9, 0), "driver": "too old"}, "too old"),
    ({"available": True, "cuda": "13.0", "capability": (9, 0), "library": "libnvvm: not found"}, "libnvvm"),
    ({"available": True, "cuda": "13.0", "capability": (9, 0)}, None)], ids=lambda value: str(value)[:40])
def test_reasons(facts, told, monkeypatch):
    from kernels_numba.gpu import compile as compiler

    def current():
        if "driver" in facts:
            raise SfmpError(facts["driver"])

    def capability(index):
        if "capability" not in facts:
            raise RuntimeError("forked\nmore")
        return facts["capability"]

    monkeypatch.setattr(devices.driver, "current", current)
    monkeypatch.setattr(compiler, "missing_library", lambda: facts.get("library"))
    monkeypatch.setattr(torch.version, "cuda", facts["cuda"])
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(
        is_available=lambda: facts["available"], device_count=lambda: 1,
        get_device_capability=capability, get_device_name=lambda index: "a device"))
    devices.why_not.cache_clear()
    found = devices.why_not()
    assert found is None if told is None else told in found
    expected = "yes: a device; modes mma, lut" if told is None else f"no: {found}"
    assert kernels_numba.available()["cuda"] == expected
    devices.why_not.cache_clear()


@pytest.fixture
def judged(monkeypatch):
    """What the check of device 7 says; "wrong" at first."""
    said = ["wrong"]
    monkeypatch.setattr(check, "verdict", lambda index, mode: said[0])
    check.trusted.cache_clear()
    yield said
    check.trusted.cache_clear()


def test_wrong_devices_get_the_reference_and_one_warning(judged):
    with pytest.warns(RuntimeWarning, match="backend cuda is not used: wrong. The reference is used instead") as told:
        assert not check.trusted(7, "mma")
        assert not check.trusted(7, "mma")
    assert len(told) == 1
    with pytest.raises(SfmpError, match="backend cuda: wrong; use backend='reference'"):
        check.demand(7, "mma")
    judged[0] = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check.trusted(7, "lut")
    check.demand(7, "mma")


@pytest.mark.parametrize("factor,told", [(1, None), (1.01, "found 1 tokens: 0.0[01]"), (float("nan"), "nan")])
def test_the_check_compares_numbers(factor, told, monkeypatch):
    device = stand_in(Library())
    monkeypatch.setattr(devices, "get", lambda index: device)

    class Weight:
        device = torch.device("cpu")

        def __init__(self, packed):
            self.weight = packed.dequantize()

        def enqueue(self, x, bias):
            return ((x.double() @ self.weight.double().T + bias) * factor).half()

    monkeypatch.setattr(check, "make_weight", lambda packed, mode, where: Weight(packed))
    monkeypatch.setattr(check.panels, "multiply", lambda weight, x, y, bias: y.copy_(weight.enqueue(x, bias)))
    monkeypatch.setattr(devices, "wrong", set())
    monkeypatch.setattr(devices, "why_not", lambda: None)
    monkeypatch.setattr(devices, "offered", lambda: "a device")
    for mode in ("mma", "lut"):
        found = check.verdict.__wrapped__(0, mode)
        assert found is None if told is None else (f"stand-in, mode {mode}: expected relative errors" in found)
    said = kernels_numba.available()["cuda"]
    assert said.startswith("yes: a device; modes mma, lut")
    assert ("but mode lut failed its check on device 0; but mode mma failed" in said) == bool(told)
    if told:
        assert re.search(told, found)


def test_checks_wait_for_the_end_of_a_capture(monkeypatch):
    device = stand_in(Library(), capturing=lambda: True)
    monkeypatch.setattr(devices, "get", lambda index: device)
    with pytest.raises(SfmpError, match="CUDA graph: .*mode mma was not checked on device 0"):
        check.verdict.__wrapped__(0, "mma")
    with pytest.raises(SfmpError, match="CUDA graph: .*the weight is not on the device yet"):
        product.weight(packed_case(0), torch.device("cuda", 0), None, torch.float16)


def test_tensors_elsewhere_are_refused():
    for x, told in ((torch.zeros(1, 100), "expected a CUDA device for backend cuda, found cpu"),
                    (torch.zeros(1, 99), r"floating \[..., 100\]"), (torch.zeros(1, 100).long(), "floating")):
        with pytest.raises(SfmpError, match=told):
            product.matmul(x, packed_case(0))
    with pytest.raises(SfmpError, match="float16 or bfloat16 for mode mma"):
        product.matmul(torch.zeros(1, 100), packed_case(0), "mma")
    with pytest.raises(SfmpError, match="mode: expected one of mma, lut, found 'exact'"):
        product.matmul(torch.zeros(1, 100), packed_case(0), "exact")


def test_auto_keeps_to_the_host_for_tensors_there(monkeypatch):
    from kernels_numba import gpu

    monkeypatch.setattr(gpu, "available", lambda: pytest.fail("CUDA must not be started for tensors on the host"))
    packed = packed_case(0)
    for x in (torch.zeros(1, 100), np.zeros((1, 100), np.float32)):
        assert kernels_numba.matmul(x, packed).shape == (1, 40)


def test_the_operator_is_described():
    with torch.device("meta"):
        y = torch.ops.sfmp.cuda_linear(torch.empty(5, 1, 100), torch.empty(9), None, 40, "any")
    assert y.shape == (5, 1, 40)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        torch.ops.sfmp.cuda_linear(torch.empty(5, 1, 100), torch.empty(9), None, 40, "any")
    assert counter.get_total_flops() == 2 * 500 * 40
    from kernels_numba.gpu.weight import find

    with pytest.raises(SfmpError, match="image: expected the weight of a layer of this process"):
        find(torch.zeros(4, dtype=torch.uint8), "unknown")


def test_launch_table_says_where_its_numbers_are_from():
    for name, entry in launch.table()["devices"].items():
        found = launch.settings(name)
        assert found.crossover > 0 and set(found.warps) == {"mma", "lut"} and found.waves > 0
        assert (name == launch.DEFAULT) == (entry["measured"] is False)
        assert "estimate" in entry["source"] if name == launch.DEFAULT else entry["measured"]["microseconds"]
