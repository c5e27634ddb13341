"""The shipped model: its shape, its quality, its training recipe."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from sfmp import corpus, data, evaluate, train
from sfmp import embedded as module
from sfmp.spec import SfmpError

EVIDENCE = module.Path(module.__file__).parents[1] / "results" / "reference" / "training"


def test_architecture_and_size(embedded):
    model, tokenizer = embedded
    config = model.config
    assert sum(p.numel() for p in model.parameters()) <= 8_000_000
    assert config.hidden_size >= 256 and config.num_hidden_layers >= 6 and config.max_position_embeddings >= 512
    assert config.num_key_value_heads < config.num_attention_heads and config.tie_word_embeddings
    assert config.vocab_size == len(tokenizer) == 4096
    assert (module.FOLDER / "model.safetensors").stat().st_size <= 16 * 2**20
    with safe_open(module.FOLDER / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}


def test_held_out_loss_is_the_one_in_the_training_log(embedded):
    """The whole evaluation split was 1.35 bits per byte or less when trained; every 12th window here: within 10 %."""
    model, tokenizer = embedded
    windows, bytes_per_token = data.evaluation_windows(data.load_text("python:evaluation"), tokenizer, 512)
    ppl = evaluate.perplexity(model, windows[::12], 512)
    logged = json.loads((EVIDENCE / "held_out.json").read_text("utf-8"))["bits_per_byte"]["evaluation"]
    assert logged <= 1.35
    assert np.log2(ppl) / bytes_per_token == pytest.approx(logged, rel=0.1)


def test_no_token_holds_a_sentence(embedded):
    _, tokenizer = embedded
    assert max(len(token) for token in tokenizer.get_vocab()) <= 20


def test_tokenizer_gives_any_text_back(embedded):
    _, tokenizer = embedded
    text = "def f(x):\n    return x ** 2  # é 漢 \t\n\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_a_missing_checkpoint_is_a_clear_error(tmp_path):
    with pytest.raises(SfmpError, match="snakemake train_embedded"):
        module.load(tmp_path)


@pytest.fixture
def small_recipe(monkeypatch, tmp_path):
    """The real recipe on two modules and a one-layer model."""
    from transformers import LlamaConfig

    documents = corpus.stdlib_documents("calibration")
    texts = {"calibration": documents[:1], "evaluation": documents[1:2], "train": documents[2:12]}
    monkeypatch.setattr(corpus, "stdlib_documents", lambda split: texts[split])
    monkeypatch.setattr(corpus, "package_documents", lambda: documents[12:30])
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape |= {"intermediate_size": 64, "head_dim": 16}
    config = LlamaConfig(**(module.configuration().to_dict() | shape))
    monkeypatch.setattr(module, "configuration", lambda: config)
    monkeypatch.setattr(train, "STEP_TOKENS", 1024)
    return tmp_path


def test_a_killed_training_run_ends_with_the_same_weights(small_recipe, monkeypatch):
    whole, broken = small_recipe / "whole", small_recipe / "broken"
    train.train(whole, steps=8, log_every=4, save_every=3)

    real, calls = train._backward, []

    def dies_at_step_six(model, ids):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(model, ids)

    monkeypatch.setattr(train, "_backward", dies_at_step_six)
    with pytest.raises(KeyboardInterrupt):
        train.train(broken, steps=8, log_every=4, save_every=3)
    monkeypatch.setattr(train, "_backward", real)
    train.train(broken, steps=8, log_every=4, save_every=3)
    assert (whole / "model" / "model.safetensors").read_bytes() == (broken / "model" / "model.safetensors").read_bytes()
    model, tokenizer = module.load(whole / "model")
    assert model.config.hidden_size == 32 and tokenizer.bos_token == module.BOS


def test_learning_rate_warms_up_stays_and_falls_to_zero():
    rates = [train.learning_rate(step, 1000) for step in range(1000)]
    assert rates[0] == 1 / train.WARMUP and max(rates) == 1.0 and rates[-1] <= 0.01
    assert all(rate == 1.0 for rate in rates[train.WARMUP : 600])


def test_a_batch_depends_on_seed_and_step_only():
    tokens = {"stdlib": np.arange(5000, dtype=np.uint16), "packages": np.arange(9000, dtype=np.uint16)}
    assert torch.equal(train.batch_at(3, 100, tokens, 0), train.batch_at(3, 100, tokens, 0))
    assert not torch.equal(train.batch_at(3, 100, tokens, 0), train.batch_at(4, 100, tokens, 0))
    assert train.batch_at(3, 100, tokens, 0).shape == (32, 256)
    assert train.batch_at(99, 100, tokens, 0).shape == (16, 512)
