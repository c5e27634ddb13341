"""What the notebooks tabulate: the small network of Eq. 7, one checkpoint's packing, products and round
trip, stages.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from sfmp import checkpoint_study, mlp_experiment, stages
from sfmp.accounting import checkpoint_table, quantization_record
from sfmp.allocate import make_plan
from sfmp.apply import quantize_model
from sfmp.checks import SfmpError
from sfmp.hf import save_checkpoint
from sfmp.salience import random_salience
from sfmp.spec import QuantSpec


@pytest.fixture
def quantized(tiny_llama):
    """tiny_llama with mixed blocks that divide neither 64 nor 172, and its plan."""
    spec = QuantSpec(bpw=4.0, group_size=32, block_rows=24, method="rtn")
    plan = make_plan(random_salience(tiny_llama, 1), spec)
    return quantize_model(tiny_llama, plan), plan


def test_packing_table_sees_every_bit(quantized):
    model, plan = quantized
    table = checkpoint_study.packing_table(model).set_index("module")
    assert set(table.index) == set(plan) and table.round_trip.all()
    weights = table.out_features * table.in_features
    assert np.average(table.wbits, weights=weights) == pytest.approx(plan.wbits)
    model.get_submodule(table.index[0]).planes[0] ^= (
        1  # another code is another valid matrix: it must still round-trip
    )
    assert checkpoint_study.packing_table(model).round_trip.all()


def test_lut_table_counts_and_errors(quantized):
    model, _ = quantized
    table = checkpoint_study.lut_table(model, widths=(2, 4, 8), tokens=3)
    assert (table.error < 1e-5).all() and (table.error > 0).any()
    assert (table.lookups * table.table_width).nunique() == 1
    assert table.table_bytes.tolist() == [8, 32, 512]


def test_record_counts_the_files(quantized, tmp_path):
    model, plan = quantized
    save_checkpoint(model, tmp_path / "m")
    record = quantization_record(tmp_path / "m", plan, "r")
    stored = checkpoint_study.packing_table(model)
    weights = stored.out_features * stored.in_features
    assert record["quantized_weights"] == weights.sum() == checkpoint_table(tmp_path / "m").weights.sum()
    assert record["bpw_stored"] == pytest.approx(np.average(stored.bpw_stored, weights=weights))
    assert abs(record["bpw"] - plan.spec.bpw) <= record["bpw_tolerance"] < 0.05
    header = sum(
        8 + int.from_bytes(p.read_bytes()[:8], "little") for p in (tmp_path / "m").glob("*.safetensors")
    )
    size = sum(p.stat().st_size for p in (tmp_path / "m").glob("*.safetensors"))
    assert record["model_bytes"] == size - header


def test_integration_table_passes_and_can_fail(quantized, tmp_path, monkeypatch):
    model, _ = quantized
    save_checkpoint(model, tmp_path / "m")
    tokens = torch.randint(0, 128, (1, 16), generator=torch.Generator().manual_seed(0))
    assert checkpoint_study.integration_table(tmp_path / "m", tokens).passed.all()
    dense = checkpoint_study._dense

    def wrong(network):
        network = dense(network)
        next(m for m in network.modules() if isinstance(m, torch.nn.Linear)).weight.data *= 1.1
        return network

    monkeypatch.setattr(checkpoint_study, "_dense", wrong)
    assert checkpoint_study.integration_table(tmp_path / "m", tokens).passed.tolist() == [True, True, False]


def test_mlp_experiment_is_complete_and_repeatable(monkeypatch):
    monkeypatch.setattr(mlp_experiment.train_student, "__defaults__", (0, 60))
    table = mlp_experiment.run_mlp_experiment(repeats=1, samples=20, wbits=(2.5,))
    assert table.salience.tolist() == list(mlp_experiment.ARMS) and (table.bpw == 3.5).all()
    assert table.loss.nunique() == 3 and table.accuracy.between(0, 1).all()
    again = mlp_experiment.run_mlp_experiment(repeats=1, samples=20, wbits=(2.5,))
    assert again.equals(table)


def test_stages_name_what_is_wrong():
    with pytest.raises(SfmpError, match="expected embedded, a checkpoint folder"):
        stages.load_model("./nowhere")
    with pytest.raises(SfmpError, match="calibration or evaluation"):
        stages.documents("embedded", "training")


def test_texts_of_the_two_splits_are_disjoint():
    texts = [set(stages.documents("embedded", split)) for split in ("calibration", "evaluation")]
    assert all(texts) and not texts[0] & texts[1]


def test_evaluation_windows_of_the_corpus_are_evenly_spaced(monkeypatch):
    from sfmp import data

    found = torch.arange(10)[:, None].expand(10, 4)
    monkeypatch.setattr(data, "evaluation_windows", lambda *_: (found, 3.0))
    monkeypatch.setattr(data, "load_text", lambda source, **options: [source])
    assert stages.evaluation_set("embedded", None, 3, 4)[0][:, 0].tolist() == [0, 3, 6]
    assert len(stages.evaluation_set("owner/name", None, 3, 4)[0]) == 10  # the paper's protocol: all of them
    assert not Path("owner/name").exists()
