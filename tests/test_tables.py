"""Result files to tables: joins, controls, missing and contradictory files."""

import json

import numpy as np
import pandas as pd
import pytest

from sfmp import accounting, records, tables
from sfmp.checks import SfmpError

HEADER = """run model experiments method bpw group_size block_rows levels reorder scope objective salience
tasks seed"""
RUNS = [
    "m.fp16 m main fp16 - - - - - - - - yes 0",
    "m.rtn m main rtn 3 128 64 3 none global paper fisher yes 0",
    "m.sfmp m main,reorder sfmp-awq 3 128 64 2,3,4 both global paper fisher yes 0",
    "m.none m reorder sfmp-awq 3 128 64 2,3,4 none global paper fisher no 0",
]
PPL = {"m.fp16": 8.0, "m.rtn": 16.0, "m.sfmp": 10.0, "m.none": 12.0}


@pytest.fixture
def design(tmp_path):
    path = tmp_path / "runs.tsv"
    path.write_text("\n".join("\t".join(row) for row in (r.split() for r in [HEADER, *RUNS])) + "\n")
    return path


@pytest.fixture
def folders(tmp_path):
    for kind in ("eval", "quantized"):
        (tmp_path / kind).mkdir()
    for run, ppl in PPL.items():
        scores = {"acc": 0.5, "acc_stderr": 0.03, "acc_norm": 0.25, "acc_norm_stderr": 0.04, "n": 300}
        other = {**scores, "acc": 0.8 - ppl / 100, "acc_stderr": 0.04}
        record = {
            "run": run,
            "perplexity": ppl,
            "tasks": {} if run == "m.none" else {"a": scores, "b": other},
        }
        (tmp_path / "eval" / f"{run}.json").write_text(json.dumps(record))
        if run != "m.fp16":
            record = {
                "run": run,
                "bpw": 2.999,
                "wbits": 2.749,
                "bpw_stored": 3.1,
                "bpw_tolerance": 0.01,
                "model_bytes": 5,
            }
            (tmp_path / "quantized" / f"{run}.json").write_text(json.dumps(record))
    return tmp_path / "eval", tmp_path / "quantized"


def test_results_join_design_evaluation_and_record(design, folders):
    frame = records.load_results(design, *folders).set_index("run")
    assert list(frame.index) == list(PPL)  # design order, not file order
    assert frame.perplexity_ratio.to_dict() == {run: ppl / 8.0 for run, ppl in PPL.items()}
    assert frame.bpw["m.sfmp"] == 3 and frame.bpw_achieved["m.sfmp"] == 2.999
    assert np.isnan(frame.bpw["m.fp16"]) and np.isnan(frame.bpw_stored["m.fp16"])


def test_accuracy_is_the_mean_over_tasks_with_its_standard_error(design, folders):
    frame = records.load_results(design, folders).set_index("run")
    assert frame.acc["m.rtn"] == pytest.approx((0.5 + 0.64) / 2)
    assert frame.acc_stderr["m.rtn"] == pytest.approx(np.hypot(0.03, 0.04) / 2)
    assert frame.retention["m.rtn"] == pytest.approx(0.57 / 0.61)
    assert np.isnan(frame.acc["m.none"])


def test_order_of_files_does_not_matter_and_manifests_are_ignored(design, folders):
    (folders[0] / "m.rtn.json.manifest.json").write_text("{}")
    files = records.json_files({"a": list(folders[0].iterdir()), "b": folders[1]})
    pd.testing.assert_frame_equal(
        records.load_results(design, files[::-1]), records.load_results(design, *folders)
    )
    assert not any("manifest" in path.name for path in files)


def test_runs_without_evaluation_are_left_out(design, folders):
    (folders[0] / "m.rtn.json").unlink()
    assert "m.rtn" not in set(records.load_results(design, *folders).run)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("stranger.json", '{"run": "x", "perplexity": 1}', "not in the design"),
        ("broken.json", '{"run": ', "expected a JSON result"),
        ("norun.json", '{"perplexity": 1}', "key 'run'"),
        ("second.json", '{"run": "m.rtn", "perplexity": 99}', "differ"),
    ],
)
def test_bad_files_are_named(design, folders, name, text, message):
    (folders[0] / name).write_text(text)
    with pytest.raises(SfmpError, match=message):
        records.load_results(design, *folders)


def test_a_run_listed_twice_is_an_error(design):
    design.write_text(design.read_text() + "\t".join(RUNS[0].split()) + "\n")
    with pytest.raises(SfmpError, match="twice"):
        records.read_runs(design)


def paper(**row):
    row = {
        "id": "x",
        "model": "m",
        "method": "sfmp-awq",
        "bpw": "3",
        "metric": "perplexity",
        "value": 9.5,
        "unit": "",
        **row,
    }
    return pd.DataFrame([row])


def test_main_table_has_controls_and_paper_columns(design, folders):
    results = records.load_results(design, *folders)
    table = tables.main_table(results, paper()).set_index("run")
    assert set(table.index) == {"m.fp16", "m.rtn", "m.sfmp"}  # the reorder-only run is not of this experiment
    assert table.delta_perplexity["m.sfmp"] == pytest.approx(0.5)
    assert np.isnan(table.paper_perplexity["m.rtn"])
    assert table.manifest["m.rtn"] == "m.rtn.json.manifest.json"


def test_percent_of_the_paper_is_compared_with_our_fraction(design, folders):
    results = records.load_results(design, *folders)
    table = tables.main_table(
        results, paper(metric="acc", method="fp16", bpw="-", value=75.0, unit="%")
    ).set_index("run")
    assert table.paper_acc["m.fp16"] == 0.75 and table.delta_acc["m.fp16"] == pytest.approx(0.61 - 0.75)


def test_ablation_selects_one_experiment_and_drops_the_control(design, folders):
    table = tables.ablation_table(records.load_results(design, *folders), "reorder")
    assert table.reorder.tolist() == ["both", "none"]
    assert table.fp_perplexity.tolist() == [8.0, 8.0]
    with pytest.raises(SfmpError, match="unknown"):
        tables.ablation_table(records.load_results(design, *folders), "weather")


def test_experiments_match_whole_words():
    frame = pd.DataFrame({"run": ["a", "b"], "experiments": ["group_size", "levels, group"]})
    assert tables.select(frame, "group").run.tolist() == ["b"]


def test_markdown_escapes_and_rounds():
    frame = pd.DataFrame({"a": ["x|y"], "b": [1234.5678], "c": [None], "d": [7]})
    assert tables.to_markdown(frame).splitlines()[-1] == "| x\\|y | 1235 | – | 7 |"


def test_checkpoint_bytes_are_counted_from_the_headers(tmp_path):
    from safetensors.numpy import save_file

    rows, columns, groups = 6, 40, 2
    tensors = {
        "layer.planes": np.zeros(30, np.int32),
        "layer.alpha": np.zeros((groups, rows), np.float16),
        "layer.beta": np.zeros((groups, rows), np.float16),
        "layer.block_bits": np.zeros((groups, 2), np.uint8),
        "layer.row_perm": np.zeros(rows, np.uint16),
        "layer.col_perm": np.zeros(columns, np.uint16),
        "layer.bias": np.zeros(rows, np.float32),
        "norm.weight": np.zeros(7, np.float16),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    row = accounting.checkpoint_table(tmp_path).iloc[0]
    assert (row.out_features, row.in_features, row.weights) == (rows, columns, 240)
    assert (row.planes, row.scales, row.overhead) == (120, 2 * 2 * groups * rows, 4 + 2 * (rows + columns))
    assert row.bpw_stored == pytest.approx(8 * (120 + 48 + 96) / 240)
    assert accounting.tensor_sizes(tmp_path).bytes.sum() == sum(t.nbytes for t in tensors.values())
    with pytest.raises(SfmpError, match="safetensors"):
        accounting.checkpoint_table(tmp_path / "nothing")
