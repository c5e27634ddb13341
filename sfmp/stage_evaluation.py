"""What the evaluation notebook does: load a model or a checkpoint, and score it."""

from __future__ import annotations

import contextlib

from sfmp import evaluate, places, standard_tasks, tasks
from sfmp.linear import StoredLinear, keep_dequantized
from sfmp.stages import load_placed, load_tokenizer


def load_for_evaluation(run, source: str):
    """The model to evaluate and its tokenizer: the declared input ``checkpoint``, or the unquantized
    `source`, on the device of the job's environment. On a GPU it moves the tokens it is given there, and keeps packed
    matrices dequantized from now on: the kernels' sums in bfloat16 differ from theirs by more than a thousandth.
    """
    if "checkpoint" not in run.inputs:
        model, tokenizer = load_placed(source)
    else:
        model, tokenizer = load_placed(str(run.inputs["checkpoint"]))[0], load_tokenizer(source)
    if places.placement()[0] != "cpu":
        model.register_forward_pre_hook(_move_inputs, with_kwargs=True)
        model.kept = contextlib.ExitStack()  # lives as long as the model
        model.kept.enter_context(_dequantized_once(model))
    return model, tokenizer


def _move_inputs(model, args, kwargs):
    """Move the tensors of a call to where the model begins."""
    device = next(model.parameters()).device
    moved = {name: value.to(device) if hasattr(value, "to") else value for name, value in kwargs.items()}
    return tuple(value.to(device) if hasattr(value, "to") else value for value in args), moved


def perplexity(model, tokens, seqlen: int) -> float:
    """:func:`sfmp.evaluate.perplexity`, with each packed matrix dequantized once instead of at every call."""
    with _dequantized_once(model):
        return evaluate.perplexity(model, tokens, seqlen)


def zero_shot(model, tokenizer, names, seed: int = 0) -> dict[str, dict[str, float]]:
    """Scores of the named zero-shot tasks; empty if none is named.

    Those of lm-eval as `sfmp.standard_tasks.accuracy` runs them, the others as :func:`sfmp.evaluate.accuracy`.
    """
    standard = [name for name in names if name in standard_tasks.STOCK]
    own = {name: tasks.build(name, seed=seed) for name in names if name not in standard}
    if not names:
        return {}
    with _dequantized_once(model):
        scores = evaluate.accuracy(model, tokenizer, own) if own else {}
        return scores | (standard_tasks.accuracy(model, tokenizer, standard) if standard else {})


def _dequantized_once(model):
    packed = any(isinstance(module, StoredLinear) for module in model.modules())
    return keep_dequantized(model) if packed else contextlib.nullcontext()
