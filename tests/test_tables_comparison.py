"""Tables of the full comparison on results whose answers are known: bytes, budgets reached, units, quantizers."""

import json

import pandas as pd
import pytest

from sfmp import records, tables
from sfmp import tables_comparison as comparison
from sfmp.checks import SfmpError

HEADER = "run model experiments method bpw budget group_size block_rows reorder objective"
RUNS = [
    "m.fp16 m main fp16 - - - - - -",
    "m.rtn m main,granularity,quantizer rtn 3 bpw 32 64 none paper",
    "m.bit m main bitstack 3 stored - - - -",
    "m.scale m main scalebits 3 bpw 128 64 - -",
    "m.sfmp m main,granularity,quantizer sfmp-rtn 3 bpw 128 64 both paper",
    "m.measured m main sfmp-rtn 3 bpw 128 64 both measured",
    "m.fine m main sfmp-rtn 2.5 bpw 128 64 both paper",
    "m.stored m bytes sfmp-rtn 3 stored 128 64 both paper",
    "m.none m granularity sfmp-rtn 3 bpw 128 64 none paper",
    "m.rows m granularity sfmp-rtn 3 bpw 128 768 both paper",
    "m.small m granularity sfmp-rtn 3 bpw 64 64 both paper",
    "m.element m granularity element 3 bpw 128 - - -",
    "m.layer m granularity layer_wise 3 bpw 128 - - -",
]
# 800 weights in 5 matrices: a budget of 3 bits is 300 bytes, and 5 bytes may be spent on bit-widths
STORED = {"m.rtn": 305, "m.bit": 290, "m.scale": 306, "m.sfmp": 312, "m.stored": 300}


@pytest.fixture
def results(tmp_path):
    (tmp_path / "runs.tsv").write_text("\n".join("\t".join(row.split()) for row in [HEADER, *RUNS]) + "\n")
    for number, row in enumerate(RUNS):
        run, method = row.split()[0], row.split()[3]
        files = {"eval": {"run": run, "perplexity": 8.0 + number}}
        if method != "fp16":
            stored = STORED.get(run, 300)
            files["quantized"] = {
                "run": run, "bpw": 2.9 if method == "bitstack" else 3.0, "bpw_tolerance": 0.01,
                "quantized_weights": 800, "matrices": 5, "stored_bytes": stored, "bpw_bytes": stored / 100,
                "knobs": "few" if method == "bitstack" else "",
            }
            if method == "bitstack":
                files["quantized"]["reached"] = False
        for kind, record in files.items():
            (tmp_path / kind).mkdir(exist_ok=True)
            (tmp_path / kind / f"{run}.json").write_text(json.dumps(record))
    return records.load_results(tmp_path / "runs.tsv", tmp_path / "eval", tmp_path / "quantized")


def test_bytes_table_holds_every_method_at_the_budgets_that_were_met_in_bytes(results):
    table = comparison.bytes_table(results)
    assert table.run.tolist() == ["m.fp16", "m.rtn", "m.bit", "m.scale", "m.sfmp", "m.stored"]  # controls first
    table = table.set_index("run")
    assert table.within_budget.drop("m.fp16").to_dict() == {
        "m.rtn": True, "m.bit": True, "m.scale": False, "m.sfmp": False, "m.stored": True
    }
    assert table.budget_bytes["m.rtn"] == 300 and table.within_budget["m.fp16"] is None
    assert table.reached["m.bit"] == "2.90 of 3.00" and table.knobs["m.bit"] == "few"


def test_side_bits_are_what_bytes_count_beyond_codes_and_scales(results):
    table = comparison.side_bits(comparison.bytes_table(results)).set_index("method")
    assert table.index.tolist() == ["rtn", "bitstack", "scalebits", "sfmp-rtn"]
    assert table.most["rtn"] == pytest.approx(0.05)
    assert table.least["sfmp-rtn"] == pytest.approx(0) and table.most["sfmp-rtn"] == pytest.approx(0.12)


def test_without_a_budget_in_bytes_the_table_is_empty(results):
    assert comparison.bytes_table(results.drop(columns="budget")).empty


def test_permutations_cost_what_the_shapes_say():
    assert comparison.permutation_bits({(2, 6): 1}, 2) == 16 * 8 / 12
    assert comparison.permutation_bits({(2, 6): 1, (4, 4): 3}, 1) == 8 * (8 + 24) / (12 + 48)
    assert comparison.permutation_bits(index_bytes=4) == pytest.approx(0.0120, abs=5e-5)  # METHOD 1.5


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"bpw": 3.0, "bpw_achieved": 2.998, "bpw_tolerance": 0.02}, "yes"),
        ({"bpw": 3.0, "bpw_achieved": 2.97, "bpw_tolerance": 0.05, "reached": True}, "2.97 of 3.00"),
        ({"bpw": 3.0, "bpw_achieved": 2.99, "bpw_tolerance": 0.001}, "2.99 of 3.00"),
        ({"bpw": 3.0, "bpw_achieved": 2.9996, "reached": False}, "2.9996 of 3.0000"),
        ({"bpw": 3.0, "bpw_achieved": 2.9996, "reached": True}, "yes"),
        ({"bpw": 3.0, "bpw_achieved": 2.9, "bpw_bytes": 3.0, "budget": "stored", "bpw_tolerance": 0.0}, "yes"),
        ({"bpw": float("nan"), "method": "fp16"}, "-"),
    ],
)
def test_reached_says_by_how_much_a_budget_was_missed(row, text):
    assert records.reached_text(row) == text


def test_main_table_is_in_the_order_of_methods(results):
    paper = pd.DataFrame(columns=["id", "model", "method", "bpw", "metric", "value", "unit"])
    table = tables.main_table(results, paper)
    assert table.method.tolist() == ["fp16", "rtn", "bitstack", "scalebits", *["sfmp-rtn"] * 3]
    assert table.method_order.is_monotonic_increasing
    assert {"reached", "bpw_bytes", "stored_bytes", "knobs"} <= set(table)


def test_every_method_of_the_design_has_its_place():
    from pathlib import Path

    runs = records.read_runs(Path(__file__).resolve().parents[1] / "config" / "runs.tsv")
    assert set(runs.method) <= set(records.METHODS)


def test_granularity_goes_from_the_weight_to_the_model(results):
    table = comparison.granularity_table(results)
    assert table.drop_duplicates("unit").unit.tolist() == [
        "element", "64×64", "64×128", "all rows×128", "matrix", "model"
    ]
    assert table[table.unit == "64×128"].reorder.tolist() == ["both", "none"]
    assert table.place.tolist() == [1, 2, 3, 3, 4, 5, 6] and (table.fp_perplexity == 8).all()


def test_quantizer_table_splits_methods(results):
    table = comparison.quantizer_table(results)
    assert table[["quantizer", "allocation"]].to_numpy().tolist() == [["rtn", "uniform"], ["rtn", "mixed"]]
    with pytest.raises(SfmpError, match="quantizer"):
        comparison.quantizer_table(results[results.method == "fp16"])
