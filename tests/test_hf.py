"""save_pretrained → from_pretrained: the same bits in a new process; dtypes, tying, biases, shards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import PLAN, quantize_randomly
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen3Config,
)

from sfmp import hf
from sfmp.card import model_card
from sfmp.checkpoint import digest
from sfmp.linear import SFMPLinear, keep_dequantized
from sfmp.packed import TENSORS
from sfmp.spec import SfmpError

IDS = torch.arange(24).view(2, 12)
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 100, "vocab_size": 128, "max_position_embeddings": 64}
LOAD = """
import sys
{imports}
from transformers import AutoModelForCausalLM
import torch
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.arange(24).view(2, 12)).logits
    assert torch.equal(logits, torch.load(folder + "/logits.pt", weights_only=True)), folder
    assert sum(type(m).__name__ == "SFMPLinear" for m in model.modules()) == 14, folder
"""


def _logits(model):
    with torch.no_grad():
        return model(IDS).logits


def _quantized(config, dtype=torch.float32, skip=("lm_head",)):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().to(dtype)
    return hf.attach(quantize_randomly(model, skip=skip), PLAN, source="someone/tiny")


def _run(code, *arguments):
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True,
                          env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints with their in-memory logits: three dtypes, tied or not, biases, sharded."""
    root = tmp_path_factory.mktemp("checkpoints")
    cases = {
        "float32": (LlamaConfig(**SIZES, tie_word_embeddings=True), torch.float32, {}),
        "bfloat16": (LlamaConfig(**SIZES, tie_word_embeddings=False), torch.bfloat16, {}),
        "float16": (Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True), torch.float16, {}),
        "biases": (Qwen2Config(**SIZES, tie_word_embeddings=True), torch.bfloat16, {}),
        "sharded": (LlamaConfig(**SIZES, mlp_bias=True), torch.float32, {"max_shard_size": "30KB"}),
    }
    for name, (config, dtype, options) in cases.items():
        model = _quantized(config, dtype)
        model.save_pretrained(root / name, **options)
        torch.save(_logits(model), root / name / "logits.pt")
    assert len(list((root / "sharded").glob("model-*.safetensors"))) > 2
    return [root / name for name in cases]


def test_a_new_process_finds_the_same_bits(folders):
    _run(LOAD.format(imports="import sfmp\nassert 'torch' not in sys.modules"), *folders)


def test_transformers_may_be_imported_first(folders):
    _run(LOAD.format(imports="from transformers import LlamaForCausalLM\nimport sfmp"), folders[0])


def test_import_sfmp_loads_neither_torch_nor_transformers():
    _run("import sys, sfmp, kernels_numba\nassert not {'torch', 'transformers', 'numba'} & set(sys.modules)")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_numbers_survive_any_requested_dtype(folders, dtype):
    model = AutoModelForCausalLM.from_pretrained(folders[3], dtype=dtype)
    assert model.dtype == dtype
    entries = model.config.quantization_config.modules
    for name, layer in hf.quantized_layers(model).items():
        assert digest(layer.packed.tensors()) == entries[name]["sha256"]
        assert layer.bias is None or layer.bias.dtype == dtype
    model.to(torch.bfloat16).to(torch.float16)
    for name, layer in hf.quantized_layers(model).items():
        assert digest(layer.packed.tensors()) == entries[name]["sha256"]


def test_saving_again_gives_the_same_files(folders, tmp_path):
    AutoModelForCausalLM.from_pretrained(folders[0]).save_pretrained(tmp_path)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / file).read_bytes() == (folders[0] / file).read_bytes()


def test_config_json_says_what_the_format_says(folders):
    # METHOD.md 1.12 #13: fake-quantized fp16 weights were saved under the name of a quantized checkpoint.
    config = json.loads((folders[0] / "config.json").read_text())["quantization_config"]
    assert set(config) == {"quant_method", "format_version", "spec", "modules", "plan_hash", "source"}
    assert config["quant_method"] == "sfmp" and config["format_version"] == 1
    assert config["plan_hash"] == PLAN.hash and config["spec"] == PLAN.spec.to_dict()
    assert config["source"] == {"model": "someone/tiny", "revision": None}
    assert config["modules"]["model.layers.0.self_attn.k_proj"]["shape"] == [32, 64]


def test_the_bare_base_model_loads_too(folders):
    base = AutoModel.from_pretrained(folders[0])
    full = AutoModelForCausalLM.from_pretrained(folders[0])
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, full.model(IDS).last_hidden_state)


def test_a_quantized_output_layer_is_untied(tmp_path):
    model = _quantized(LlamaConfig(**SIZES, tie_word_embeddings=True), skip=())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.lm_head, SFMPLinear) and not hasattr(loaded.lm_head, "weight")
    assert torch.equal(_logits(loaded), _logits(model))
    assert set(AutoModel.from_pretrained(tmp_path)._modules) == set(loaded.model._modules)


def test_rounded_rotary_frequencies_are_restored():
    config = LlamaConfig(**SIZES)
    exact = LlamaForCausalLM(config).model.rotary_emb.inv_freq
    assert torch.equal(_quantized(config, torch.bfloat16).model.rotary_emb.inv_freq, exact)


def test_dequantize_gives_ordinary_layers(folders):
    model = AutoModelForCausalLM.from_pretrained(folders[0])
    with keep_dequantized(model):
        expected = _logits(model)
    model.dequantize()
    assert not hf.quantized_layers(model) and not hasattr(model.config, "quantization_config")
    assert torch.equal(_logits(model), expected)


def test_altered_layers_are_described_anew(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders[0])
    model.model.layers[0].mlp.up_proj.alpha.mul_(0.5)
    model.save_pretrained(tmp_path)
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path)), _logits(model))


def test_quantizing_on_the_fly_is_refused(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    entry = {"shape": [1, 1], "group_size": 32, "block_rows": 1, "plane_words": 1, "bias": False}
    config = hf.SFMPConfig(1, modules={"m": entry})
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


def test_attach_leaves_a_plain_module_alone_and_wants_quantized_layers():
    plain = quantize_randomly(nn.Sequential(nn.Linear(40, 8)))
    assert hf.attach(plain, PLAN) is plain and set(plain[0]._buffers) == {*TENSORS, "bias"}
    with pytest.raises(SfmpError, match="quantize_model first"):
        hf.attach(nn.Sequential(nn.Linear(2, 2)), PLAN)


def test_source_names_no_local_path(tiny_llama, tmp_path):
    tiny_llama.config._name_or_path = str(tmp_path)
    hf.attach(quantize_randomly(tiny_llama), PLAN)
    assert tiny_llama.config.quantization_config.source["model"] == tmp_path.name


def test_save_checkpoint_is_whole_or_absent(tiny_llama, tmp_path, monkeypatch):
    folder = tmp_path / "made" / "model"
    hf.attach(quantize_randomly(tiny_llama), PLAN, source="someone/tiny")
    hf.save_checkpoint(tiny_llama, folder)
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(folder)), _logits(tiny_llama))
    before = (folder / "model.safetensors").read_bytes()

    def fail(*_args, **_options):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr("sfmp.card.save_model_card", fail)
        with pytest.raises(OSError, match="disk full"):
            hf.save_checkpoint(tiny_llama, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    rename = os.replace

    def ended(source, target):
        if str(target) == str(folder) and str(source).endswith("new"):
            raise KeyboardInterrupt  # between the two renames
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", ended)
        with pytest.raises(KeyboardInterrupt):
            hf.save_checkpoint(tiny_llama, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    hf.save_checkpoint(tiny_llama, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SfmpError, match="something else"):
        hf.save_checkpoint(tiny_llama, tmp_path)
    assert (tmp_path / "notes.txt").exists()


def test_model_card(tiny_llama):
    hf.attach(quantize_randomly(tiny_llama), PLAN, source="someone/tiny")
    card = model_card(tiny_llama)
    front = card.split("---")[1].splitlines()
    assert {"base_model: someone/tiny", "base_model_relation: quantized", "- sfmp"} <= set(front)
    assert "library_name: transformers" in front
    shares = [float(line.split("|")[2].rstrip(" %")) for line in card.splitlines() if line.endswith(" % |")]
    assert sum(shares) == pytest.approx(100, abs=0.05) and PLAN.hash in card
    with pytest.raises(SfmpError, match="quantize_model first"):
        model_card(nn.Linear(2, 2))
