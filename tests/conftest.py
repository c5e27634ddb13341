"""Shared fixtures: the offline texts beside the checkout, and a model small enough for every test."""

from pathlib import Path

import pytest
from hypothesis import settings

# The same examples every time and no time limits: a busy machine must not decide whether a test passes.
settings.register_profile("sfmp", deadline=None, derandomize=True)
settings.load_profile("sfmp")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of offline texts, tasks and models beside the checkout; absent on a user's machine."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"needs {path} (offline data of the development machines)")
    return path


@pytest.fixture
def tiny_llama():
    """Random LlamaForCausalLM with grouped-query attention and tied embeddings, fp32, eval mode."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=172, vocab_size=128, max_position_embeddings=128,
                         tie_word_embeddings=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def embedded():
    """The shipped model (fp32, eval mode) and its tokenizer; treat both as read-only, or copy.deepcopy the model."""
    from sfmp.embedded import load

    return load()
