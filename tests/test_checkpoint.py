"""Each kind of damage to a checkpoint is one SfmpError that names the tensor, out of from_pretrained."""

import json

import pytest
import torch
from cases import PLAN, packed_case, quantize_randomly
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sfmp import hf
from sfmp.packed import TENSORS, PackedMatrix
from sfmp.spec import SfmpError

NAME = "model.layers.1.mlp.up_proj"


@pytest.fixture
def folder(tiny_llama, tmp_path):
    hf.attach(quantize_randomly(tiny_llama), PLAN, source="someone/tiny")
    tiny_llama.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    return tmp_path


def _change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _change_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def _set(key, index, value):
    def change(tensors):
        tensors[f"{NAME}.{key}"][index] = value
    return change


def _replace(key, function):
    def change(tensors):
        tensors[f"{NAME}.{key}"] = function(tensors[f"{NAME}.{key}"]).contiguous()
    return change


TENSOR_DAMAGE = {
    "missing": ("planes", lambda t: t.pop(f"{NAME}.planes")),
    "missing permutation": ("col_perm", lambda t: t.pop(f"{NAME}.col_perm")),
    "planes too short": ("planes", _replace("planes", lambda t: t[:-1])),
    "planes too long": ("planes", _replace("planes", lambda t: torch.cat([t, t[:32]]))),
    "planes of another dtype": ("planes", _replace("planes", lambda t: t.float())),
    "planes reshaped": ("planes", _replace("planes", lambda t: t.view(2, -1))),
    "alpha NaN": ("alpha", _set("alpha", (0, 0), float("nan"))),
    "beta infinite": ("beta", _set("beta", (0, 0), float("inf"))),
    "alpha of another dtype": ("alpha", _replace("alpha", lambda t: t.bfloat16())),
    "alpha transposed": ("alpha", _replace("alpha", lambda t: t.T)),
    "bits 0": ("block_bits", _set("block_bits", (0, 0), 0)),
    "bits 9": ("block_bits", _set("block_bits", (0, 0), 9)),
    "bits of other planes": ("planes", _replace("block_bits", lambda t: t % 8 + 1)),
    "bits swapped": ("planes", _replace("block_bits", lambda t: t.flip(0))),
    "row permutation repeats": ("row_perm", _set("row_perm", 0, 1)),
    "column permutation out of range": ("col_perm", _set("col_perm", 0, 64)),
    "row permutation of another dtype": ("row_perm", _replace("row_perm", lambda t: t.long())),
    "one bit flipped": ("planes", _replace("planes", lambda t: t ^ (torch.arange(len(t)) == 7).int())),
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGE)
def test_damaged_tensor(folder, damage):
    key, change = TENSOR_DAMAGE[damage]
    _change_tensors(folder, change)
    with pytest.raises(SfmpError) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert f"{NAME}.{key}: expected" in str(caught.value) and "found" in str(caught.value)


def _copy_entry(config, name):
    config["modules"][name] = config["modules"][NAME]


CONFIG_DAMAGE = {
    "other version": ("format_version: expected 1, found 2", lambda c: c.update(format_version=2)),
    "no version": ("format_version: expected 1, found None", lambda c: c.pop("format_version")),
    "true is no version": ("format_version", lambda c: c.update(format_version=True)),
    "no modules": ("modules", lambda c: c.pop("modules")),
    "unknown field": ("surprise", lambda c: c.update(surprise=1)),
    "field missing": (NAME, lambda c: c["modules"][NAME].pop("shape")),
    "group size": (f"{NAME}].group_size", lambda c: c["modules"][NAME].update(group_size=33)),
    "negative words": (f"{NAME}].plane_words", lambda c: c["modules"][NAME].update(plane_words=-1)),
    "text for a number": (f"{NAME}].block_rows", lambda c: c["modules"][NAME].update(block_rows="16")),
    "other plane size": (f"{NAME}.planes", lambda c: c["modules"][NAME].update(plane_words=1)),
    "other group size": (f"{NAME}.alpha", lambda c: c["modules"][NAME].update(group_size=64)),
    "other block rows": (f"{NAME}.block_bits", lambda c: c["modules"][NAME].update(block_rows=64)),
    "other shape": (f"{NAME}: expected a linear layer", lambda c: c["modules"][NAME].update(shape=[1, 2])),
    "unknown module": ("model.layers.9.x: expected", lambda c: _copy_entry(c, "model.layers.9.x")),
    "not linear": ("model.norm: expected a linear", lambda c: _copy_entry(c, "model.norm")),
    "bias that is not there": (f"{NAME}.bias", lambda c: c["modules"][NAME].update(bias=True)),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGE)
def test_damaged_config(folder, damage):
    message, change = CONFIG_DAMAGE[damage]
    _change_config(folder, change)
    with pytest.raises(SfmpError) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize("size", [0, 4, 100, 30_000, -1])
def test_truncated_file(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(SfmpError, match="model.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_missing_shard_and_pickles_are_refused(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(SfmpError, match="pickles are never read"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_from_tensors_checks_what_it_is_given():
    packed = packed_case(0, bias=True)
    sizes = {"shape": packed.shape, "group_size": 32, "block_rows": 16}
    again = PackedMatrix.from_tensors("m", packed.tensors(), **sizes)
    assert torch.equal(again.dequantize(), packed.dequantize()) and again.bias is packed.bias
    for key in TENSORS:
        with pytest.raises(SfmpError, match=rf"m\.{key}: expected .*found none"):
            PackedMatrix.from_tensors("m", {k: t for k, t in packed.tensors().items() if k != key}, **sizes)
    with pytest.raises(SfmpError, match=r"m\.weight: expected no such tensor"):
        PackedMatrix.from_tensors("m", {**packed.tensors(), "weight": torch.zeros(1)}, **sizes)
    with pytest.raises(SfmpError, match=r"m\.bias: expected finite"):
        PackedMatrix.from_tensors("m", {**packed.tensors(), "bias": torch.full((40,), torch.nan)}, **sizes)
    with pytest.raises(SfmpError, match=r"m\.planes: expected int32 \[5\]"):
        PackedMatrix.from_tensors("m", packed.tensors(), plane_words=5, **sizes)
