"""From a model to a quantized checkpoint folder in one call, and its scores: what the command line runs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from sfmp.checks import SfmpError, integer, write_atomically
from sfmp.model_source import check_new, context_of, load, source_record
from sfmp.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Where the windows come from and what is measured on them.

    Attributes
    ----------
    text : str, a source of `sfmp.data.load_text`
    windows : int, how many
    seqlen : int or None, tokens of each; None is 512 or the model's context if that is shorter
    salience : str, a key of `sfmp.salience.SALIENCE_SOURCES`
    """

    text: str = "python:calibration"
    windows: int = 64
    seqlen: int | None = None
    salience: str = "fisher"


def quantize_to_folder(source: str, folder, spec: QuantSpec, calibration: Calibration, *, dtype: str = "auto",
                       device: str = "auto", base_model: str | None = None, overwrite: bool = False,
                       max_shard_size: str = "5GB", progress: bool = False):
    """Load a model, quantize it and write the checkpoint with tokenizer and model card, complete or not at all.

    Parameters
    ----------
    source, dtype, device : see `sfmp.model_source.load`
    folder : path that does not exist, unless `overwrite`
    spec : QuantSpec
    calibration : Calibration
    base_model : str, optional
        ``owner/name[@revision]`` for the model card, where `source` is a local copy.
    max_shard_size : str
        Largest file, such as ``5GB``.
    progress : bool
        Show bars on standard error.

    Returns
    -------
    Plan

    Raises
    ------
    SfmpError
        Any of it is unusable; `folder` is then as it was.
    """
    from sfmp import data
    from sfmp.allocate import make_plan
    from sfmp.apply import quantize_model
    from sfmp.hf import attach, save_checkpoint
    from sfmp.salience import SALIENCE_SOURCES

    folder, origin = check_new(folder, overwrite), source_record(source, base_model)
    integer("windows", calibration.windows, 1)
    texts = data.load_text(calibration.text)
    model, tokenizer = load(source, dtype, device)
    if getattr(model.config, "quantization_config", None) is not None:
        raise SfmpError(f"model {source!r}: expected one that is not quantized, found quant_method "
                        f"{model.config.quantization_config.quant_method}; give the model it was made from")
    seqlen = integer("seqlen", calibration.seqlen or context_of(model, 512), 2)
    windows = data.calibration_windows(texts, tokenizer, calibration.windows, seqlen, spec.seed)
    shown = {"progress": progress} if calibration.salience in ("fisher", "activation") else {}
    salience = SALIENCE_SOURCES[calibration.salience](model, windows, spec.seed, skip=spec.skip, **shown)
    plan = make_plan(salience, spec, model)
    del salience
    attach(quantize_model(model, plan, windows, progress=progress), plan, origin)
    check_new(folder, overwrite)
    save_checkpoint(model, folder, tokenizer, max_shard_size=max_shard_size)
    return plan


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
    tasks : names of `sfmp.tasks.TASKS`
    items : int
        Items of each task.
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
        Any of it is unusable.

    Notes
    -----
    Source: METHOD.md section 1.10.
    """
    from sfmp import data
    from sfmp import tasks as task_items
    from sfmp.evaluate import accuracy
    from sfmp.stage_evaluation import perplexity

    documents = {text: data.load_text(text) for text in texts}
    questions = {task: task_items.build(task, integer("items", items, 2)) for task in tasks}
    model, tokenizer = load(source, dtype, device)
    length = integer("seqlen", seqlen or context_of(model, 2048), 2)
    results = []
    for text, found in documents.items():
        cut, _ = data.evaluation_windows(found, tokenizer, length)
        if windows is not None:
            cut = cut[:: max(1, len(cut) // integer("windows", windows, 1))][:windows]
        with _forward_bar(model, -(-len(cut) // 4), f"perplexity of {Path(text).name}", progress):
            value = perplexity(model, cut, length)
        results.append({"dataset": text, "metric": "perplexity", "value": value, "seqlen": length, "windows": len(cut)})
    for task, scores in (accuracy(model, tokenizer, questions) if questions else {}).items():
        results += [{"dataset": task, "metric": metric, "value": scores[metric], "stderr": scores[f"{metric}_stderr"],
                     "items": int(scores["n"])} for metric in ("acc", "acc_norm")]
    return results


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
