"""Checkpoint folders as SFMP's authors publish them, and the float64 weights they stand for (METHOD.md 1.5, 1.9)."""

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

# 512 rows a block and 128 columns a group, as published; grouped-query attention, so that shapes differ.
CONFIG = {"hidden_size": 512, "num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 8,
          "head_dim": 64, "intermediate_size": 1536, "vocab_size": 64, "max_position_embeddings": 64}
DOWN = "model.layers.0.mlp.down_proj"


def matrix(seed, rows, columns, block_rows=512, group=128):
    """(codes [N, K] uint8, tensors without the codes) of one QuantLinear, drawn at random."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(2, 5, (columns // group, rows // block_rows))
    top = np.kron(2 ** bits.T - 1, np.ones((block_rows, group), int))
    per_group = np.kron(2 ** bits - 1, np.ones((1, block_rows), int))  # [groups, N]
    tensors = {
        "scales": torch.tensor(rng.uniform(0.001, 0.02, (columns // group, rows)), dtype=torch.float16),
        "zeros": torch.tensor(rng.integers(0, 1 << 16, per_group.shape) % (per_group + 1), dtype=torch.float16),
        "block_bitwidth": torch.tensor(bits, dtype=torch.int8),
        "in_reorder": torch.tensor(rng.permutation(columns), dtype=torch.int32),
        "out_reorder": torch.tensor(rng.permutation(rows), dtype=torch.int32),
    }
    return (rng.integers(0, 1 << 16, (rows, columns)) % (top + 1)).astype(np.uint8), tensors


def stored_codes(codes, axes="[N, K/2]", low_first=True, each=2):
    """Put `each` codes in a word, in plain arithmetic."""
    codes = (codes if axes.startswith("[N") else codes.T).astype(np.int64)
    if not axes.endswith("/2]"):
        codes = codes.T
    words = np.zeros((codes.shape[0], codes.shape[1] // each), np.int64)
    for index in range(each):
        place = index if low_first else each - 1 - index
        words += codes[:, index::each] * 16**place
    words = words if axes.endswith("/2]") else words.T
    words = np.ascontiguousarray(words).astype({2: np.uint8, 8: np.uint32}[each])
    return torch.from_numpy(words if each == 2 else words.view(np.int32))


def oracle(codes, tensors):
    """Float64 weight in natural order and the bound of what float16 beta may change: W[i, in[c]] = W'[out[i], c]."""
    scales, zeros = (tensors[key].double().numpy().T for key in ("scales", "zeros"))
    width = codes.shape[1] // scales.shape[1]
    scale, zero = np.repeat(scales, width, 1), np.repeat(zeros, width, 1)
    permuted = (codes.astype(np.float64) - zero) * scale  # METHOD 1.5
    bits = tensors["block_bitwidth"].numpy().T.astype(int)
    top = np.kron(2**bits - 1, np.ones((len(codes) // len(bits), width), int))
    rounding = np.abs(scale * (top / 2 - zero)) * 2.0**-11 + 2.0**-20
    into, out = (tensors[key].numpy() for key in ("in_reorder", "out_reorder"))
    weight, bound = np.empty_like(permuted), np.empty_like(permuted)
    weight[:, into], bound[:, into] = permuted[out], rounding[out]
    return weight, bound


def linear_names(model):
    return [name for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"]


def write_published(folder):
    """Write a folder of theirs, in two files; return the float64 weights behind it, and bounds, by name."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).half()
    model.config.save_pretrained(folder)
    linears = linear_names(model)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in linears}
    weights = {}
    for seed, name in enumerate(linears):
        codes, parts = matrix(seed, *model.get_submodule(name).weight.shape)
        weights[name] = oracle(codes, parts)
        tensors |= {f"{name}.{key}": tensor for key, tensor in parts.items()}
        tensors[f"{name}.qweight"] = stored_codes(codes)
    names = sorted(tensors)
    half = len(names) // 2  # a matrix may straddle the two files
    for number, part in enumerate((names[:half], names[half:])):
        save_file({name: tensors[name] for name in part}, folder / f"model-0000{number + 1}-of-00002.safetensors")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return weights
