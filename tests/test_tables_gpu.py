"""Tables, targets and figures of GPU evidence: from made-up files whose every number is known, and from none."""

import copy
import json
from pathlib import Path

import gpu_evidence_case as case
import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402

from sfmp import claims, gpu_evidence, gpu_targets, plots_gpu, stage_results  # noqa: E402
from sfmp import tables_gpu as tables  # noqa: E402
from sfmp.checks import SfmpError  # noqa: E402
from sfmp.provenance import Run  # noqa: E402
from sfmp.tables import read_paper_values  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SMALL = "4096×4096"


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close("all")


@pytest.fixture
def evidence(tmp_path):
    return gpu_evidence.read_evidence(case.write_files(tmp_path))


def all_tables(evidence):
    products, batches = tables.products(evidence), tables.batches(evidence)
    errors, decoded, host = tables.accuracy(evidence), tables.decoding(evidence), tables.host(evidence)
    conditions = gpu_evidence.conditions(evidence)
    return {
        "conditions": conditions, "products": products, "fits": tables.fits(products),
        "layouts": tables.layouts(products), "reordering": tables.reordering(products), "batches": batches,
        "crossovers": tables.crossovers(batches), "widths": tables.widths(evidence), "accuracy": errors, "host": host,
        "decoding": decoded, "targets": gpu_targets.targets(products, errors, decoded, host, conditions)}


def named(frame, *keys):
    return frame.set_index(list(keys))


def test_without_evidence_tables_have_columns_and_nothing_else(evidence):
    full, empty = all_tables(evidence), all_tables({})
    targets = empty.pop("targets")
    for name, frame in empty.items():
        assert frame.empty and list(frame.columns) == list(full[name].columns), name
    assert targets[["measured", "margin", "device"]].isna().all().all() and targets.required.notna().all()
    assert len(targets) == len(full["targets"])
    why = gpu_evidence.not_measured({}).set_index("file").why
    assert "sfmp.bench kernels" in why["kernels"] and "sfmp.bench decode" in why["decode"]


def test_nothing_is_committed_that_was_made_up():
    for path in (ROOT / "results").rglob("*.json"):
        assert "SYNTHETIC" not in path.read_text("utf-8"), path


def test_times_are_medians_and_ratios_are_of_rounds(evidence):
    rows = named(tables.products(evidence), "shape", "name").loc[SMALL]
    dense, size = 2 * 4096**2 / case.COPY_GBPS / 1e3, case.bytes_of((4096, 4096), 2)
    two = rows.loc["mma 2 blocks fused"]
    time = case.FIXED_US + size / case.COPY_GBPS / 1e3
    assert two.us == pytest.approx(time) and two.samples == 3 and two.us_p90 > time
    assert two.times_fp16 == pytest.approx(dense / time)
    assert two.times_int4 == pytest.approx(dense / 3 / time), "against the faster of two peers with 4 bits"
    assert two.of_copy == pytest.approx(size / time / 1e3 / case.COPY_GBPS)
    assert two.of_predicted == pytest.approx(1 / 0.9)
    assert rows.loc["torch float16", "times_fp16"] == pytest.approx(1)
    assert np.isnan(rows.loc["torch float16", "predicted_us"])


def test_a_disturbed_round_does_not_move_a_ratio(evidence):
    before = named(tables.products(evidence), "shape", "name").times_fp16
    for row in evidence["kernels"]["parts"][0]["rows"]:
        row["samples_us"][2] *= 5 if row["name"] == "torch float16" else 1
    after = named(tables.products(evidence), "shape", "name").times_fp16
    assert after[SMALL]["mma 2 blocks fused"] == pytest.approx(before[SMALL]["mma 2 blocks fused"])


def test_lines_and_mixtures(evidence):
    products = tables.products(evidence)
    lines = named(tables.fits(products), "shape", "mode", "dtype")
    line = lines.loc[(SMALL, "mma", "float16")]
    assert line.mixed_speed == pytest.approx(1 / 1.1), "3 bits take a tenth longer than the line"
    assert 0.5 < line.r2 < 0.99
    straight = products[~((products.bits == 3) & (products["layout"] == "blocks"))]
    line = named(tables.fits(straight), "shape", "mode").loc[("28672×8192", "lut")]
    assert line.r2 == pytest.approx(1) and line.mixed_speed == pytest.approx(1)
    assert line.fixed_us == pytest.approx(case.FIXED_US + 2 * case.bytes_of((28672, 8192), 0) / case.COPY_GBPS / 1e3)


def test_column_groups_and_reordering(evidence):
    products = tables.products(evidence)
    layouts = tables.layouts(products)
    assert len(layouts) == 8 and layouts.columns_over_blocks.to_numpy() == pytest.approx(1.4)
    found = named(tables.reordering(products), "shape", "mode", "gather")
    kept, used = found.speed_kept, found.used[SMALL]
    assert used["mma", "fused"] and not used["mma", "own kernel"] and not used["lut", "unfused"]
    assert kept[SMALL, "lut", "fused"] == pytest.approx(1 / 1.1)
    assert kept[SMALL, "mma", "unfused"] == pytest.approx(1 / 1.5)
    assert kept[SMALL, "mma", "own kernel"] == pytest.approx(1 / 1.3)
    assert len(kept) == 4 * (2 + 3), "bfloat16 has no row in natural order"


def test_where_nothing_is_fused_the_kernel_of_its_own_counts(evidence):
    products = tables.products(evidence)
    assert set(tables.ours(products).gather) == {"fused"}
    large = products["shape"] == "4096×14336"
    products.loc[large & (products["mode"] == "mma") & (products.gather == "fused"), "gather"] = "own kernel"
    kept = named(tables.ours(products), "shape", "mode").gather
    assert set(kept["4096×14336", "mma"]) == {"own kernel"} and set(kept["4096×14336", "lut"]) == {"fused"}


def test_crossovers(evidence):
    found = named(tables.crossovers(tables.batches(evidence)), "way")
    assert found.loc["lut", "faster_than_fp16"] == 2 and found.loc["lut", "crossed"]
    assert found.loc["mma", "fastest_way"] == "1 2 4 8 16" and not found.loc["mma", "crossed"]
    assert found.loc["dequantize", "faster_than_fp16"] == 0 and (found.measured == 16).all()
    assert not found.loc["dequantize", "crossed"], "what was never ahead loses no lead"
    per_token = named(tables.batches(evidence), "way", "tokens").us_per_token
    assert per_token["mma", 8] == pytest.approx(per_token["mma", 1] / 8)


def test_widths_decoding_and_host(evidence):
    widths = tables.widths(evidence)
    best = widths.loc[widths.us.idxmin()]
    assert (best.table_width, best.table_bytes) == (6, 8192) and len(widths) == 8
    rows = named(tables.decoding(evidence), "weights", "bpw", "fused", "graph")
    assert rows.loc[("sfmp mma", 3.0, True, True), "times_fp16"] == pytest.approx(3)
    assert rows.times_fp16[~rows.index.get_level_values("graph").astype(bool)].isna().all(), "graphs against graphs"
    assert tables.host(evidence).set_index("call").host_us["kernels_numba.matmul lut"] == 8


def test_targets_say_what_was_missed(evidence):
    found = named(all_tables(evidence)["targets"], "target", "of")
    assert (found.device == "NVIDIA H200").all()
    share = found.loc[(gpu_targets.SHARE, SMALL)]
    size = case.bytes_of((4096, 4096), 3)
    time = 1.1 * (case.FIXED_US + size / case.COPY_GBPS / 1e3)
    assert share.measured == pytest.approx(size / time / 1e3 / case.COPY_GBPS) and share.required == 0.40
    assert share.margin == pytest.approx(share.measured / 0.40)
    assert found.loc[(gpu_targets.LUT, "28672×8192"), "required"] == 3.0
    assert found.loc[(gpu_targets.DECODE, "Llama-3.1-8B"), "measured"] == pytest.approx(3.0), "2.5 bits are not 3"
    assert found.loc[(gpu_targets.ERROR, "lut"), "margin"] == pytest.approx(5)
    assert found.loc[(gpu_targets.HOST, "mma"), "margin"] == pytest.approx(1.25)
    assert found.loc[(gpu_targets.HOST, "lut"), "margin"] < 1
    fours = found.loc[(gpu_targets.INT4[4][0], "28672×8192")]
    assert fours.margin == pytest.approx(fours.measured) and fours.required == 1


def test_targets_need_finite_results_and_the_whole_model(evidence):
    evidence["kernels"]["parts"][0]["rows"][3]["error"] = None  # of "mma 2 blocks fused"
    evidence["decode"]["parts"][0]["rows"][5].update(layers=2)  # the fastest at 3 bits
    found = named(all_tables(evidence)["targets"], "target", "of")
    assert evidence["kernels"]["parts"][0]["rows"][3]["mode"] == "mma"
    assert found.loc[(gpu_targets.ERROR, "mma"), "margin"] == 0 < found.loc[(gpu_targets.ERROR, "lut"), "margin"]
    assert found.loc[(gpu_targets.DECODE, "Llama-3.1-8B"), "measured"] == pytest.approx(2.5)
    for row in evidence["decode"]["parts"][0]["rows"]:
        row.update(layers=2)
    assert np.isnan(named(all_tables(evidence)["targets"], "target").measured[gpu_targets.DECODE])


def test_what_failed_takes_nothing_else_along(evidence):
    before = tables.products(evidence)
    evidence["kernels"]["parts"][0]["failed"] = ["lut 8 blocks: out of memory"]
    pd.testing.assert_frame_equal(tables.products(evidence), before)
    assert any("out of memory" in why for why in gpu_evidence.not_measured(evidence).why)


def test_predictions_are_those_of_the_design():
    found = named(gpu_targets.predictions(), "shape", "bits")
    assert found.loc[("14336×4096", 3.0), "predicted_us"] == pytest.approx(8.4, abs=0.05)
    assert found.loc[("28672×8192", 4.0), "predicted_times_fp16"] == pytest.approx(3.6, abs=0.05)
    assert all("predicted" in name or name in ("packed_bytes", "assumed_copy_gbps") for name in found.columns)


@pytest.mark.parametrize(("change", "message"), [
    (lambda bench: bench.pop("parts"), "expected a result of"),
    (lambda bench: bench["device"].update(capability=None, name="CPU"), "expected times of a GPU, found device 'CPU'"),
    (lambda bench: bench.update(device=None), "expected a result of"),
    (lambda bench: bench["parts"][0].pop("rows"), "expected rows in every part"),
])
def test_files_that_are_no_evidence_are_refused(change, message, tmp_path):
    bench = copy.deepcopy(case.kernels())
    change(bench)
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(bench))
    with pytest.raises(SfmpError, match=message):
        gpu_evidence.read_evidence({"kernels": path})


def test_what_failed_is_told_and_left_out(evidence):
    why = gpu_evidence.not_measured(evidence).set_index("what").why
    assert why["gemlite 4"] == "gemlite not installed" and why["product 6144×4096"] == "not begun"
    assert any("OutOfMemory" in reason for reason in why)
    assert "6144×4096" not in set(tables.products(evidence)["shape"])
    told = named(gpu_evidence.conditions(evidence), "file", "what").value
    assert told["kernels", "device"] == "NVIDIA H200" and told["kernels", "quick"] == "no"
    assert told["kernels", "gemlite"] == "not installed"


def test_a_notebook_reads_what_is_committed_or_what_it_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert stage_results.gpu_evidence(Run("e4_gpu", {}, 0)) == {}
    committed, given = tmp_path / "results/reference/gpu", tmp_path / "given"
    for folder in (committed, given):
        folder.mkdir(parents=True)
        case.write_files(folder)
    assert set(stage_results.gpu_evidence(Run("e4_gpu", {}, 0))) == {"kernels", "decode"}
    run = Run("e4_gpu", {"inputs": {"gpu_decode": str(given / "decode.json")}}, 0)
    assert set(stage_results.gpu_evidence(run)) == {"decode"}, "not half from here and half from there"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured_again(capsys):
    assert gpu_evidence.measure_here() == {}
    assert "not measured on this machine" in capsys.readouterr().out


def texts(figure):
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def test_figures_with_evidence_show_every_series(evidence):
    found = all_tables(evidence)
    bits = plots_gpu.gpu_bits(gpu_targets.predictions(), found["products"], found["fits"])
    assert len(bits.axes) == 4 and "not measured" not in texts(bits)
    measured = [line for line in bits.axes[0].get_lines() if len(line.get_xdata()) == 5 and line.get_marker() != "None"]
    assert len(measured) == 2, "mma and lut, float16 only"
    whole = plots_gpu.gpu_kernels(found["products"], found["batches"], found["widths"], found["decoding"])
    assert "not measured" not in texts(whole)
    peers, tokens, widths, decode = whole.axes
    names = [text.get_text() for text in peers.get_yticklabels()]
    assert names[0] == "torch float16" and "triton 4" in names and not any("natural" in name for name in names)
    assert not any("bfloat16" in name for name in names if name.startswith(("mma", "lut")))
    assert [bar.get_width() for bar in decode.patches] == pytest.approx([200, 500, 600, 900, 300]), "under graphs"
    labels = {line.get_label() for line in tokens.get_lines()}
    assert {"lut (look-ups)", "mma (tensor cores)", "torch float16"} <= labels
    assert len(widths.get_lines()) == 2 and "random weights" in decode.get_title()


def test_figures_without_evidence_say_so_and_draw_no_times():
    found = all_tables({})
    bits = plots_gpu.gpu_bits(gpu_targets.predictions(), found["products"], found["fits"])
    assert texts(bits).count("not measured") == 4
    assert all(line.get_label() == "prediction, not measured" for ax in bits.axes for line in ax.get_lines())
    whole = plots_gpu.gpu_kernels(found["products"], found["batches"], found["widths"], found["decoding"])
    assert texts(whole) == ["not measured"] * 4 and not any(ax.lines or ax.patches for ax in whole.axes)


def judged(evidence):
    found = {f"e4_gpu_{name}": frame for name, frame in all_tables(evidence).items()}
    found["e1_main"] = pd.DataFrame({"model": ["m", "m"], "method": ["fp16", "rtn"],
                                                      "perplexity": [8.0, 9.0], "bpw": [np.nan, 3.0]})
    paper = read_paper_values(ROOT / "config" / "paper_values.tsv")
    return claims.evaluate(ROOT / "config" / "claims.tsv", found, paper).set_index("claim")


GPU_CLAIMS = ["C28", "C29", "C30", "C31", "C35", *(f"C{number}" for number in range(95, 104))]


def test_claims_about_a_gpu_are_not_run_without_evidence():
    verdicts = judged({}).verdict[GPU_CLAIMS]
    assert (verdicts == f"not-run ({claims.NO_GPU_EVIDENCE})").all()


def test_claims_about_a_gpu_are_judged_on_evidence(evidence):
    ledger = judged(evidence)
    assert not ledger.verdict[GPU_CLAIMS].str.startswith("not-run").any()
    expected = {"C28": "replicated", "C29": "not-replicated", "C31": "not-replicated", "C35": "replicated",
                "C95": "replicated", "C97": "not-replicated", "C98": "replicated", "C102": "replicated"}
    assert ledger.verdict[list(expected)].to_dict() == expected
    evidence["kernels"]["device"]["name"] = "NVIDIA A100"
    elsewhere = judged(evidence).verdict
    assert elsewhere["C96"].startswith("not-run (e4_gpu_targets has no margin") and elsewhere["C98"] == "replicated"
    assert elsewhere["C102"] == "replicated", "errors are asked of any device"


def test_claims_stay_open_where_values_are_missing_and_after_quick_runs(evidence):
    first = evidence["kernels"]["parts"][0]
    first["rows"] = [row for row in first["rows"] if row["name"] != "torch float16"]
    ledger = judged(evidence).verdict
    assert ledger["C96"] == "not-run (1 of 4 values were not measured)" and ledger["C95"] == "replicated"
    evidence["kernels"]["settings"]["rounds"] = 5
    told = named(gpu_evidence.conditions(evidence), "file", "what").value
    assert told["kernels", "quick"].startswith("yes")
    assert (judged(evidence).verdict[GPU_CLAIMS] == f"not-run ({claims.QUICK_GPU_EVIDENCE})").all()


def test_kernels_alone_leave_decoding_open(evidence):
    del evidence["decode"]
    verdicts = judged(evidence).verdict
    assert verdicts["C98"].startswith("not-run (") and verdicts["C95"] == "replicated"
