"""The GPU bench of products, end to end on the CPU: the command, its file, what it leaves out, what it predicts."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from kernels_numba.cpu import targets
from sfmp.bench import __main__ as command
from sfmp.bench import gpu_candidates, gpu_model, gpu_parts, gpu_peers, gpu_timing, gpu_wanted, kernels
from sfmp.bench.gpu_candidates import Matrices, random_matrix
from sfmp.bench.gpu_timing import Settings
from sfmp.bench.gpu_wanted import Kind, Wanted
from sfmp.bench.timing import Candidate
from sfmp.checks import SfmpError

pytestmark = pytest.mark.cpu
TINY = Settings("cpu", rounds=2, rotation_bytes=1, sample_us=1)
TOP = {"kind", "command", "commit", "dirty", "date", "device", "versions", "settings", "ceilings", "compiled", "host",
       "absent", "parts"}
DEVICE = {"name", "capability", "multiprocessors", "memory_bytes", "l2_bytes", "driver", "clocks"}
ROW = {"name", "family", "mode", "bits", "layout", "natural", "gather", "tokens", "dtype", "packed_bytes", "error",
       "predicted_us", "samples_us", "eager_us", "host_us"}
# CUDA.md 3.3, in microseconds: out × in, cuBLAS, then ours at 2, 2.5, 3, 3.5 and 4 bits.
PREDICTED = [((4096, 4096), 11.2, (3.4, 3.7, 4.0, 4.2, 4.5)), ((6144, 4096), 15.5, (4.0, 4.4, 4.8, 5.3, 5.7)),
             ((14336, 4096), 32.8, (6.5, 7.4, 8.4, 9.3, 10.3)), ((28672, 4096), 63.2, (10.8, 12.6, 14.5, 16.4, 18.3)),
             ((28672, 8192), 124, (19.3, 23.1, 26.9, 30.7, 34.5))]
MODES = tuple(mode for mode in ("lut16", "exact") if mode in targets.MODES[targets.detect()[0]])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The file of the whole command on small matrices."""
    path = tmp_path_factory.mktemp("bench") / "kernels.json"
    status = command.main(["kernels", "--device", "cpu", "--quick", "--shapes", "128x256", "--batches", "1", "3",
                           "--out", str(path)])
    assert status == 0 or "lut16" not in MODES
    return json.loads(path.read_text())


def part(result, name):
    return next(part for part in result["parts"] if part["part"] == name)


def test_the_file_says_where_when_and_how(measured):
    assert set(measured) == TOP and set(measured["device"]) == DEVICE
    assert measured["kind"] == "gpu kernels" and measured["device"]["name"].startswith("CPU")
    assert measured["device"]["capability"] is None, "what a processor measures is no evidence of a GPU"
    assert {"torch", "numba", "numba-cuda", "triton", "gemlite"} <= set(measured["versions"])
    assert all(measured["ceilings"][name] > 0 for name in ("copy_gbps", "read_gbps", "matmul_tflops"))
    settings = measured["settings"]
    assert settings["rounds"] == kernels.QUICK_ROUNDS and settings["rotation_bytes"] == kernels.CPU_ROTATION
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", measured["date"])


def test_one_token(measured):
    rows = part(measured, "product")["rows"]
    assert all(set(row) >= ROW and len(row["samples_us"]) == kernels.QUICK_ROUNDS for row in rows)
    assert all(sample > 0 for row in rows for sample in [*row["samples_us"], row["eager_us"]])
    ours = [row for row in rows if row["family"] == "sfmp"]
    found = {(row["mode"], row["bits"], row["layout"], row["natural"], row["gather"], row["dtype"]) for row in ours}
    wanted = set()
    for mode in MODES:
        wanted |= {(mode, bits, "uniform", False, "fused", "float16") for bits in (2, 3, 4)}
        wanted |= {(mode, 2, "blocks", False, "fused", dtype) for dtype in ("float16", "bfloat16")}
        wanted |= {(mode, 3, "blocks", True, "none", "float16"), (mode, 3, "blocks", False, "unfused", "float16")}
        wanted |= {(mode, 2.5, "column groups", True, "none", "float16")}
    assert wanted <= found
    assert all(row["error"] < (1e-2 if row["dtype"] == "bfloat16" else 1e-3) for row in ours)
    assert {"torch float16", "torch bfloat16", "torch int4pack"} <= {row["name"] for row in rows}
    assert len({row["name"] for row in rows}) == len(rows), "a name stands for one candidate"
    assert all(row["copies"] * row["packed_bytes"] >= kernels.CPU_ROTATION for row in rows)
    assert all(row["predicted_us"] is None for row in rows), "the model is one of GPUs"


def test_what_was_absent_says_why(measured):
    absent = {name: why for name, why in measured["absent"].items() if name in ("triton 2", "gemlite 4")}
    assert len(absent) == 2 and all("not installed" in why or "CUDA device" in why for why in absent.values())


def test_several_tokens_by_every_way(measured):
    rows = part(measured, "batch")["rows"]
    ways = {(row["way"], row["tokens"]) for row in rows if row["family"] == "sfmp"}
    assert ways == {(way, tokens) for way in MODES for tokens in (1, 3)}
    assert {row["tokens"] for row in rows if row["name"].startswith("torch float16")} == {1, 3}
    assert len({row["name"] for row in rows}) == len(rows)


def test_group_sizes_of_the_look_up_kernel(measured):
    if "lut16" in MODES:
        rows = part(measured, "width")["rows"]
        assert [(row["table_width"], row["group_size"]) for row in rows] == [(4, size) for size in (32, 64, 128, 256)]
        assert all(row["table_bytes"] is None for row in rows), "only a GPU has shared memory"


def test_accuracy_by_kind_of_activations(measured):
    rows = part(measured, "accuracy")["rows"]
    kinds = {(row["mode"], row["bits"], row["activations"], row["dtype"]) for row in rows}
    assert kinds == {(mode, bits, name, dtype) for mode in (*MODES, "torch") for bits in (2, 3, 4)
                     for name in ("gaussian", "outlier") for dtype in ("float16", "bfloat16")}
    assert all(row["error"] < (1e-2 if row["dtype"] == "bfloat16" else 2e-3) for row in rows)


def test_host_time_of_every_way_to_call(measured):
    calls = [f"{call} {mode}" for call in ("kernels_numba.matmul", "SFMPLinear", "operator") for mode in MODES]
    assert {"torch linear", *calls} == set(measured["host"])
    assert all(one["median_us"] > 0 and len(one["samples_us"]) == gpu_parts.HOST_SAMPLES
               for one in measured["host"].values())


@pytest.mark.parametrize(("shape", "dense", "ours"), PREDICTED)
def test_predictions_are_those_of_the_design(shape, dense, ours):
    rows, columns = shape
    assert gpu_model.predicted_us(2 * rows * columns, 4300, dense=True) == pytest.approx(dense, abs=0.5)
    for bits, us in zip((2, 2.5, 3, 3.5, 4), ours, strict=True):
        assert gpu_model.predicted_us(gpu_model.packed_bytes(rows, columns, bits), 4300) == pytest.approx(us, abs=0.1)


def test_a_device_that_copies_twice_as_fast_saves_half_of_the_bytes_time():
    slow, fast = (gpu_model.predicted_us(1e8, gbps) - gpu_model.LAUNCH_US for gbps in (2000, 4000))
    assert slow == pytest.approx(2 * fast)


@pytest.mark.parametrize("layout", gpu_wanted.LAYOUTS)
def test_layouts_have_their_widths_where_they_say(layout):
    packed = random_matrix(1024, 2048, Kind(3, layout))
    bits = packed.block_bits
    assert packed.wbits == 3
    if layout == "uniform":
        assert set(bits.flatten().tolist()) == {3}
    else:
        assert set(bits.flatten().tolist()) == {2, 3, 4}
    assert bits.shape[1] == (1 if layout == "column groups" else 2)
    assert not torch.equal(packed.row_perm.long(), torch.arange(1024))
    natural = random_matrix(1024, 2048, Kind(3, layout, natural=True))
    assert torch.equal(natural.row_perm.long(), torch.arange(1024))
    assert torch.equal(natural.col_perm.long(), torch.arange(2048)) and torch.equal(natural.planes, packed.planes)


def test_copies_outgrow_the_cache():
    settings = Settings("cpu", rotation_bytes=1000)
    assert [settings.copies(size) for size in (100, 300, 999, 5000)] == [10, 4, 2, 2]


def test_peers_that_tune_do_not_take_all_the_time(monkeypatch):
    clock, tried = iter(range(0, 1000, 25)), []
    monkeypatch.setattr(gpu_parts.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(gpu_parts, "wanted", lambda part, device: [])
    monkeypatch.setattr(gpu_peers, "missing", lambda name, device: None)
    monkeypatch.setattr(gpu_peers, "makers", lambda *_: dict.fromkeys(("torch float16", "gemlite 4", "gemlite 2")))
    part = {"part": "batch", "shape": [64, 256], "batches": [1, 8], "copy_gbps": 1.0}
    gpu_parts.timed(part, TINY, lambda name, make, peer: tried.append((name, peer[:9])))
    assert tried == [("torch float16", ""), ("gemlite 4", ""), ("gemlite 2", ""), ("torch float16", ""),
                     ("gemlite 4 8 tokens", "not tried"), ("gemlite 2 8 tokens", "not tried")]


@pytest.mark.parametrize("name", ["torch float16", "torch bfloat16", "torch int4pack"])
def test_peers_compute_what_their_weights_say(name):
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).half()
    candidate = gpu_peers.makers(64, 256, x, TINY, 1000.0)[name]()
    assert candidate.error < 1e-2 and candidate.facts["tokens"] == 3 and candidate.copies == 2
    assert candidate.products[0]().shape == (3, 64)


def test_a_wrong_product_shows_in_its_error():
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(0)).half()
    matrices = Matrices(64, 256, Kind(3), TINY)
    right = x.double() @ matrices.dense().T
    assert gpu_timing.checked(lambda: right.half(), right, torch.float16) < 1e-3
    assert gpu_timing.checked(lambda: right.half() * 1.01, right, torch.float16) == pytest.approx(0.01, rel=0.1)
    assert gpu_timing.checked(lambda: torch.full((1, 64), float("nan")), right, torch.float16) is None


def test_copies_are_laid_out_once_and_a_layout_that_fails_waits_for_its_candidate(monkeypatch):
    made = []

    def make_copies(packed, way, count, device):
        made.append((way, packed.shape, count))
        if way == "exact":
            raise SfmpError("no such way")
        return gpu_candidates.make_copies.original(packed, way, count, device)

    make_copies.original = gpu_candidates.make_copies
    monkeypatch.setattr(gpu_candidates, "make_copies", make_copies)
    stock = gpu_candidates.Stock((64, 256), TINY, 1.0)
    found = [Wanted(Kind(3), "lut16"), Wanted(Kind(3), "exact"), Wanted(Kind(3), "lut16", dtype="bfloat16")]
    stock.lay_out(found)
    assert sorted(made) == [("exact", (64, 256), 2), ("lut16", (64, 256), 2)]
    with pytest.raises(SfmpError, match="no such way"):
        stock.candidate(found[1])
    if "lut16" in MODES:
        assert stock.candidate(found[0]).error < 1e-3 and stock.candidate(found[2]).facts["dtype"] == "bfloat16"
    assert [way for way, *_ in made].count("lut16") == 1


def test_every_candidate_is_visited_once_a_round():
    calls = []
    prepared = [gpu_timing.Prepared(Candidate(name, "torch", [None], 7, facts={"bits": 4}),
                                    lambda name=name: calls.append(name) or 1.5, 2.0, None) for name in "abcdefgh"]
    rows = gpu_timing.measure(prepared, 3)
    assert [row["samples_us"] for row in rows] == [[1.5] * 3] * 8
    assert rows[0] == {"name": "a", "family": "torch", "bits": 4, "packed_bytes": 7, "copies": 1, "error": None,
                       "samples_us": [1.5] * 3, "eager_us": 2.0, "host_us": None}
    rounds = [calls[start : start + 8] for start in (0, 8, 16)]
    assert all(sorted(order) == list("abcdefgh") for order in rounds) and rounds[0] != rounds[1]


BLOCKED = """
import importlib.machinery, sys
class Block:  # a package that is found and cannot be imported
    def find_spec(self, name, path=None, target=None):
        if name in ("datasets", "lm_eval", "seaborn", "matplotlib", "accelerate", "psutil", "scipy", "snakemake",
                    "papermill", "safetensors", "sklearn", "IPython"):
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        raise ImportError(f"{spec.name} is blocked")
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Block())
from sfmp.bench import gpu_worker, gpu_parts, kernels
from sfmp.bench.gpu_timing import Settings
from sfmp.bench.gpu_wanted import Kind, Wanted
settings = Settings("cpu", rounds=1, rotation_bytes=1, sample_us=1)
for name in ("ceilings", "host", "accuracy", "product", "batch", "width"):
    part = {"part": name, "shape": [32, 128], "batches": [2], "copy_gbps": 1.0}
    assert gpu_worker.run_part(part, settings, lambda name: None)
from sfmp import environment
environment.versions(), environment.git_state(), kernels._versions()
"""


def test_nothing_but_torch_numba_and_pandas_is_needed():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


INTERPRETED = """
import torch, triton
from sfmp.bench import gpu_triton
for bits in (2, 4):
    rows, columns, size = 70, 1152, 128
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    scales, zeros = torch.rand(rows, columns // size).half(), torch.full((rows, columns // size), 1.5).half()
    x, words = torch.randn(1, columns).half(), gpu_triton.pack(codes, bits, size)
    assert words.shape == (rows, columns * bits // 32) and words.dtype == torch.int32
    spread = [part.double().repeat_interleave(size, 1) for part in (scales, zeros)]
    exact = x.double() @ ((codes.double() - spread[1]) * spread[0]).T
    for config in gpu_triton.CONFIGS:
        y = torch.full((1, rows), float("nan")).half()
        grid = (triton.cdiv(rows, config.kwargs["ROWS"]),)
        gpu_triton.multiply[grid](words, scales, zeros, x, y, rows, GROUPS=columns // size, BITS=bits, GROUP=size,
                                  **config.kwargs)
        assert (y.double() - exact).norm() / exact.norm() < 1e-3, (bits, config)
"""


def test_the_triton_peer_computes_what_its_codes_say():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
