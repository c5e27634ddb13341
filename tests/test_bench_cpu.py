"""The CPU bench end to end on small matrices: parts, peers that are absent or fail, the file, the command."""

import json

import numpy as np
import pytest
import torch

from kernels_numba.cpu import targets, threads
from sfmp.bench import __main__ as command
from sfmp.bench import cpu, cpu_peers, roof, table_width, timing
from sfmp.tables_kernels import read_bench

MODES = targets.MODES[targets.detect()[0]]
pytestmark = pytest.mark.cpu


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(timing, "COPIES_BYTES", 1 << 15)
    monkeypatch.setattr(timing, "SWEEP_BYTES", 1 << 16)
    monkeypatch.setattr(cpu, "BITS", (2, 3))
    before = torch.get_num_threads()
    monkeypatch.setattr(cpu_peers, "importable", lambda name: False)
    monkeypatch.setattr(cpu.os, "sched_setaffinity", lambda *_: None)  # this process has other tests to run
    yield
    torch.set_num_threads(before)


CPUS = [0]
WORST = {"lut8": 2e-2, "lut16": 1e-4, "exact": 1e-6}


def test_one_token(small):
    result = cpu.run_part({"part": "product", "shape": [256, 256]}, True, CPUS)
    rows = {row["name"]: row for row in result["rows"]}
    ours = {f"{mode} {kind}" for mode in MODES for kind in ("2", "3", "3 mixed", "3 natural")}
    assert ours | {"torch bfloat16", "torch int4pack", "read 2 as it is", "read 2 prefetched"} <= set(rows)
    assert all(rows[name]["error"] < WORST[name.split()[0]] for name in ours)
    assert all(len(row["cold"]) == cpu.QUICK["product"] for row in rows.values())
    assert rows["exact 2"]["bits"] == 2 and rows["exact 2"]["weight_bytes"] < rows["exact 3"]["weight_bytes"]
    assert set(result["absent"]) >= {"onnxruntime acc4 2", "openvino u4"}
    assert "onnx and onnxruntime not installed" in result["absent"]["onnxruntime acc4 2"]


def test_several_tokens_both_ways(small):
    rows = cpu.run_part({"part": "batch", "shape": [256, 256], "batch": 3}, True, CPUS)["rows"]
    ways = {(row["mode"], row["way"], row["bits"]) for row in rows if row["family"] == "sfmp"}
    assert ways == {(mode, way, bits) for mode in MODES for way in ("tables", "panels") for bits in (2, 3, 4)}
    assert all(row["error"] < 2e-2 for row in rows if row["family"] == "sfmp")


def test_accuracy_by_kind_of_activations(small):
    rows = cpu.run_part({"part": "accuracy", "shape": [256, 256]}, True, CPUS)["rows"]
    worst = {mode: max(row["error"] for row in rows if row["mode"] == mode and row["dtype"] == "float32")
             for mode in (*MODES, "torch")}
    assert all(worst[mode] < WORST[mode] for mode in MODES) and worst["torch"] < 1e-6
    assert "lut8" not in MODES or worst["exact"] < worst["lut16"] < worst["lut8"]


def test_a_processor_without_vector_look_ups_is_measured_too(small, monkeypatch):
    monkeypatch.setenv(targets.VARIABLE, "generic")
    rows = cpu.run_part({"part": "batch", "shape": [128, 128], "batch": 2}, True, CPUS)["rows"]
    assert {row["mode"] for row in rows if row["family"] == "sfmp"} == {"exact"}


@pytest.mark.parametrize("bits", [2, 3])
def test_tables_of_any_width_give_the_same_product(small, bits):
    x = torch.randn(256, generator=torch.Generator().manual_seed(0)).numpy()
    found = table_width.candidates(48, 256, x, bits)
    assert [candidate.facts["table_bytes"] for candidate in found] == [128 * 4 * 4, 64 * 16 * 4, 32 * 256 * 4]
    assert all(candidate.error < 1e-6 for candidate in found)


def test_the_roof_reads_what_the_kernels_read(small):
    from sfmp.bench.cpu_kernels import Matrices

    matrices = Matrices(256, 256, 2)
    for candidate in roof.candidates(matrices.images, "2"):
        image = matrices.images[0]
        assert len(image) - roof.PIECE < candidate.weight_bytes <= len(image)
        lines = image[: candidate.weight_bytes].view(np.int32).reshape(-1, 16)
        expected = [np.bitwise_or.reduce(np.bitwise_xor.reduce(part)) for part in _shares(lines, threads.count())]
        assert candidate.products[0]()[::16].tolist() == expected, "every byte is read, once"


def _shares(lines, count):
    """The pieces that each of `count` threads reads."""
    pieces = lines.reshape(-1, roof.PIECE // 64, 16)
    return [pieces[part * len(pieces) // count : (part + 1) * len(pieces) // count].reshape(-1, 16)
            for part in range(count)]


def test_peers_compute_what_their_weights_say(small):
    x = torch.randn(3, 256)
    for make in (cpu_peers.torch_int4, cpu_peers.torch_int8):
        assert make(64, 256, x).error < 1e-2
    assert cpu_peers.torch_dense(64, 256, x, torch.float32).error < 1e-6


@pytest.mark.parametrize(("package", "make"), [
    ("onnxruntime", lambda x: cpu_peers.onnxruntime(64, 256, x, 4, "acc4", 1, [0])),
    ("openvino", lambda x: cpu_peers.openvino(64, 256, x, 4, 1)),
])
def test_optional_peers_compute_what_their_weights_say(small, package, make):
    pytest.importorskip(package)
    assert make(torch.randn(3, 256)).error < 2e-2


def test_the_command_writes_a_file_that_says_what_failed(tmp_path, capsys):
    out = tmp_path / "bench.json"
    status = command.main(["cpu", "--out", str(out), "--parts", "accuracy", "decode", "--models", "none", "--quick",
                           "--shapes", "128x256", "--threads", "1"])
    assert status == 1 and "failed: decode none" in capsys.readouterr().err
    result = json.loads(out.read_text())
    accuracy, decode = result["parts"]
    assert accuracy["rows"] and "expected embedded" in " ".join(decode["failed"])
    assert result["kind"] == "cpu" and result["versions"]["torch"] and result["threads"] == 1
    with pytest.raises(ValueError, match="decode failed"):
        read_bench(out)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--shapes", "4096"], "expected out×in"), (["--shapes", "64x100"], "a multiple of 128"),
    (["--parts", "nothing"], "invalid choice: 'nothing'"),
])
def test_bad_arguments_are_refused(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["cpu", "--out", str(tmp_path / "b.json"), *arguments])
    assert message in capsys.readouterr().err


def test_too_many_threads_are_refused(tmp_path, capsys):
    assert command.main(["cpu", "--out", str(tmp_path / "b.json"), "--threads", "100000"]) == 2
    assert "--threads: expected at most" in capsys.readouterr().err and not (tmp_path / "b.json").exists()


def test_a_file_that_cannot_be_written_is_refused_before_measuring(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert command.main(["cpu", "--out", str(tmp_path / "file" / "b.json"), "--threads", "1"]) == 2
    assert "--out: expected a file that can be written" in capsys.readouterr().err
