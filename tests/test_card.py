"""The model card: what the Hub reads of it, the plan's summary, results; from a model and from a folder alike."""

import re

import pytest
import torch
from cases import PLAN, quantize_randomly
from huggingface_hub import ModelCard
from torch import nn

from sfmp import hf
from sfmp.card import checked_results, folder_card, model_card, save_model_card
from sfmp.checks import SfmpError

RESULTS = [{"dataset": "hub:Salesforce/wikitext:wikitext-2-raw-v1:test", "metric": "perplexity", "value": 9.5,
            "base": 8.25, "seqlen": 2048},
           {"dataset": "next_line", "metric": "acc", "value": 0.5, "stderr": 0.0125},
           {"dataset": "/home/me/secret: place/my text.txt", "metric": "perplexity", "value": 3}]


@pytest.fixture
def model(tiny_llama):
    return hf.attach(quantize_randomly(tiny_llama), PLAN, source={"model": "someone/tiny", "revision": "abc"})


def rows(card, start):
    """Cells of the table whose header line starts with `start`."""
    lines = card.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(start))
    found = []
    for line in [lines[first], *lines[first + 2 :]]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def test_the_hub_reads_base_model_relation_and_results(model):
    data = ModelCard(model_card(model, RESULTS)).data
    assert data.base_model == "someone/tiny" and data.base_model_relation == "quantized"
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation" and "sfmp" in data.tags
    found = {(result.dataset_name, result.metric_type): result for result in data.eval_results}
    assert {key: result.metric_value for key, result in found.items()} == {
        ("hub:Salesforce/wikitext:wikitext-2-raw-v1:test", "perplexity"): 9.5, ("next_line", "acc"): 0.5,
        ("my text.txt", "perplexity"): 3.0}
    assert found["hub:Salesforce/wikitext:wikitext-2-raw-v1:test", "perplexity"].dataset_type == "Salesforce/wikitext"


@pytest.mark.parametrize("dataset, kind", [("dataset:wikitext2", "wikitext2"), ("hub:a/b:test@main#x.txt", "a/b"),
                                           ("python:evaluation", "python"), ("piqa", "piqa")])
def test_type_of_a_data_set(model, dataset, kind):
    row = {"dataset": dataset, "metric": "perplexity", "value": 2.0}
    (found,) = ModelCard(model_card(model, [row])).data.eval_results
    assert (found.dataset_name, found.dataset_type) == (dataset, kind)


def test_results_table(model):
    card = model_card(model, RESULTS)
    assert rows(card, "| dataset ") == [
        ["dataset", "metric", "value", "unquantized"],
        ["hub:Salesforce/wikitext:wikitext-2-raw-v1:test", "perplexity", "9.5000", "8.2500"],
        ["next_line", "acc", "0.5000 ± 0.0125", ""], ["my text.txt", "perplexity", "3.0000", ""]]
    assert "secret" not in card and "/home" not in card
    without = model_card(model)
    assert "dataset" not in without and "model-index" not in without and ModelCard(without).data.eval_results is None


def test_plan_summary_is_that_of_the_bit_maps(model):
    table = rows(model_card(model), "| layer ")
    header, cells = table[0], {row[0]: row[1:] for row in table[1:]}
    assert list(cells) == ["0", "1", "all"] and header[1:] == ["q", "k", "v", "o", "gate", "up", "down", "all"] or (
        sorted(header[1:]) == sorted(["q", "k", "v", "o", "gate", "up", "down", "all"]))
    bits = {}
    for name, layer in hf.quantized_layers(model).items():
        of_weight = layer.block_bits.T.float().repeat_interleave(16, 0).repeat_interleave(32, 1)
        bits[name] = of_weight[: layer.out_features, : layer.in_features]
        index = header.index(name.rpartition(".")[2].removesuffix("_proj")) - 1
        assert float(cells[name.split(".")[2]][index]) == pytest.approx(float(bits[name].mean()), abs=0.0051)
    everything = torch.cat([part.flatten() for part in bits.values()]).mean()
    assert float(cells["all"][header.index("all") - 1]) == pytest.approx(float(everything), abs=0.0051)


def test_a_folder_gives_the_same_card_as_its_model(model, tmp_path):
    hf.save_checkpoint(model, tmp_path / "saved")
    written = (tmp_path / "saved" / "README.md").read_text("utf-8")
    assert folder_card(tmp_path / "saved") == model_card(model) == written
    path = save_model_card(None, tmp_path / "saved", RESULTS)
    assert path.read_text("utf-8") == model_card(model, RESULTS) != written


def test_a_local_source_is_no_base_model(tiny_llama):
    card = model_card(hf.attach(quantize_randomly(tiny_llama), PLAN, source={"model": "embedded", "revision": None}))
    assert not re.search("^base_model:", card, re.M) and "base_model_relation: quantized" in card
    assert "# embedded, quantized by SFMP" in card


@pytest.mark.parametrize("wrong", [
    {"dataset": "x", "metric": "acc", "value": 0.5}, [{"metric": "acc", "value": 0.5}],
    [{"dataset": "", "metric": "acc", "value": 1}], [{"dataset": "x", "metric": "acc", "value": float("nan")}],
    [{"dataset": "x", "metric": "acc", "value": "0.5"}], [{"dataset": "x", "metric": "acc", "value": True}],
    [{"dataset": "x", "metric": "acc", "value": 1, "base": "8"}], ["acc"], "acc"])
def test_malformed_results(wrong):
    with pytest.raises(SfmpError, match="results"):
        checked_results(wrong)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(SfmpError, match="quantized by sfmp"):
        folder_card(tmp_path)
    with pytest.raises(SfmpError, match="quantize_model first"):
        model_card(nn.Linear(2, 2), RESULTS)
