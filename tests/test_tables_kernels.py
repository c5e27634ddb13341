"""Tables and figures of the CPU bench, from a file whose every number is known."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from sfmp import plots_kernels
from sfmp import tables_kernels as tables
from sfmp.checks import SfmpError

BITS = (2, 2.5, 3, 3.5, 4)
SPEED = {"lut8": 1.25, "lut16": 1.5, "exact": 2.0}  # times the roof


def _row(name, family, cold, **facts):
    """Three rounds; the second is half as fast for everybody."""
    rounds = [cold, 2 * cold, cold]
    return {"name": name, "family": family, "weight_bytes": 1_000_000, "copies": 2, "error": 1e-3, **facts,
            "cold": rounds, "warm": [cold / 2] * 3}


def _product(shape):
    rows = []
    for bits in BITS:
        roof = 10 + 40 * bits
        rows += [_row(f"{mode} {bits:g}", "sfmp", roof * times, mode=mode, bits=bits, mixed=False, natural=False)
                 for mode, times in SPEED.items()]
        rows += [_row(f"read {bits:g} slow", "roof", roof * 1.1, mode="slow", bits=f"{bits:g}"),
                 _row(f"read {bits:g}", "roof", roof, mode="fast", bits=f"{bits:g}")]
    for mode, times in SPEED.items():
        rows += [_row(f"{mode} 3 mixed", "sfmp", 130 * times / 0.9, mode=mode, bits=3, mixed=True, natural=False),
                 _row(f"{mode} 3 natural", "sfmp", 130 * times * 0.96, mode=mode, bits=3, mixed=False, natural=True)]
    rows += [_row("torch bfloat16", "torch", 1000, mode="bfloat16", bits=16),
             _row("torch float32", "torch", 2000, mode="float32", bits=32),
             _row("onnxruntime acc4 2", "onnxruntime", 180, mode="acc4", bits=2),
             _row("onnxruntime lut 2", "onnxruntime", 135, mode="lut", bits=2),
             _row("openvino u4", "openvino", 400, mode="u4", bits=4)]
    return {"part": "product", "shape": list(shape), "rows": rows, "absent": {"openvino u2": "not installed"}}


def _batch(tokens):
    rows = [_row("torch bfloat16", "torch", 1000, mode="bfloat16", bits=16),
            _row("onnxruntime acc4 2", "onnxruntime", 500, mode="acc4", bits=2)]
    for mode, times in SPEED.items():
        for bits in (2, 3, 4):
            cold = 20 * bits * times * tokens
            rows += [_row(f"{mode} tables {bits}", "sfmp", cold, mode=mode, way="tables", bits=bits),
                     _row(f"{mode} panels {bits}", "sfmp", 1500, mode=mode, way="panels", bits=bits)]
    return {"part": "batch", "shape": [4096, 4096], "batch": tokens, "rows": rows}


def _width():
    rows = [_row("torch float32", "torch", 1000, mode="float32", bits=32)]
    for bits in (2, 3, 4):
        rows += [_row(f"width {width} {bits}", "plain", 400 * bits / width, mode=f"width {width}", bits=bits,
                      table_bytes=4096 // width * 2**width * 4) for width in (2, 4, 8)]
        rows.append(_row(f"exact {bits}", "sfmp", 50 * bits, mode="exact", bits=bits))
    return {"part": "width", "shape": [4096, 4096], "rows": rows}


def _decode(model):
    rows = []
    for weights, mode, bpw, seconds in (("torch fp32", None, None, 0.2), ("torch bf16", None, None, 0.1),
                                        ("sfmp lut16", "lut16", 3.0, 0.02)):
        rows.append({"model": model, "weights": weights, "mode": mode, "bpw": bpw, "random": model != "embedded",
                     "tokens_per_second": 1 / seconds, "prefill_tokens_per_second": 9.0,
                     "steps": [seconds, 3 * seconds]})
    return {"part": "decode", "model": model, "rows": rows}


def _accuracy():
    errors = {"exact": 1e-7, "lut16": 1e-5, "lut8": 1e-2, "torch": 1e-7}
    return {"part": "accuracy", "shape": [64, 64], "rows": [
        {"mode": mode, "bits": bits, "activations": kind, "dtype": dtype, "error": error}
        for mode, error in errors.items() for bits in (2, 3, 4) for kind in ("gaussian", "outlier")
        for dtype in ("float32", "bfloat16", "float16")]}


@pytest.fixture
def bench():
    return copy.deepcopy({
        "kind": "cpu", "date": "2026-01-01", "threads": 2, "rounds": {"product": 3}, "commit": "abc", "dirty": False,
        "machine": {"cpu": "some", "memory_bytes": 2**34}, "versions": {"torch": "2"}, "kernels": "yes: here",
        "parts": [_product((4096, 4096)), _product((14336, 4096)), *map(_batch, (8, 2)), _width(), _accuracy(),
                  _decode("embedded"), _decode("1.1B")]})


def test_ratios_are_medians_over_rounds(bench):
    frame = tables.products(bench).set_index(["shape", "name"]).loc["4096×4096"]
    assert frame.loc["lut8 2", "of_roof"] == pytest.approx(1 / 1.25), "against the faster way of reading"
    assert frame.loc["lut8 2", "times_bfloat16"] == pytest.approx(1000 / (90 * 1.25))
    assert frame.loc["lut8 2", "times_onnxruntime"] == pytest.approx(135 / (90 * 1.25)), "its faster kernel"
    assert np.isnan(frame.loc["lut8 3", "times_onnxruntime"]) and np.isnan(frame.loc["torch float32", "of_roof"])
    assert frame.loc["lut8 2", "gigabytes_per_second"] == pytest.approx(1e6 / (90 * 1.25) / 1e3)
    assert frame.loc["lut8 2", "warm_us"] == pytest.approx(90 * 1.25 / 2)


def test_what_was_never_counted_stays_empty(bench):
    for row in bench["parts"][0]["rows"]:
        if row["name"] in ("read 2", "read 2 slow", "onnxruntime lut 2", "lut8 4"):
            row["cold"] = [None] * 3
    frame = tables.products(bench).set_index(["shape", "name"]).loc["4096×4096"]
    assert np.isnan(frame.loc["lut8 2", "of_roof"]) and np.isnan(frame.loc["lut8 4", "times_bfloat16"])
    assert frame.loc["lut8 2", "times_onnxruntime"] == pytest.approx(180 / 112.5)
    assert frame.loc["lut8 4", "counted"] == 0


def test_the_committed_bench_may_be_quoted():
    committed = tables.read_bench(Path(__file__).parents[1] / "results/reference/cpu/bench.json")
    told = tables.conditions(committed).set_index("what").value
    assert told["quick"] == "no" and told["threads"] == "2" and "avx512" in told["kernels"]
    assert {part["part"] for part in committed["parts"]} == {"product", "batch", "width", "accuracy", "decode"}
    assert min(len(row["cold"]) for part in committed["parts"] for row in part["rows"] if "cold" in row) >= 9


def test_one_disturbed_candidate_does_not_move_the_others(bench):
    before = tables.products(bench).set_index(["shape", "name"]).times_bfloat16
    for row in bench["parts"][0]["rows"]:
        if row["name"] == "torch bfloat16":
            row["cold"][1] = None
        if row["name"] == "lut8 2":
            row["cold"][0] = None
    after = tables.products(bench).set_index(["shape", "name"]).times_bfloat16
    assert after.to_numpy() == pytest.approx(before.to_numpy())


def test_lines_through_times(bench):
    lines = tables.fits(tables.products(bench)).set_index(["shape", "mode"])
    line = lines.loc["14336×4096", "lut16"]
    assert (line.fixed_us, line.us_per_bit) == (pytest.approx(15), pytest.approx(60))
    assert line.r2 == pytest.approx(1) and line.mixed_speed == pytest.approx(0.9)
    for row in bench["parts"][0]["rows"]:
        if row["name"] == "exact 3":
            row["cold"] = [9 * value for value in row["cold"]]
    bent = tables.fits(tables.products(bench)).set_index(["shape", "mode"]).r2
    assert bent["4096×4096", "exact"] < 0.5 and bent["14336×4096", "exact"] > 0.99


def test_reordering_keeps_a_share_of_the_speed(bench):
    assert tables.reordering(bench).speed_kept.tolist() == [pytest.approx(0.96)] * 6


def test_crossovers(bench):
    frame = tables.crossovers(tables.batches(bench)).set_index(["mode", "bits"])
    assert frame.loc[("lut8", 2), "faster_than_bfloat16"] == 8 and not frame.loc[("lut8", 2), "crossed"]
    assert frame.loc[("exact", 4), "faster_than_bfloat16"] == 2 and frame.loc[("exact", 4), "crossed"]
    assert (frame.faster_than_panels == 8).all() and (frame.measured == 8).all()


def test_tokens_are_in_order_and_divide_the_time(bench):
    frame = tables.batches(bench)
    assert frame.tokens.is_monotonic_increasing
    assert frame[(frame.tokens == 8) & (frame.name == "lut8 tables 2")].us_per_token.item() == pytest.approx(50)


def test_decoding_compares_steps_of_the_same_round(bench):
    frame = tables.decoding(bench).set_index(["model", "weights"])
    assert frame.loc[("1.1B", "sfmp lut16"), "times_bf16"] == pytest.approx(5)
    assert frame.loc[("embedded", "sfmp lut16"), "times_fp32"] == pytest.approx(10)


def test_targets_say_what_was_missed(bench):
    products, batches = tables.products(bench), tables.batches(bench)
    frame = tables.targets(products, batches, tables.fits(products)).set_index(["target", "shape", "bits"])
    assert len(frame) == 2 * (4 * 3 + 2) + 3 + 6
    kept = frame.loc[("lut8 / torch bfloat16", "4096×4096", "2")]
    assert kept.required == 8.5 and kept.margin == pytest.approx(1000 / 112.5 / 8.5) and kept.margin > 1
    assert frame.loc[("share of the roof", "4096×4096", "3"), "margin"] == pytest.approx(0.8 / 0.85)
    assert frame.loc[("lut8 / onnxruntime", "4096×4096", "2"), "margin"] < 1


def test_absent_peers_and_conditions_are_told(bench):
    assert tables.absent_peers(bench).to_dict("records") == [{"name": "openvino u2", "why": "not installed"}]
    told = tables.conditions(bench).set_index("what").value
    assert told["processor"] == "some" and told["onnxruntime"] == "not installed" and told["commit"] == "abc"


@pytest.mark.parametrize(("change", "message"), [
    (lambda b: b.update(kind="gpu"), "expected the kind cpu, found 'gpu'"),
    (lambda b: b.pop("parts"), "expected a result of"),
    (lambda b: b["parts"][0].update(failed=["crash"]), "product failed"),
])
def test_a_file_that_is_no_bench_is_refused(bench, change, message, tmp_path):
    change(bench)
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(bench))
    with pytest.raises(SfmpError, match=message):
        tables.read_bench(path)


def test_a_file_that_is_not_there_or_lacks_a_part_is_refused(bench, tmp_path):
    with pytest.raises(SfmpError, match="expected a result of"):
        tables.read_bench(tmp_path / "none.json")
    bench["parts"] = bench["parts"][:1]
    with pytest.raises(SfmpError, match="expected the part decode, found \\['product'\\]"):
        tables.decoding(bench)


def test_figures_show_every_series(bench):
    products = tables.products(bench)
    figures = {
        "bits": plots_kernels.kernel_bits(products, tables.fits(products)),
        "peers": plots_kernels.kernel_peers(products),
        "batch": plots_kernels.kernel_batch(tables.batches(bench)),
        "accuracy": plots_kernels.kernel_accuracy(tables.accuracy(bench)),
        "width": plots_kernels.table_width(tables.widths(bench)),
        "decode": plots_kernels.decode_speed(tables.decoding(bench)),
    }
    axes = {name: figure.axes for name, figure in figures.items()}
    assert [len(found) for found in axes.values()] == [2, 2, 3, 2, 1, 2]
    assert all(ax.get_xlabel() for found in axes.values() for ax in found)
    named = {text.get_text() for text in axes["peers"][0].get_yticklabels()}
    assert {"lut8 2", "lut8 3 mixed", "ORT acc4 2", "OpenVINO u4", "torch bfloat16"} <= named
    assert not any("natural" in name or "read" in name for name in named)
    bars = [bar.get_width() for bar in axes["decode"][0].patches]
    assert bars == [pytest.approx(5), pytest.approx(10), pytest.approx(50)]


def test_figures_refuse_frames_that_lack_columns(bench):
    with pytest.raises(SfmpError, match="kernel_batch"):
        plots_kernels.kernel_batch(tables.products(bench))
