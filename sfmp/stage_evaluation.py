"""What the evaluation notebook does: load a model or a checkpoint, and score it."""

from __future__ import annotations

import contextlib

from sfmp import evaluate, tasks
from sfmp.linear import StoredLinear, keep_dequantized
from sfmp.stages import load_model, load_tokenizer


def load_for_evaluation(run, source: str):
    """The model to evaluate and its tokenizer: the declared input ``checkpoint``, or the unquantized
    `source`.
    """
    if "checkpoint" not in run.inputs:
        return load_model(source)
    model, _ = load_model(str(run.inputs["checkpoint"]))
    return model, load_tokenizer(source)


def perplexity(model, tokens, seqlen: int) -> float:
    """:func:`sfmp.evaluate.perplexity`, with each packed matrix dequantized once instead of at every call."""
    with _dequantized_once(model):
        return evaluate.perplexity(model, tokens, seqlen)


def zero_shot(model, tokenizer, names, seed: int = 0) -> dict[str, dict[str, float]]:
    """Scores of the named zero-shot tasks (see :func:`sfmp.evaluate.accuracy`); empty if none is named."""
    if not names:
        return {}
    with _dequantized_once(model):
        return evaluate.accuracy(model, tokenizer, {name: tasks.build(name, seed=seed) for name in names})


def _dequantized_once(model):
    packed = any(isinstance(module, StoredLinear) for module in model.modules())
    return keep_dequantized(model) if packed else contextlib.nullcontext()
