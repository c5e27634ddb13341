"""Small random models of every family, what AWQ must be able to fold in one of their layers, and shared steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import transformers

from sfmp import QuantSpec, fisher_salience, make_plan, quantize_model
from sfmp.linear import SFMPLinear

WINDOWS = torch.randint(3, 96, (6, 32), generator=torch.Generator().manual_seed(1))

_BASE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
         "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GATED = _BASE | {"intermediate_size": 96, "num_key_value_heads": 2}
_EXPERTS = _GATED | {"num_experts_per_tok": 2}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 96, "bos_token_id": 1,
         "eos_token_id": 2}

FAMILIES = {
    "Llama": _GATED,
    "Mistral": _GATED,
    "Qwen2": _GATED,
    "Qwen3": _GATED | {"head_dim": 16},
    "Gemma": _GATED | {"head_dim": 16},
    "Gemma2": _GATED | {"head_dim": 16},
    "Gemma3": _GATED | {"head_dim": 16},
    "Phi": _BASE | {"intermediate_size": 128},
    "Phi3": _GATED,
    "OPT": _BASE | {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "GPT2": _GPT2,
    "GPTJ": _GPT2 | {"rotary_dim": 8},
    "GPTNeoX": _BASE | {"intermediate_size": 128},
    "Mixtral": _EXPERTS | {"num_local_experts": 4},
    "Qwen2Moe": _EXPERTS | {"num_experts": 5, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 64},
    "Qwen3Moe": _EXPERTS | {"num_experts": 5, "moe_intermediate_size": 48, "head_dim": 16},
    "Phimoe": _EXPERTS | {"num_local_experts": 4},
    "GptOss": _EXPERTS | {"num_local_experts": 4, "head_dim": 16},
}

OTHERS = {"Mamba": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "state_size": 8}}

_NORMS = {"input_layernorm", "post_attention_layernorm"}
_LLAMA = _NORMS | {"self_attn.v_proj", "mlp.up_proj"}
_PRE_POST = {"input_layernorm", "pre_feedforward_layernorm", "self_attn.v_proj", "mlp.up_proj"}


def _experts(count):
    return _NORMS | {"self_attn.v_proj"} | {f"mlp.experts.{number}.gate_up_proj" for number in range(count)}


# What stands in front of the scales; the rest is behind a GELU or a clamp, where no scale can pass.
FOLDED = {
    "Llama": _LLAMA,
    "Mistral": _LLAMA,
    "Qwen2": _LLAMA,
    "Qwen3": _LLAMA,
    "Gemma": _LLAMA,
    "Gemma2": _PRE_POST,
    "Gemma3": _PRE_POST,
    "Phi": {"input_layernorm", "self_attn.v_proj"},
    "Phi3": _NORMS | {"self_attn.qkv_proj", "mlp.gate_up_proj"},
    "OPT": {"self_attn_layer_norm", "self_attn.v_proj", "final_layer_norm", "fc1"},
    "GPT2": {"ln_1", "attn.c_attn", "ln_2"},
    "GPTJ": {"ln_1", "attn.v_proj"},
    "GPTNeoX": _NORMS | {"attention.query_key_value"},
    "Mixtral": _experts(4),
    "Qwen2Moe": _experts(5) | {"mlp.shared_expert.up_proj"},
    "Qwen3Moe": _experts(5),
    "Phimoe": _experts(4),
    "GptOss": _NORMS | {"self_attn.v_proj"},
}

LOAD = """
import json, sys
import sfmp
from sfmp.linear import SFMPLinear
from transformers import AutoModelForCausalLM
import torch
equal = {}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    stored = torch.load(folder + "/logits.pt", weights_only=True)
    packed = [module for module in model.modules() if isinstance(module, SFMPLinear)]
    for module in packed:
        module.backend = "reference"  # as in the parent; compiling the kernels would take longer than the test
    torch.set_num_threads(stored["threads"])  # products are summed in another order by another number of threads
    with torch.no_grad():
        logits = model(stored["windows"]).logits
    equal[folder] = torch.equal(logits, stored["logits"]) and len(packed) == stored["packed"]
print(json.dumps(equal))
"""


def tiny(family, dtype=torch.float32, **changes):
    """A model of the family in evaluation mode; norms and biases away from 1 and 0, weights large enough to matter."""
    config = getattr(transformers, f"{family}{'Text' if family == 'Gemma3' else ''}Config")
    sizes = (FAMILIES | OTHERS).get(family, _GATED)  # whoever is in neither is built like a Llama
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config(**(sizes | changes))).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("proj_bias"):
                parameter.data += 0.2 * torch.rand_like(parameter)
            elif "norm" not in name:
                parameter.data *= 4.0
    return model.to(dtype)


def logits(model):
    """Logits on WINDOWS, by the reference backend."""
    for module in model.modules():
        if isinstance(module, SFMPLinear):
            module.backend = "reference"
    with torch.no_grad():
        return model(WINDOWS).logits


def quantized(model, method="awq", windows=WINDOWS, **options):
    """The model, quantized in place to 2, 3 and 4 bits by its Fisher salience."""
    spec = QuantSpec(bpw=4.0, group_size=32, block_rows=32, levels=(2, 3, 4), method=method, **options)
    salience = fisher_salience(model, windows[:2], skip=spec.skip)
    return quantize_model(model, make_plan(salience, spec, model), windows)


def saved(model, folder):
    """Save a model and what a fresh process must find in it."""
    model.save_pretrained(folder)
    packed = sum(isinstance(module, SFMPLinear) for module in model.modules())
    record = {"windows": WINDOWS, "logits": logits(model), "packed": packed, "threads": torch.get_num_threads()}
    torch.save(record, folder / "logits.pt")
    return folder


def loaded_afresh(folders):
    """Whether a new process loads each checkpoint of `saved` with the same layers and logits: dict by folder."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", LOAD, *map(str, folders)], capture_output=True, text=True,
                          env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {Path(folder): equal for folder, equal in json.loads(done.stdout.splitlines()[-1]).items()}
