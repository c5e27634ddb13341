"""What decodes in the GPU bench: models of published shapes with random weights, dense and packed.

Candidates share what is not quantized. The packed layers of one model are copies of one another in memory of their own,
so that no matrix is in a cache when it is read again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from sfmp.bench.decode import sharing
from sfmp.bench.random_model import quantize_randomly, random_network, repeat_first_layer
from sfmp.checks import SfmpError
from sfmp.fuse import fuse
from sfmp.linear import SFMPLinear

LLAMA = {"model_type": "llama", "max_position_embeddings": 131072, "vocab_size": 128256, "head_dim": 128,
         "num_key_value_heads": 8, "tie_word_embeddings": False}
MODELS = {  # as published, without the scaling of rotary positions, which changes numbers but no times
    "Llama-3.1-8B": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                     "num_attention_heads": 32},
    "Qwen3-8B": {**LLAMA, "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
                 "num_hidden_layers": 36, "num_attention_heads": 32, "vocab_size": 151936,
                 "max_position_embeddings": 40960},  # norms of queries and keys come with the architecture
    "Llama-3.1-70B": {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                      "num_attention_heads": 64},
    "tiny": {**LLAMA, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256, "max_position_embeddings": 256},
}
LAYERS = {"Llama-3.1-70B": 8}  # of a model that is too large to measure whole beside its candidates
DTYPE = torch.float16


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What decodes, and what its rows say about it.

    Attributes
    ----------
    weights : str
        "torch fp16", "sfmp mma", …
    bpw : float or None
        Bits per weight, scales included.
    fused : bool
    make : function that returns the network
    """

    weights: str
    bpw: float | None
    fused: bool
    make: Callable[[], nn.Module]

    @property
    def name(self) -> str:
        words = [self.weights, f"{self.bpw:g} bpw" if self.bpw else "", "fused" if self.fused else ""]
        return " ".join(word for word in words if word)


def candidates(dense: nn.Module, bpw, modes, backend: str) -> list[Candidate]:
    """torch, and each mode of our kernels for each number of bits, matrices by themselves and fused.

    Parameters
    ----------
    dense : nn.Module, `dense_model`
    bpw : iterable of float
    modes : iterable of str, of `backend`
    backend : "cuda" or "cpu"
    """
    found = [Candidate("torch fp16", None, False, lambda: dense)]
    for value in bpw:
        for mode in modes:
            found += [Candidate(f"sfmp {mode}", value, fused, lambda value=value, mode=mode, fused=fused: packed_model(
                dense, value, backend, mode, fused)) for fused in (False, True)]
    return found


def dense_model(model: str, layers: int, device: str) -> nn.Module:
    """Return a model of `MODELS` with that many decoder layers, float16."""
    return random_network({**MODELS[model], "num_hidden_layers": layers}, DTYPE, device=device)


def packed_model(dense: nn.Module, bpw: float, backend: str, mode: str, fused: bool) -> nn.Module:
    """Return the model with packed random matrices in all decoder layers; the rest is shared with the dense one.

    Raises
    ------
    SfmpError
        Matrices that should be fused cannot be.
    """
    network = sharing(dense)
    first = quantize_randomly(network.base_model.layers[0], bpw, shared_columns=True)
    for layer in first.modules():
        if isinstance(layer, SFMPLinear):
            layer.backend, layer.mode = backend, mode
    if fused and len((report := fuse(first)).fused) != 2:
        raise SfmpError(f"model: expected q, k, v and gate, up to be one product each, found {report}; measure it "
                        "without fusing")
    return repeat_first_layer(network)


def shared_bytes(network: nn.Module, dense: nn.Module) -> int:
    """Bytes of the tensors that a packed model shares with the dense one."""
    known = {id(tensor) for tensor in (*dense.parameters(), *dense.buffers())}
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()) if id(tensor) in known)
