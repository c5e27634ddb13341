"""What `sfmp inspect` reads and draws: names told apart, labels that can be read, damage named."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import PLAN, quantize_randomly
from matplotlib import pyplot as plt
from safetensors.torch import load_file, save_file

from sfmp import hf
from sfmp.checks import SfmpError
from sfmp.inspection import read_checkpoint, summary
from sfmp.layer_bits import bits_by_layer_table, bits_frame, picture

LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
         "mlp.down_proj")


def matrices(names, seed=0):
    rng = np.random.default_rng(seed)
    return {name: SimpleNamespace(shape=(64, int(rng.integers(1, 9)) * 64), wbits=float(rng.uniform(2, 4)))
            for name in names}


@pytest.fixture
def folder(tiny_llama, tmp_path):
    hf.attach(quantize_randomly(tiny_llama), PLAN, source="someone/tiny")
    return hf.save_checkpoint(tiny_llama, tmp_path / "model")


# ---- names


def test_projections_of_one_name_are_kept_apart():
    found = matrices([f"transformer.h.{layer}.{name}" for layer in range(11)
                      for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")] + ["lm_head"])
    table = bits_by_layer_table(bits_frame(found))
    assert list(table.columns) == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "lm_head", "all"]
    assert list(table.index) == [*map(str, range(11)), "–", "all"]
    for kind in ("attn", "mlp"):
        assert table.loc["10", f"{kind}.c_proj"] == found[f"transformer.h.10.{kind}.c_proj"].wbits
    assert table.loc["–", "lm_head"] == found["lm_head"].wbits


def test_experts_of_a_layer_are_one_cell_weighted_and_apart_from_the_shared_one():
    experts = [f"model.layers.0.mlp.experts.{index}.up_proj" for index in range(3)]
    found = matrices([*experts, "model.layers.0.mlp.shared_expert.up_proj", "model.layers.0.self_attn.q_proj"])
    table = bits_by_layer_table(bits_frame(found))
    assert sorted(table.columns) == ["all", "experts.up_proj", "q", "shared_expert.up_proj"]
    expected = np.average([found[name].wbits for name in experts], weights=[found[name].shape[1] for name in experts])
    assert table.loc["0", "experts.up_proj"] == pytest.approx(expected)
    figure = picture(found)
    try:
        cells = dict(zip([label.get_text() for label in figure.axes[0].get_yticklabels()],
                         np.asarray(figure.axes[0].images[0].get_array()).ravel(), strict=True))
    finally:
        plt.close(figure)
    assert cells["experts.up_proj"] == pytest.approx(expected)


@pytest.mark.parametrize("layers", [1, 12, 32, 80, 126])
def test_labels_of_layers_do_not_touch(layers):
    figure = picture(matrices([f"model.layers.{layer}.{name}" for layer in range(layers) for name in LLAMA]))
    try:
        figure.canvas.draw()
        labels = figure.axes[0].get_xticklabels()
        boxes = [label.get_window_extent() for label in labels]
        places = figure.axes[0].get_xticks()
    finally:
        plt.close(figure)
    assert all(left.x1 + 1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))
    assert [label.get_text() for label in labels] == [str(place) for place in places]  # each at its own layer
    assert len(labels) >= min(layers, 12)


# ---- files


def test_hash_and_bytes_are_those_of_the_tensors(folder):
    found = summary(read_checkpoint(folder))
    tensors = load_file(folder / "model.safetensors")
    assert found["bytes"]["all tensors"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert found["bytes"]["all tensors"] < (folder / "model.safetensors").stat().st_size
    name = next(iter(read_checkpoint(folder).matrices))
    tensors[f"{name}.col_perm"] = tensors[f"{name}.col_perm"].int().roll(1).to(tensors[f"{name}.col_perm"].dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert summary(read_checkpoint(folder))["plan_hash_confirmed"] is not True


def _tensor(part, change):
    def apply(folder, name):
        tensors = load_file(folder / "model.safetensors")
        tensors[f"{name}.{part}"] = change(tensors[f"{name}.{part}"])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return apply


def _entry(change):
    def apply(folder, name):
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"], config["quantization_config"]["modules"][name])
        (folder / "config.json").write_text(json.dumps(config))
    return apply


def _file(content, name="model.safetensors"):
    return lambda folder, module: (folder / name).write_bytes(content(folder))


DAMAGE = {
    "an empty file": (_file(lambda folder: b""), "damaged"),
    "a file cut off": (_file(lambda folder: (folder / "model.safetensors").read_bytes()[:-5]), "damaged"),
    "noise": (_file(lambda folder: b"x" * 500), "damaged"),
    "tensors twice": (_file(lambda folder: (folder / "model.safetensors").read_bytes(), "model-00001.safetensors"),
                      "each tensor once"),
    "planes of other bits": (_tensor("planes", lambda t: t[:-8].clone()), "planes: expected"),
    "alpha of another shape": (_tensor("alpha", lambda t: t.T.contiguous()), "alpha: expected"),
    "9 bits": (_tensor("block_bits", lambda t: t + 7), "block_bits: expected"),
    "rows repeat": (_tensor("row_perm", lambda t: torch.zeros_like(t)), "row_perm: expected"),
    "no group size": (_entry(lambda config, entry: entry.pop("group_size")), "group_size"),
    "shape of text": (_entry(lambda config, entry: entry.update(shape="64x64")), "shape"),
    "shape of one axis": (_entry(lambda config, entry: entry.update(shape=[64])), "shape"),
    "rows of text": (_entry(lambda config, entry: entry.update(block_rows="many")), "block_rows"),
    "group of 33": (_entry(lambda config, entry: entry.update(group_size=33)), "group_size"),
    "no specification": (_entry(lambda config, entry: config.pop("spec")), "spec"),
    "a list as specification": (_entry(lambda config, entry: config.update(spec=[1])), "spec"),
    "no matrices": (_entry(lambda config, entry: config.update(modules={})), "quantized by sfmp"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_error(folder, kind):
    change, message = DAMAGE[kind]
    change(folder, next(iter(read_checkpoint(folder).matrices)))
    with pytest.raises(SfmpError, match=message) as caught:
        summary(read_checkpoint(folder))
    assert str(folder) in str(caught.value)
