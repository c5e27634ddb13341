"""The command of the GPU bench: what it leaves out, what it writes when something fails, what it refuses."""

import json
import subprocess
import sys

import pytest
import torch

from sfmp.bench import __main__ as command
from sfmp.bench import gpu_worker, kernels
from sfmp.bench.gpu_timing import Settings
from sfmp.bench.timing import Candidate
from sfmp.checks import SfmpError

TINY = Settings("cpu", rounds=2, rotation_bytes=1, sample_us=1)


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
    worker, numbers = Breaking([]), iter(range(100))
    worker.run = lambda part, seconds: {"failed": "gone", "broke": f"compile: {next(numbers)}"}
    assert kernels._measured(worker, {"part": "compile"}, {"ceilings": None}) == {"failed": "gone"}
    assert next(numbers) == 1, "there is nothing to leave out"
    worker.run = lambda part, seconds: {"failed": f"gone {next(numbers)}", "broke": "product: timing"}
    assert kernels._measured(worker, {"part": "product"}, {"ceilings": None}) == {"failed": "gone 3"}
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
