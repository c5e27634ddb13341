"""Tables and figure of the memory bench, from a file whose every number is known; the whole run on a small model."""

import copy
import json

import pytest

from sfmp import cli, environment, plots_memory
from sfmp import tables_memory as tables
from sfmp.bench import memory, whole_run
from sfmp.bench.__main__ import main as bench_command
from sfmp.checks import SfmpError

BENCH = {
    "kind": "memory", "date": "2026-01-01", "commit": "abc", "dirty": True,
    "machine": {"cpu": "a processor", "memory_bytes": 8 << 30},
    "versions": {"python": "3.11", "torch": "2", "transformers": "5"}, "method": "awq", "windows": 8, "seqlen": 256,
    "repeats": 3,
    "sizes": [{"size": "512x1376x4", "model": 31_000_000, "layer": 6_000_000, "imports": 300_000_000,
               "peaks": [390_000_000, 380_000_000, 370_000_000], "peak": 380_000_000},
              {"size": "512x1376x16", "model": 97_000_000, "layer": 6_000_000, "imports": 300_000_000,
               "peaks": [390_000_000, 385_000_000, 400_000_000], "peak": 390_000_000}],
    "whole": {"date": "2026-01-02", "commit": "def", "dirty": False,
              "size": "2048x5632x22", "vocabulary": 32000, "bpw": 3.0, "method": "rtn", "windows": 4, "seqlen": 128,
              "model": 2_000_000_000, "layers_at_kill": 11, "layers_kept": True, "quantized": 1_010, "weights": 1_000,
              "bpw_stored": 3.2, "not_quantized": 610, "same": None,
              "steps": [{"step": "create", "seconds": 9.5, "peak": 4_000_000_000},
                        {"step": "quantize, killed", "seconds": 99.0, "peak": 1_000_000_000}]},
}


def changed(**whole):
    bench = copy.deepcopy(BENCH)
    bench["whole"].update(whole)
    return bench


def test_what_the_work_took_is_the_peak_without_the_libraries():
    found = tables.sizes(BENCH)
    assert found.above_imports.tolist() == [80_000_000, 90_000_000]
    assert found.lowest.tolist() == [370_000_000, 385_000_000] and found.highest.tolist() == [390_000_000, 400_000_000]


@pytest.mark.parametrize(("peak", "within"), [(390_000_000, True), (392_000_001, False)])
def test_depth_may_take_one_layer_in_float32_more(peak, within):
    bench = copy.deepcopy(BENCH)
    bench["sizes"][1]["peak"] = peak
    row, = tables.depth(bench).itertuples()
    assert (row.added_layers, row.added_weights, row.allowed) == (12, 66_000_000, 12_000_000)
    assert row.added_peak == peak - 380_000_000 and bool(row.within) is within
    assert row.added_lowest == -5_000_000 and row.added_highest == 30_000_000


def test_a_step_is_within_the_size_of_the_model_and_four_gigabytes():
    assert tables.steps(BENCH).within.tolist() == [True, True]
    high = [{"step": "quantize, killed", "seconds": 1.0, "peak": 6_000_000_001}]
    found = tables.steps(changed(steps=high))
    assert found.within.tolist() == [False] and found.limit.tolist() == [6_000_000_000]


@pytest.mark.parametrize(("payload", "equal"), [(1010, True), (1011, False)])
def test_the_files_hold_what_the_bits_say_to_the_byte(payload, equal):
    row, = tables.exact_bytes(changed(quantized=payload)).itertuples()
    assert row.quantized_matrices == 400 and row.expected == 1010 and bool(row.equal) is equal


def test_conditions_name_machine_and_settings():
    found = tables.conditions(BENCH).set_index("what").value
    assert found["processor"] == "a processor" and found["calibration"] == "8 windows of 256 tokens"
    assert found["date"] == "2026-01-01" and found["commit"] == "abc" and "vocabulary 32000" in found["whole run"]
    assert found["whole run date"] == "2026-01-02" and found["whole run commit"] == "def"
    assert found["whole run calibration"] == "4 windows of 128 tokens" and found["whole run method"] == "rtn"
    assert (found["uncommitted changes"], found["whole run uncommitted changes"]) == ("True", "False")


NOTHING, SIZES = "", " --whole keep"  # what can be kept: a whole run is half an hour


@pytest.mark.parametrize(("text", "kept"), [
    ("", NOTHING), ("[]", NOTHING), ('{"kind": "cpu"}', NOTHING), ('{"kind": "cpu", "whole": null}', NOTHING),
    ('{"kind": "memory", "whole": {}}', NOTHING), (json.dumps({**BENCH, "kind": "cpu"}), NOTHING),
    (json.dumps({**BENCH, "whole": None}), NOTHING), (json.dumps({**BENCH, "whole": {}}), NOTHING),
    (json.dumps({**BENCH, "sizes": []}), SIZES),
    (json.dumps({key: value for key, value in BENCH.items() if key != "repeats"}), SIZES),
    (json.dumps({**BENCH, "whole": {"size": "2048x5632x22"}}), SIZES),
])
def test_another_file_is_refused(tmp_path, text, kept):
    path = tmp_path / "memory.json"
    path.write_text(text)
    with pytest.raises(SfmpError, match=r"memory\.json: expected .* found .* again: ") as error:
        tables.read_memory(path)
    assert str(error.value).endswith(f"again: `python -m sfmp.bench memory --out {path}{kept}`")


def test_figure_has_every_size_and_step(tmp_path):
    figure = plots_memory.memory(tables.sizes(BENCH), tables.steps(BENCH))
    figure.savefig(tmp_path / "memory.svg")
    left, right = figure.axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["512×1376×4", "512×1376×16"]
    assert [text.get_text() for text in right.get_yticklabels()] == ["create", "quantize, killed"]
    assert [bar.get_width() for bar in right.patches] == [4.0, 1.0]


def test_the_median_of_several_processes_counts(monkeypatch):
    real, told, orders = memory._output, iter(["10 70", "30 20", "20 30"]), []

    def output(order):
        if memory._MAKE in order:
            return real(order)
        orders.append(cli.parser().parse_args(order[3:]))
        return next(told)

    monkeypatch.setattr(memory, "_output", output)
    found = memory.measure("64x128x2", windows=2, seqlen=32, method="gptq", repeats=3)
    assert [(one.command, one.windows, one.seqlen, one.method) for one in orders] == [("quantize", 2, 32, "gptq")] * 3
    assert len({one.out for one in orders}) == 3
    assert found["peaks"] == (70, 20, 30) and found["peak"] == 30 and found["imports"] == 20
    assert found["layer"] == 2 * (2 * 64 * 64 + 2 * 64 * 64 + 3 * 64 * 128 + 2 * 64) < found["model"]


@pytest.mark.slow
def test_a_process_needs_more_than_its_imports():
    found = memory.measure("64x128x2", windows=2, seqlen=32, method="rtn", repeats=1)
    assert found["peak"] > found["imports"] > 50e6


@pytest.mark.parametrize(("code", "said"), [
    ("import sys; sys.exit('no such thing')", "found 1; its last lines say why:\nno such thing"),
    ("import os; os.kill(os.getpid(), 9)", "found -9; killed, perhaps for want of memory: choose a smaller size"),
])
def test_a_process_that_fails_says_why(tmp_path, monkeypatch, capsys, code, said):
    monkeypatch.setattr(memory, "_MAKE", code)
    path = tmp_path / "memory.json"
    path.write_text("an earlier result")
    assert bench_command(["memory", "--out", str(path), "--sizes", "64x128x1", "--whole", "none"]) == 2
    assert f"64x128x1: expected the process to end with 0, {said}" in capsys.readouterr().err
    assert path.read_text() == "an earlier result"


@pytest.mark.parametrize("dirty", [True, False])
def test_what_is_measured_is_what_the_tables_read(tmp_path, monkeypatch, dirty):
    asked = []

    def whole(*given, **options):
        assert json.loads((tmp_path / "memory.json.part").read_text())["sizes"]  # what was measured before it
        asked.append((given[:2], options))
        return {key: value for key, value in BENCH["whole"].items() if key not in ("date", "commit", "dirty")}

    monkeypatch.setattr(memory, "measure", lambda size, *_: BENCH["sizes"][0] | {"size": size})
    monkeypatch.setattr(whole_run, "measure", whole)
    monkeypatch.setattr(environment, "git_state", lambda: {"commit": "123", "dirty": dirty})
    path = tmp_path / "memory.json"
    assert bench_command(["memory", "--out", str(path), "--whole", "128x256x4", "--vocabulary", "99", "--again",
                          "--method", "gptq", "--windows", "3", "--seqlen", "33"]) == 0
    assert asked == [(("128x256x4", 99), {"method": "gptq", "windows": 3, "seqlen": 33, "again": True})]
    found = tables.read_memory(path)
    assert tables.sizes(found)["size"].tolist() == list(memory.SIZES)
    assert found["whole"]["commit"] == found["commit"] == "123" and found["whole"]["date"] == found["date"]
    assert found["whole"]["dirty"] is dirty and [one.name for one in tmp_path.iterdir()] == ["memory.json"]


def here(**changed):
    """The file of `BENCH` as if it had been measured on this machine."""
    return {**BENCH, "machine": environment.hardware(), "versions": environment.versions(), **changed}


@pytest.mark.parametrize("dated", [True, False])
def test_a_whole_run_is_kept_with_its_own_commit(tmp_path, monkeypatch, dated):
    path = tmp_path / "memory.json"
    undated = {key: value for key, value in BENCH["whole"].items() if key not in ("date", "commit", "dirty")}
    path.write_text(json.dumps(here(whole=BENCH["whole"] if dated else undated)))
    monkeypatch.setattr(memory, "measure", lambda size, *_: BENCH["sizes"][0])
    assert bench_command(["memory", "--out", str(path), "--sizes", "64x128x1", "--whole", "keep"]) == 0
    found = json.loads(path.read_text())
    assert found["sizes"] == BENCH["sizes"][:1] and found["commit"] != "abc"
    own = {} if dated else {"date": "2026-01-01", "commit": "abc", "dirty": True}
    assert found["whole"] == {**BENCH["whole"], **own}


@pytest.mark.parametrize(("before", "said"), [
    (None, "FileNotFoundError"), ([], "TypeError"), ({"whole": None}, "none in it"),
    ({"machine": {"cpu": "a processor"}}, "one of cpu a processor (here "),
    ({"versions": {"torch": "2"}}, "torch 2 (here "),
    ({"machine": "a processor"}, "TypeError"),
])
def test_a_whole_run_that_cannot_be_kept_is_refused(tmp_path, capsys, before, said):
    path = tmp_path / "memory.json"
    if before is not None:
        path.write_text(json.dumps(here(**before) if before else before))
    stood = path.read_bytes() if path.exists() else None
    assert bench_command(["memory", "--out", str(path), "--sizes", "64x128x1", "--whole", "keep"]) == 2
    told = capsys.readouterr().err
    assert "memory.json: expected a file with a whole run to keep, found" in told and said in told
    assert (path.read_bytes() if path.exists() else None) == stood


@pytest.mark.slow
def test_a_model_goes_the_whole_way(tmp_path):
    whole = whole_run.measure("128x256x32", 4096, tmp_path, method="rtn", windows=2, seqlen=32, tokens=2)
    assert [step["step"] for step in whole["steps"]] == ["create", "quantize, killed", "quantize, resumed", "generate"]
    assert min(step["peak"] for step in whole["steps"]) > 50e6
    assert 16 <= whole["layers_at_kill"] <= 32 and whole["layers_kept"] and whole["same"] is None
    assert tables.exact_bytes({"whole": whole}).equal.all()


def test_a_place_where_nothing_can_be_written_is_said_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert bench_command(["memory", "--out", str(tmp_path / "file" / "memory.json")]) == 2
    assert "memory.json: expected a folder" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--sizes", "--whole"])
@pytest.mark.parametrize("size", ["64x128", "64x128x0", "96x128x2", "64x128x2x2", "large"])
def test_sizes_that_make_no_model_are_refused_before_anything_is_measured(option, size, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        bench_command(["memory", "--out", str(tmp_path / "memory.json"), option, size])
    assert left.value.code == 2
    assert "expected hidden x intermediate x layers with hidden a multiple of 64, such as" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--repeats", "--windows", "--seqlen", "--vocabulary"])
def test_no_repeats_or_windows_are_refused(option, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        bench_command(["memory", "--out", str(tmp_path / "memory.json"), option, "0"])
    assert left.value.code == 2
    assert f"argument {option}: expected a number of at least 1, found '0'" in capsys.readouterr().err
    assert not (tmp_path / "memory.json").exists()


def test_a_step_that_fails_is_an_error():
    with pytest.raises(SfmpError, match="expected it to end with 0, found 3"):
        whole_run._step("fails", ["python3", "-c", "raise SystemExit(3)"])
