"""Perplexity by the GPTQ protocol and accuracy through lm-eval, against independent computations."""

import math

import naive
import numpy as np
import pytest
import torch

from sfmp import evaluate
from sfmp.spec import SfmpError


def test_perplexity_equals_a_token_by_token_computation(tiny_llama):
    tokens = torch.randint(0, 128, (5 * 16 + 7,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = [tiny_llama(input_ids=w[None]).logits[0].double().numpy() for w in tokens[:80].view(5, 16)]
    expected = naive.perplexity(logits, tokens[:80].view(5, 16).numpy())
    assert evaluate.perplexity(tiny_llama, tokens, 16) == pytest.approx(expected, rel=1e-5)
    windows = tokens[:80].view(5, 16)
    assert evaluate.perplexity(tiny_llama, windows, 16, batch_size=2) == pytest.approx(expected, rel=1e-5)
    for form in (tokens.numpy(), tokens.to(torch.int32), tokens.tolist()):
        assert evaluate.perplexity(tiny_llama, form, 16) == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_a_uniform_model_is_the_vocabulary(tiny_llama):
    for parameter in tiny_llama.parameters():
        torch.nn.init.zeros_(parameter)
    assert evaluate.perplexity(tiny_llama, torch.arange(64), 32) == pytest.approx(128, rel=1e-6)


def test_perplexity_refuses_short_text_and_infinite_losses(tiny_llama):
    with pytest.raises(SfmpError, match="found seqlen 32 and 31 tokens"):
        evaluate.perplexity(tiny_llama, torch.arange(31), 32)
    with pytest.raises(SfmpError, match="tokens: expected integer token ids, found torch.float32"):
        evaluate.perplexity(tiny_llama, torch.rand(64), 32)
    with pytest.raises(SfmpError, match="tokens: expected token ids within 0..127, found 90..153"):
        evaluate.perplexity(tiny_llama, torch.arange(64) + 90, 32)
    with pytest.raises(SfmpError, match="seqlen: expected an integer"):
        evaluate.perplexity(tiny_llama, torch.arange(64), 32.0)
    torch.nn.init.constant_(tiny_llama.model.norm.weight, math.nan)
    with pytest.raises(SfmpError, match="finite"):
        evaluate.perplexity(tiny_llama, torch.arange(32), 32)


def test_perplexity_leaves_the_training_mode_as_it_was(tiny_llama):
    tiny_llama.train()
    evaluate.perplexity(tiny_llama, torch.arange(32), 32)
    assert tiny_llama.training
    tiny_llama.model.forward = None
    with pytest.raises(TypeError):
        evaluate.perplexity(tiny_llama, torch.arange(32), 32)
    assert tiny_llama.training


def test_accuracy_equals_an_independent_scorer(embedded):
    model, tokenizer = embedded
    items = [
        {"question": "import os\nimport ", "choices": ["sys", "zzqx", "return", "):"], "answer": 0},
        {"question": "def f(x):\n    return", "choices": [" x", " import", " class", " def"], "answer": 0},
        {"question": "for i in range(", "choices": ["yield", "10):", "import", "class A:"], "answer": 2},
        {"question": "class A:\n    def __init__(self", "choices": ["):", " import", " 17", " while"], "answer": 0},
    ]
    score = evaluate.accuracy(model, tokenizer, {"mini": items}, batch_size=2)["mini"]

    def loglikelihoods(question, choice):
        # Special tokens as the tokenizer adds them (the embedded one adds none); white space goes to the choice.
        ids, start = tokenizer(question + choice)["input_ids"], len(tokenizer(question.rstrip())["input_ids"])
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()
        return sum(logp[t - 1, ids[t]] for t in range(start, len(ids)))

    table = [[loglikelihoods(i["question"], c) for c in i["choices"]] for i in items]
    plain = [int(np.argmax(row)) == i["answer"] for row, i in zip(table, items, strict=True)]
    normed = [
        int(np.argmax([v / len(c) for v, c in zip(row, i["choices"], strict=True)])) == i["answer"]
        for row, i in zip(table, items, strict=True)
    ]
    assert (score["acc"], score["acc_norm"]) == (np.mean(plain), np.mean(normed))
    assert score["n"] == 4 and score["chance"] == 0.25
    assert score["acc_stderr"] == pytest.approx(np.std(plain, ddof=1) / 2)


def test_an_empty_task_is_refused(tiny_llama):
    with pytest.raises(SfmpError, match="expected items"):
        evaluate.accuracy(tiny_llama, None, {"empty": []})
