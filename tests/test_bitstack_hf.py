"""BitStack checkpoints: the same logits in a new process, and damage is one error that names the tensor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from sfmp.baselines import bitstack, bitstack_hf
from sfmp.card import model_card
from sfmp.checks import SfmpError
from sfmp.hf import save_checkpoint

IDS = torch.arange(24).view(2, 12)
NAME = "model.layers.0.mlp.down_proj"  # its 45 columns leave the last byte of a row part empty
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 45, "vocab_size": 128, "max_position_embeddings": 64}
LOAD = """
import sys, sfmp
from transformers import AutoModelForCausalLM
import torch
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.arange(24).view(2, 12)).logits
    assert torch.equal(logits, torch.load(folder + "/logits.pt", weights_only=True)), folder
    assert sum(type(m).__name__ == "BitStackLinear" for m in model.modules()) == 14, folder
"""


def _logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bitstack")
    cases = {"llama": (LlamaConfig(**SIZES, tie_word_embeddings=True), torch.float32),
             "biases": (Qwen2Config(**SIZES, tie_word_embeddings=False), torch.bfloat16)}
    windows = torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    for name, (config, dtype) in cases.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().to(dtype)
        bitstack.quantize(model, windows, 4.5, rank=1)
        save_checkpoint(model, root / name)
        torch.save(_logits(model), root / name / "logits.pt")
    return {name: root / name for name in cases}


def test_a_new_process_finds_the_same_logits(folders):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", LOAD, *map(str, folders.values())], capture_output=True, text=True,
                          env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def test_loading_in_another_dtype_keeps_the_stored_numbers(folders):
    model = AutoModelForCausalLM.from_pretrained(folders["biases"], dtype=torch.float32)
    entries = model.config.quantization_config.modules
    for name, layer in bitstack_hf.quantized_layers(model).items():
        assert layer.left.dtype == torch.float16 and bitstack_hf.digest(layer) == entries[name]["sha256"]


def test_saving_again_gives_the_same_files(folders, tmp_path):
    AutoModelForCausalLM.from_pretrained(folders["llama"]).save_pretrained(tmp_path)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / file).read_bytes() == (folders["llama"] / file).read_bytes()


def test_dequantized_it_is_an_ordinary_model(folders):
    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    before = _logits(model)
    assert torch.allclose(_logits(model.dequantize()), before, atol=1e-6)
    assert not bitstack_hf.quantized_layers(model)


def test_the_card_says_levels_and_bytes(folders):
    card = (folders["llama"] / "README.md").read_text()
    assert card == model_card(AutoModelForCausalLM.from_pretrained(folders["llama"]))
    assert "quantized by BitStack" in card and "- bitstack" in card and "| rank | 1 |" in card
    assert "14 matrices" in card


def test_a_model_without_such_layers_is_refused(tiny_llama):
    with pytest.raises(SfmpError, match="BitStackLinear"):
        bitstack_hf.attach(tiny_llama, {})


@pytest.fixture
def folder(folders, tmp_path):
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((folders["biases"] / file).read_bytes())
    return tmp_path


def _damaged(name, key, change):
    def damage(tensors):
        tensors[f"{name}.{key}"] = change(tensors[f"{name}.{key}"]).contiguous()
    return damage


@pytest.mark.parametrize(("key", "change"), [
    ("signs", lambda t: t[:, :, :-1]), ("signs", lambda t: t.int()), ("signs", lambda t: t ^ 1),
    ("left", lambda t: t.float()), ("left", lambda t: t[:-1]), ("right", lambda t: t * float("nan")),
    ("right", lambda t: t * 2), ("right", lambda t: t[..., :-1]),
])
def test_damaged_tensors_are_named(folder, key, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    _damaged(NAME, key, change)(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    # the digest is over all tensors of a matrix and is reported at its first
    with pytest.raises(SfmpError, match=rf"{NAME}\.({key}|signs): expected"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_missing_tensor_is_named(folder):
    path = folder / "model.safetensors"
    save_file({key: t for key, t in load_file(path).items() if key != f"{NAME}.left"}, path, metadata={"format": "pt"})
    with pytest.raises(SfmpError, match=rf"{NAME}\.left: expected.*found none"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(("change", "words"), [
    (lambda c: c.update(format_version=2), "format_version: expected 1, found 2"),
    (lambda c: c.update(extra=1), "extra"),
    (lambda c: c.update(modules={}), "modules"),
    (lambda c: c["modules"][NAME].update(levels="3"), rf"{NAME}\].levels: expected an integer, found '3'"),
    (lambda c: c["modules"][NAME].update(rank=0), rf"{NAME}\].rank"),
    (lambda c: c["modules"][NAME].update(bias=1), rf"{NAME}\].bias"),
    (lambda c: c["modules"][NAME].update(shape=[32]), rf"{NAME}\].shape"),
    (lambda c: c["modules"][NAME].pop("rank"), rf"{NAME}\]: expected the fields"),
    (lambda c: c["modules"].update({"model.layers.9.x": c["modules"][NAME]}), "model.layers.9.x"),
])
def test_a_damaged_config_is_named(folder, change, words):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    with pytest.raises(SfmpError, match=words):
        AutoModelForCausalLM.from_pretrained(folder)
