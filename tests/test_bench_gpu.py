"""The GPU bench of products, end to end on the CPU: the command, its file, what it leaves out, what it predicts."""

import json
import re
import subprocess
import sys

import pytest
import torch

from kernels_numba.cpu import targets
from sfmp.bench import __main__ as command
from sfmp.bench import gpu_model, gpu_parts, gpu_peers, gpu_timing, gpu_wanted, gpu_worker, kernels
from sfmp.bench.gpu_candidates import Matrices, random_matrix
from sfmp.bench.gpu_timing import Settings
from sfmp.bench.gpu_wanted import Kind
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


def test_a_candidate_that_fails_costs_itself_only():
    told = []
    attempts = gpu_worker.Attempts({"gemlite": "hung"}, TINY, told.append)

    def broken():
        raise RuntimeError("no such instruction\nmore")

    def fine():
        return Candidate("fine", "sfmp", [lambda: torch.zeros(1)], 1)

    attempts("mma 3 blocks", broken)
    attempts("mma 4 blocks", fine)
    attempts("triton 2", broken, peer="")
    attempts("gemlite 4", fine, peer="")
    attempts("torch int4pack", fine, peer="torch too old")
    assert attempts.failed == ["mma 3 blocks: RuntimeError: no such instruction"]
    assert [one.candidate.name for one in attempts.prepared] == ["fine"]
    assert attempts.absent == {"triton 2": "RuntimeError: no such instruction", "gemlite 4": "hung",
                               "torch int4pack": "torch too old"}
    assert told == ["mma 3 blocks", "mma 4 blocks", "triton 2"], "what is skipped is not tried"


class Breaking:
    """A worker whose process ends at some candidates."""

    def __init__(self, broken):
        self.broken, self.parts = broken, []

    def run(self, part, seconds):
        self.parts.append(part)
        left = [name for name in self.broken if name not in part["skip"] and name.split()[0] not in part["skip"]]
        return {"failed": "CUDA error: illegal address", "broke": left[0]} if left else {"rows": [], "absent": {}}


def test_a_candidate_that_ends_the_process_is_left_out_and_the_part_measured_again():
    worker = Breaking(["mma 3 blocks", "gemlite 2", "gemlite 4"])
    result = kernels._measured(worker, {"part": "product", "shape": [128, 128]}, {"ceilings": {"copy_gbps": 9}})
    assert result == {"rows": [], "absent": {}}
    assert worker.parts[-1]["skip"] == {name: "broke the process: CUDA error: illegal address"
                                        for name in ("mma 3 blocks", "gemlite")}
    assert len(worker.parts) == 3 and worker.parts[0]["copy_gbps"] == 9


def test_a_part_whose_end_has_no_remedy_fails():
    worker = Breaking(["accuracy mma"])
    worker.run = lambda part, seconds: {"failed": "gone", "broke": "accuracy mma"}
    assert kernels._measured(worker, {"part": "accuracy"}, {"ceilings": None}) == {"failed": "gone"}
    worker.run = lambda part, seconds: {"failed": "gone", "broke": None}
    assert kernels._measured(worker, {"part": "accuracy"}, {"ceilings": None}) == {"failed": "gone"}
    names = iter("abcdefghijk")
    worker.run = lambda part, seconds: {"failed": "gone", "broke": next(names)}
    assert "given up after 8" in kernels._measured(worker, {"part": "product"}, {"ceilings": None})["failed"]


def test_a_process_that_dies_or_hangs_is_told_from_its_last_word(monkeypatch):
    say = "import sys, time; sys.stdin.readline(); print('{\"trying\": \"mma\"}', flush=True); "
    popen = subprocess.Popen
    for code, text in (("sys.exit('bad address')", "bad address"), ("time.sleep(60)", "took more than 2 s"),
                       ("sys.exit(3)", "exit status 3")):
        monkeypatch.setattr(kernels.subprocess, "Popen",
                            lambda command, code=code, **given: popen([sys.executable, "-c", say + code], **given))
        with kernels.Worker({}) as worker:
            assert worker.run({"part": "product"}, 2) == {"failed": text, "broke": "mma"}
            assert worker._process is None, "the next part starts another"
        monkeypatch.undo()


def test_the_file_is_whole_after_every_part_and_parts_beyond_the_limit_are_not_begun(tmp_path, monkeypatch):
    path, seen = tmp_path / "k.json", []

    def run(self, part, seconds):
        seen.append(json.loads(path.read_text()))
        if part["part"] == "ceilings":
            return {"device": {"name": "x"}, "ceilings": {"copy_gbps": 1.0}, "rotation_bytes": 5}
        clock[0] += 100
        return {"rows": [{"name": "a", "samples_us": [2.0], "packed_bytes": 500, "predicted_us": None, "tokens": 1}]}

    clock = [0.0]
    monkeypatch.setattr(kernels.Worker, "run", run)
    monkeypatch.setattr(kernels.time, "monotonic", lambda: clock[0])
    chosen = [{"part": "product", "shape": [size, 128]} for size in (128, 256, 384)]
    lines = []
    result = kernels.measure(chosen, {"device": "cpu"}, path, 150, log=lambda text, flush: lines.append(text))
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert [len(file["parts"]) for file in seen] == [0, 0, 1]
    assert ["failed" in part for part in result["parts"]] == [False, False, True]
    assert "not begun: 200 s of 150 s" in result["parts"][2]["failed"] and result["settings"]["rotation_bytes"] == 5
    assert not list(tmp_path.glob(".*.tmp")) and any("25 % of copy" in line for line in lines)


def test_without_ceilings_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels.Worker, "run", lambda *_: {"failed": "no device", "broke": "ceilings"})
    chosen = [{"part": "product", "shape": [128, 128]}]
    result = kernels.measure(chosen, {"device": "cpu"}, tmp_path / "k.json", log=lambda *_, **__: None)
    assert [part["failed"] for part in result["parts"]] == ["no device", "not begun: the ceilings were not measured"]


def test_a_summary_compares_with_what_was_predicted_and_with_float16():
    rows = [{"name": "torch float16", "tokens": 1, "samples_us": [10.0, 12.0, 11.0], "packed_bytes": 22000,
             "predicted_us": 9.0}, {"name": "mma 3", "tokens": 1, "samples_us": [5.5], "packed_bytes": 5500,
                                    "predicted_us": 4.0}, {"mode": "mma", "error": 1e-4}]
    first, second = kernels.summary(rows, {"copy_gbps": 4.0})
    assert "11.00 us" in first and "1.00 x float16" in first and "50 % of copy" in first
    assert "5.50 us" in second and "25 % of copy" in second and "predicted    4.00 us" in second
    assert "2.00 x float16" in second


def test_what_failed_is_said_and_ends_with_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels.Worker, "run", lambda *_: {"failed": "no device", "broke": None})
    path = tmp_path / "k.json"
    assert command.main(["kernels", "--device", "cpu", "--parts", "accuracy", "--out", str(path)]) == 1
    assert "failed: ceilings, accuracy 256×512; the file says why" in capsys.readouterr().err
    assert [part["part"] for part in json.loads(path.read_text())["parts"]] == ["ceilings", "accuracy"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--shapes", "4096"], "expected out×in"), (["--shapes", "64x100"], "a multiple of 128"),
    (["--parts", "nothing"], "invalid choice: 'nothing'"), (["--batches", "0"], "at least 1, found '0'"),
    (["--batches", "many"], "at least 1, found 'many'"), (["--device", "tpu"], "invalid choice: 'tpu'"),
])
def test_bad_arguments_are_refused(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["kernels", "--out", str(tmp_path / "b.json"), *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_device_that_is_not_there_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "has_cuda", lambda: False)
    assert command.main(["kernels", "--device", "cuda", "--out", str(tmp_path / "b.json")]) == 2
    assert "--device: expected cpu, found cuda" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_refused_before_measuring(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(kernels.Worker, "run", lambda *_: pytest.fail("nothing may be measured"))
    with pytest.raises(SfmpError, match="--out: expected a file that can be written"):
        kernels.measure([], {}, tmp_path / "file" / "k.json")


def test_what_matters_most_is_measured_first():
    names = [part["part"] for part in kernels.parts(kernels.SHAPES, kernels.BATCHES)]
    assert names == ["host", "accuracy", *["product"] * 4, "batch", "width", *["product"] * 2]
    batch = next(part for part in kernels.parts(kernels.SHAPES, (1, 2), ["batch"]))
    assert batch == {"part": "batch", "shape": [14336, 4096], "batches": [1, 2]}


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
from sfmp.bench.gpu_wanted import Kind
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
