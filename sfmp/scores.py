"""Scores of a model, quantized or not, and the JSON they are kept in: what `sfmp eval` and `sfmp push` use."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sfmp.checks import SfmpError, integer, write_atomically
from sfmp.model_source import load, window_length


def evaluate_model(source: str, texts: Sequence[str] = ("python:evaluation",), *, seqlen: int | None = None,
                   windows: int | None = None, tasks: Sequence[str] = (), items: int = 300, dtype: str = "auto",
                   device: str = "auto", progress: bool = False) -> list[dict]:
    """Score a model, quantized or not.

    Parameters
    ----------
    source, dtype, device : see `sfmp.model_source.load`
    texts : sources of `sfmp.data.load_text`
        Perplexity is measured on each (GPTQ protocol).
    seqlen : int, optional
        Tokens of a window; 2048 or the model's context if that is shorter.
    windows : int, optional
        That many evenly spaced windows of each text instead of all.
    tasks : names of `sfmp.tasks.TASKS` or `sfmp.standard_tasks.STOCK`
    items : int
        Items of each task of the former; the latter have theirs.
    progress : bool
        Show bars on standard error.

    Returns
    -------
    list of dict
        ``dataset`` (str), ``metric`` (str), ``value`` (float) and what it was measured with; the form that
        `sfmp.card` takes.

    Raises
    ------
    SfmpError
        Any of it is unusable. Texts, names of tasks and local copies of their rows are looked at before the model.

    Notes
    -----
    Source: METHOD.md section 1.10.
    """
    from sfmp import data
    from sfmp import tasks as task_items
    from sfmp.evaluate import accuracy
    from sfmp.stage_evaluation import perplexity
    from sfmp.standard_tasks import STOCK
    from sfmp.standard_tasks import accuracy as standard_accuracy

    integer("seqlen", 2 if seqlen is None else seqlen, 2)
    integer("windows", 1 if windows is None else windows, 1)
    _check_tasks(tasks)
    # Rows of a named data set may be lines of one text, and blank lines are part of it.
    documents = {text: data.load_text(text, blank=text.startswith("dataset:")) for text in texts}
    standard = [task for task in tasks if task in STOCK]
    questions = {task: task_items.build(task, integer("items", items, 2)) for task in tasks if task not in standard}
    model, tokenizer = load(source, dtype, device)
    length = window_length(model, seqlen, 2048)
    results = []
    for text, found in documents.items():
        cut, _ = data.evaluation_windows(found, tokenizer, length)
        if windows is not None:
            cut = cut[:: max(1, len(cut) // windows)][:windows]
        with _forward_bar(model, -(-len(cut) // 4), f"perplexity of {Path(text).name}", progress):
            value = perplexity(model, cut, length)
        results.append({"dataset": text, "metric": "perplexity", "value": value, "seqlen": length, "windows": len(cut)})
    scored = accuracy(model, tokenizer, questions) if questions else {}
    scored |= standard_accuracy(model, tokenizer, standard) if standard else {}
    for task, scores in scored.items():
        results += [{"dataset": task, "metric": metric, "value": scores[metric], "stderr": scores[f"{metric}_stderr"],
                     "items": int(scores["n"])} for metric in ("acc", "acc_norm")]
    return results


def _check_tasks(tasks):
    """Raise SfmpError if a task is unknown, or its local copy is not whole, before hours are spent on other scores."""
    from sfmp.standard_tasks import STOCK, write_definitions
    from sfmp.tasks import TASKS

    if unknown := [task for task in tasks if task not in TASKS and task not in STOCK]:
        raise SfmpError(f"task {unknown[0]!r}: expected one of {', '.join([*TASKS, *STOCK])}; choose one")
    for task in tasks:
        if task in STOCK:
            with tempfile.TemporaryDirectory() as folder:  # of no use but to be checked
                write_definitions(Path(folder), task)


def save_results(results: Sequence[dict], path) -> None:
    """Write the results of `evaluate_model` as JSON, atomically."""
    text = json.dumps(list(results), indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def load_results(paths: Sequence) -> list[dict]:
    """Read what `save_results` wrote, several files one after the other.

    Raises SfmpError if a file is missing, no such JSON, or a row lacks ``dataset``, ``metric`` or a number ``value``.
    """
    from sfmp.card import checked_results

    results = []
    for path in paths:
        try:
            rows = json.loads(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise SfmpError(f"{path}: expected the JSON that `sfmp eval --json` writes, found {error}; write it "
                            "again") from error
        results += checked_results(rows, str(path))
    return results


@contextlib.contextmanager
def _forward_bar(model, total, title, show):
    """A bar that moves with every forward pass of the model inside."""
    if not show:
        yield
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=title, unit="batch") as bar:

        def step(*_):
            bar.update()  # not returned: what a hook returns replaces the output

        handle = model.register_forward_hook(step)
        try:
            yield
        finally:
            handle.remove()
