"""A run of a rival: settings and knobs reach the method, checkpoints load, records count what was saved."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sfmp import baselines, stage_rivals
from sfmp.accounting import tensor_sizes
from sfmp.cost import CostRecord
from sfmp.provenance import start
from sfmp.salience import fisher_salience, random_salience, save_salience

REDUCED = {
    "slim_llm": {"n_windows": 2, "sba_windows": 1, "sqc_steps": 1},
    "amq": {"n_windows": 1, "n_tokens": 16, "n_initial": 24, "iterations": 1, "per_iteration": 2, "population": 8,
            "generations": 2, "subset_population": 8, "subset_generations": 2},
    "bitstack": {"rank": 1, "n_levels": 4, "n_windows": 2, "sort_windows": 1},
    "scalebits": {"rounds": 2, "refreshes": 1, "refresh_windows": 1},
    "efficient_qat": {"n_windows": 2, "epochs": 1, "e2e_windows": 2, "accumulation": 2},
    "sfmp-efficient_qat": {"n_windows": 2, "epochs": 1, "e2e_windows": 2, "accumulation": 2},
    "layer_wise": {},
    "element": {},
}
SETTINGS = {
    "slim_llm": {"bpw": 4.0, "group_size": 32},
    "bitstack": {"bpw": 4.0},
    "efficient_qat": {"bpw": 3.0, "group_size": 32},
    "scalebits": {"bpw": 3.6, "group_size": 32, "block_rows": 16},
    "sfmp-efficient_qat": {"bpw": 3.6, "group_size": 32, "block_rows": 16},
}
METHODS = list(REDUCED)


@pytest.fixture
def windows():
    return torch.randint(0, 128, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return start("11_rivals", {"out": {}, "inputs": {}})


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))


@pytest.mark.parametrize("method", METHODS)
def test_a_rival_goes_from_a_row_to_a_checkpoint_and_a_record(method, tiny_llama, windows, job, tokenizer, tmp_path):
    settings = SETTINGS.get(method, {"bpw": 3.6, "group_size": 32})
    weights = sum(w.numel() for name, w in tiny_llama.named_parameters() if name.endswith("proj.weight"))
    outcome = stage_rivals.quantize(job, tiny_llama, windows, method, settings, REDUCED[method])
    folder = stage_rivals.save(outcome, tokenizer, tmp_path / "model")
    assert not list(tmp_path.glob(".model*"))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.allclose(loaded(windows).logits, tiny_llama(windows).logits, atol=1e-5)

    record = stage_rivals.rival_record(folder, outcome, "run", method, settings["bpw"])
    assert json.loads(json.dumps(record)) == record
    assert (record["run"], record["target"], record["matrices"]) == ("run", settings["bpw"], 14)
    assert record["quantized_weights"] == weights
    assert record["bpw_bytes"] == 8 * record["stored_bytes"] / weights >= record["bpw"] - 1e-9
    assert record["bpw"] <= settings["bpw"] + 1e-9
    assert record["model_bytes"] == tensor_sizes(folder).bytes.sum()
    assert json.loads(record["knobs"]).items() >= {k: v for k, v in REDUCED[method].items() if k != "n_windows"}.items()
    if method == "slim_llm":  # of the matrices only down_proj has enough groups of 32
        assert json.loads(record["knobs"])["with_choice"] == "2/14"
    if method == "scalebits":  # a block of 16 x 32 by one level
        assert record["bpw_tolerance"] == pytest.approx(16 * 32 / weights)
    if method != "amq":  # whether its search comes within its tolerance is chance on a model this small
        assert record["reached"], record


def test_salience_is_the_declared_one(tiny_llama, windows, job, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(baselines, "quantize", lambda name, /, *_, **keywords: seen.update({name: keywords}))
    stage_rivals.quantize(job, tiny_llama, windows, "element", {"bpw": 3.0, "group_size": 32}, {})
    given = fisher_salience(tiny_llama, windows)
    assert all(torch.equal(seen["element"]["salience"][name], given[name]) for name in given)

    chosen = random_salience(tiny_llama, 1)
    save_salience(chosen, tmp_path / "s.safetensors")
    declared = start("11_rivals", {"out": {}, "inputs": {"salience": str(tmp_path / "s.safetensors")}})
    stage_rivals.quantize(declared, tiny_llama, windows, "scalebits", {"bpw": 3.0, "block_rows": 16}, {"rounds": 2}, 7)
    given = seen["scalebits"].pop("salience")
    assert all(torch.equal(given[name], chosen[name]) for name in chosen)
    assert seen["scalebits"] == {"seed": 7, "block_rows": 16, "rounds": 2}

    stage_rivals.quantize(declared, tiny_llama, windows, "amq", {"bpw": 3.0}, {"tolerance": 0.1})
    assert seen["amq"] == {"seed": 0, "tolerance": 0.1}  # decides by itself, whatever is declared
    stage_rivals.quantize(declared, tiny_llama, windows, "sfmp-efficient_qat", {"bpw": 3.0}, {})
    assert seen["efficient_qat"]["mixed"] is True
    stage_rivals.quantize(declared, tiny_llama, windows, "layer_wise", {"bpw": 3.0}, {})
    assert seen["layer_wise"]["method"] == "rtn"


def test_knobs_stand_beside_the_published_ones():
    table = stage_rivals.knob_table("slim_llm", {"sqc_steps": 10, "lam": 1.0}).set_index("knob")
    assert table.loc["sqc_steps"].tolist() == [10, 50, True]
    assert not table.loc["lam", "reduced"]
    mixed = stage_rivals.knob_table("sfmp-efficient_qat", {"e2e_windows": 64})
    assert mixed.published.tolist() == [4096]
    ours = stage_rivals.knob_table("scalebits", {"rounds": 10, "refresh_windows": 8})
    assert ours.published.tolist() == ["10 (ours)", "– (ours)"] and ours.reduced.tolist() == [False, True]


def test_fewer_or_shorter_windows_count_as_reduced():
    windows = torch.zeros(64, 512, dtype=torch.int64)
    full = {"n_windows": 128, "sba_windows": 128, "sba_tokens": None, "sqc_steps": 50}
    table = stage_rivals.knob_table("slim_llm", full, windows).set_index("knob")
    assert table.loc["n_windows"].tolist() == [64, 128, True]
    assert table.loc["sba_tokens"].tolist() == [512, None, True]
    assert table.loc["sqc_steps"].tolist() == [50, 50, False]
    assert table.loc["tokens of a window"].tolist() == [512, 2048, True]
    assert stage_rivals.knob_table("amq", {"n_windows": 4, "n_tokens": 2048}, windows).used.tolist() == [4, 512]
    assert stage_rivals.knob_table("scalebits", {"refresh_windows": None}, windows).reduced.tolist() == [False]
    long = stage_rivals.knob_table("slim_llm", full, torch.zeros(128, 2048, dtype=torch.int64))
    assert not long.reduced.any()


def test_costs_are_extrapolated_by_the_count_and_the_size_of_a_unit():
    cost = CostRecord()
    with cost.stage("search", unit="model evaluation") as stage:
        stage.units, stage.full_units, stage.unit_scale = 4, 40, 2.0
    cost.stages["search"].wall_seconds = 8.0
    row = stage_rivals.cost_table(cost.rows()).iloc[0]
    assert (row.unit_seconds, row.full_seconds) == (2.0, 160.0)


def test_one_search_of_amq_serves_a_run_and_is_counted_in_it(tiny_llama, windows, job, tmp_path):
    found, cost = stage_rivals.search(tiny_llama, windows, REDUCED["amq"], seed=3)
    found.save(tmp_path / "search.json")
    (tmp_path / "cost.json").write_text(json.dumps({"stages": cost.rows()}))
    inputs = {"search": str(tmp_path / "search.json"), "search_cost": str(tmp_path / "cost.json")}
    given = start("11_rivals", {"out": {}, "inputs": inputs})
    alone = stage_rivals.quantize(job, copy.deepcopy(tiny_llama), windows, "amq", {"bpw": 3.3}, REDUCED["amq"], 3)
    outcome = stage_rivals.quantize(given, tiny_llama, windows, "amq", {"bpw": 3.3}, REDUCED["amq"], 3)
    assert outcome.plan.hash == alone.plan.hash
    assert [row["stage"] for row in outcome.cost.rows()] == ["quantization"]
    stages = [row["stage"] for row in stage_rivals.cost_rows(given, outcome)]
    assert stages == [row["stage"] for row in stage_rivals.cost_rows(job, alone)]


@pytest.mark.parametrize("gap, reached", [(0.0, True), (0.004, True), (0.006, False), (-0.001, False)])
def test_a_budget_counts_as_reached_from_below_only(gap, reached, tiny_llama, windows, tmp_path, tokenizer):
    outcome = baselines.quantize("rtn", tiny_llama, windows, 4.0, group_size=32)
    folder = stage_rivals.save(outcome, tokenizer, tmp_path / "model")
    assert stage_rivals.rival_record(folder, outcome, "run", "amq", 4.0 + gap)["reached"] is reached


def test_coarse_methods_may_end_one_matrix_or_level_below(tiny_llama, windows, job, tmp_path, tokenizer):
    outcome = stage_rivals.quantize(job, tiny_llama, windows, "layer_wise", {"bpw": 3.3, "group_size": 32}, {})
    folder = stage_rivals.save(outcome, tokenizer, tmp_path / "model")
    record = stage_rivals.rival_record(folder, outcome, "run", "layer_wise", 3.3)
    sizes = [np.prod(outcome.plan[name].shape) for name in outcome.plan]
    assert record["bpw_tolerance"] == pytest.approx(max(sizes) / sum(sizes))
