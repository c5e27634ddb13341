"""Token perplexity (the GPTQ protocol) and zero-shot accuracy (through lm-eval, offline)."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfmp.checks import SfmpError, integer, token_ids

if TYPE_CHECKING:
    import torch

PROTOCOL = "non-overlapping windows, seqlen - 1 targets each, mean of window means, exp"


def perplexity(model: torch.nn.Module, tokens: torch.Tensor, seqlen: int, batch_size: int = 4) -> float:
    """Return the token perplexity of a causal language model.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model whose output has ``.logits``; evaluated in its own dtype, log-likelihoods in float32.
    tokens : integers [T] or [n, seqlen]; tensor, array or list
        A token stream, cut here into non-overlapping windows (the tail is dropped), or the windows themselves.
    seqlen : int
        Window length in tokens; ``seqlen - 1`` of them are predicted.
    batch_size : int
        Windows a forward pass; changes speed, not the protocol.

    Returns
    -------
    float
        ``exp`` of the mean over windows of the mean negative log-likelihood (nats) of a window.

    Raises
    ------
    SfmpError
        If tokens are no integers of the vocabulary, there is not one whole window, or a loss is not finite.

    Notes
    -----
    Source: METHOD.md §1.10. Not lm-eval's ``word_perplexity``, which counts words and overlaps windows.
    """
    import torch

    tokens, seqlen = token_ids("tokens", tokens, model), integer("seqlen", seqlen, 1)
    if seqlen < 2 or tokens.numel() < seqlen:
        raise SfmpError(
            f"perplexity: expected at least seqlen >= 2 tokens, found seqlen {seqlen} and {tokens.numel()} tokens; "
            "give more text or a smaller seqlen"
        )
    stream = tokens.reshape(-1)
    windows = stream[: stream.numel() // seqlen * seqlen].view(-1, seqlen)
    device = next(model.parameters()).device
    losses, was_training = [], model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in windows.split(batch_size):
                batch = batch.to(device)
                logits = model(input_ids=batch).logits[:, :-1].float()  # [B, seqlen-1, vocabulary]
                nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
                losses += nll.view(len(batch), -1).mean(dim=1).tolist()
    finally:
        model.train(was_training)
    mean = sum(losses) / len(losses)
    if not math.isfinite(mean):
        dtype = next(model.parameters()).dtype
        raise SfmpError(f"perplexity: expected finite losses, found a mean of {mean}; the weights or {dtype} overflow")
    return math.exp(mean)


def accuracy(
    model: torch.nn.Module, tokenizer, tasks: Mapping[str, Sequence[dict]], batch_size: int = 32
) -> dict[str, dict[str, float]]:
    """Run multiple-choice tasks zero-shot through lm-eval's own API, without network.

    Parameters
    ----------
    model : torch.nn.Module
        A Hugging Face causal language model.
    tokenizer : transformers tokenizer
    tasks : mapping of task name to items
        An item has ``question`` (str), ``choices`` (list of str) and ``answer`` (index); see :mod:`sfmp.tasks`.
    batch_size : int

    Returns
    -------
    dict
        Task name → ``acc``, ``acc_norm`` (likelihood per character of the choice), their standard errors
        ``acc_stderr``, ``acc_norm_stderr``, ``n``, and ``chance`` (the mean of 1 / number of choices).

    Raises
    ------
    SfmpError
        If a task has no items.

    Notes
    -----
    Source: METHOD.md §1.10 (zero-shot, both metrics because the paper's averages fit acc_norm, not acc).
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from sfmp.shared_prefix import SharedPrefixLM

    empty = [name for name, items in tasks.items() if not items]
    if empty:
        raise SfmpError(f"tasks {', '.join(empty)}: expected items, found none; build them with sfmp.tasks.build")
    device = str(next(model.parameters()).device)
    arguments = {"pretrained": model, "tokenizer": tokenizer, "batch_size": batch_size, "device": device}
    lm = SharedPrefixLM(**arguments, max_length=tokenizer.model_max_length)
    if not lm.suits():
        lm = HFLM(**arguments, max_length=tokenizer.model_max_length)
    with tempfile.TemporaryDirectory() as folder:
        for name, items in tasks.items():
            _write_task(Path(folder), name, items)
        manager = TaskManager(include_path=folder, include_defaults=False)
        results = lm_eval.simple_evaluate(
            model=lm, tasks=list(tasks), task_manager=manager, num_fewshot=0, bootstrap_iters=0
        )
    return {name: _scores(results["results"][name], items) for name, items in tasks.items()}


def _write_task(folder: Path, name: str, items: Sequence[dict]) -> None:
    """Write the items and an lm-eval task file that reads them; JSON is YAML, so no text can break the file."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items), "utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task), "utf-8")


def _scores(result: Mapping[str, float], items: Sequence[dict]) -> dict[str, float]:
    n = len(items)
    scores = {"n": n, "chance": sum(1 / len(item["choices"]) for item in items) / n}
    for metric in ("acc", "acc_norm"):
        value = float(result[f"{metric},none"])
        # Standard error of a mean of n zero-or-one scores, as lm-eval defines it (sample variance).
        scores |= {
            metric: value,
            f"{metric}_stderr": math.sqrt(value * (1 - value) / (n - 1)) if n > 1 else math.nan,
        }
    return scores
