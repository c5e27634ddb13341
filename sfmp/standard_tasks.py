"""The standard tasks of lm-eval (six zero-shot, MMLU, GSM8K).

Prompts and metrics are lm-eval's own, only where the rows come from is ours: the Hub at the revision of
``config/datasets.tsv``, or a local copy.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from sfmp import places
from sfmp.checks import SfmpError

# Task → definitions of lm-eval it consists of, below lm_eval/tasks.
STOCK = {
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "mmlu": "mmlu/default/mmlu_*.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
}
LETTERS = "ABCDEFGH"
EXPORTED = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "piqa")  # with columns of their own where exported
COLUMNS = {  # that lm-eval's definitions read
    "arc_challenge": ("question", "choices", "answerKey"),
    "arc_easy": ("question", "choices", "answerKey"),
    "boolq": ("passage", "question", "label"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "piqa": ("goal", "sol1", "sol2", "label"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
    "mmlu": ("subject", "question", "choices", "answer"),
    "gsm8k": ("question", "answer"),
}


def stock_row(task: str, row: Mapping) -> dict:
    """Return a row in the columns that lm-eval's definition of the task reads.

    Parameters
    ----------
    task : str
        A key of `STOCK`.
    row : mapping
        As the Hub has it (returned as it is), or, of the six zero-shot tasks, in the layout of exported files:
        ``choices`` a list, ``gold`` the index of the right one.

    Raises
    ------
    SfmpError
        A column is missing, or ``gold`` is the index of no choice.

    Notes
    -----
    An exported HellaSwag row has its context in one piece, so the first letter of its last sentence stays as it is,
    where lm-eval makes it a capital. Names of choices (A, B or 1, 2) are in no prompt.
    """
    found = _in_hub_columns(task, row) if "gold" in row and task in EXPORTED else dict(row)
    if missing := [name for name in COLUMNS[task] if name not in found]:
        raise SfmpError(f"expected a column {missing[0]!r}, found {', '.join(map(repr, row))}")
    return found


def _in_hub_columns(task, row):
    gold, choices = int(row["gold"]), row["choices"] if task != "boolq" else ["no", "yes"]
    if not 0 <= gold < len(choices):
        raise SfmpError(f"expected gold in 0..{len(choices) - 1}, found {gold}")
    if task in ("arc_easy", "arc_challenge"):
        names = list(LETTERS[: len(choices)])
        return {"question": row["question"], "choices": {"text": list(choices), "label": names},
                "answerKey": names[gold]}
    if task == "hellaswag":
        return {"activity_label": row["activity_label"], "ctx_a": row["ctx"], "ctx_b": "", "endings": list(choices),
                "label": str(gold)}
    if task == "piqa":
        return {"goal": row["goal"], "sol1": choices[0], "sol2": choices[1], "label": gold}
    return {"passage": row["passage"], "question": row["question"], "label": gold}  # boolq


def write_definitions(folder: Path, task: str) -> list[str]:
    """Write definitions that include those of lm-eval and say where the rows are.

    Parameters
    ----------
    folder : Path
        For the definitions, and the rows of a local copy.
    task : str
        A key of `STOCK`.

    Returns
    -------
    list of str
        Their names: `task`, or those of its parts.

    Raises
    ------
    SfmpError
        The task is unknown, has no whole local copy where there is a data root, or a row of the copy is not of this
        task.
    """
    row, parts = places.dataset(task) if task in STOCK else None, stock_parts(task)
    copies = {} if places.local_data(row) is None else {split: _rows(task, row, split) for split in places.splits(row)}
    if not copies:
        places.warn_unpinned(row)
    for name, (path, subject) in parts.items():
        where = {} if row["revision"] == "-" else {"dataset_kwargs": {"revision": row["revision"]}}
        if copies:
            where = _local(folder, name, row, {split: _of_subject(task, subject, found, split)
                                               for split, found in copies.items()})
        # JSON is YAML; an included path must be absolute to be found.
        (folder / f"{name}.yaml").write_text(json.dumps({"include": str(path), "task": name, **where}), "utf-8")
    return list(parts)


def stock_parts(task: str) -> dict[str, tuple[Path, str | None]]:
    """Return the definitions of lm-eval that a task consists of: name → file, and the configuration of the data set.

    Raises SfmpError if the task is unknown, or the installed lm-eval has it elsewhere.
    """
    import lm_eval
    import yaml

    if task not in STOCK:
        raise SfmpError(f"task {task!r}: expected one of {', '.join(STOCK)}; choose one")
    stock = sorted((Path(lm_eval.__file__).parent / "tasks").glob(STOCK[task]))
    if not stock:
        raise SfmpError(f"task {task}: expected lm_eval/tasks/{STOCK[task]}, found none; install the version of "
                        "requirements.lock")
    if len(stock) == 1:
        return {task: (stock[0], None)}
    return {path.stem: (path, yaml.safe_load(path.read_text("utf-8"))["dataset_name"]) for path in stock}


def _rows(task, row, split):
    """Rows of a local copy in the columns of lm-eval, checked."""
    path = places.local_data(row, split=split)
    try:
        found = [stock_row(task, json.loads(line)) for line in path.read_text("utf-8").split("\n") if line]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:  # an SfmpError is a ValueError
        raise SfmpError(f"{path}: expected rows of {task} as JSON objects, found {type(error).__name__}: {error}; copy "
                        "it again") from error
    return places.whole(row, found, path, split)


def _of_subject(task, subject, rows, split):
    """Rows of one part of a task, in their order."""
    chosen = rows if subject is None else [row for row in rows if row["subject"] == subject]
    if not chosen:
        raise SfmpError(f"task {task}: expected rows of subject {subject!r} in the local copy ({split}), found none; "
                        "copy it again")
    return chosen


def _local(folder, name, row, copies):
    """What a definition says of rows that are written to files in `folder`: split → rows."""
    files = {split: folder / f"{name}.{split}.jsonl" for split in copies}
    for split, path in files.items():
        path.write_text("".join(json.dumps(one) + "\n" for one in copies[split]), "utf-8")
    shots = {"fewshot_split": row["shot_split"]} if row["shot_split"] != "-" else {}
    return {"dataset_path": "json", "dataset_name": None, **shots,
            **{f"{split}_split": split if split in copies else None for split in ("training", "validation", "test")},
            "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()},
                               "cache_dir": str(folder / "cache")}}


def accuracy(model, tokenizer, tasks: Sequence[str], batch_size: int = 16, limit: int | None = None) -> dict[str, dict]:
    """Run standard tasks through lm-eval, each with the number of examples that ``config/datasets.tsv`` says.

    Parameters
    ----------
    model : torch.nn.Module
        A Hugging Face causal language model.
    tokenizer : transformers tokenizer
    tasks : sequence of str
        Keys of `STOCK`.
    batch_size : int
    limit : int, optional
        First rows of each definition only.

    Returns
    -------
    dict
        Task name → ``acc``, ``acc_norm`` (likelihood per character of the choice; ``acc`` again where lm-eval has
        none), ``acc_stderr``, ``acc_norm_stderr``, ``n``, and ``chance`` (the mean of 1 / number of choices, 0 for
        GSM8K, whose ``acc`` is the exact match of lm-eval's strict filter). MMLU is the mean over its questions.

    Raises
    ------
    SfmpError
        As `write_definitions` does, or the Hub does not give the rows.

    Notes
    -----
    Source: METHOD.md section 1.10.
    """
    import lm_eval
    from datasets.exceptions import DatasetsError
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from sfmp.model_source import context_of

    device = str(next(model.parameters()).device)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=device,
              max_length=context_of(model, min(tokenizer.model_max_length, 2**20)))
    scores = {}
    with tempfile.TemporaryDirectory() as folder:
        for task in tasks:
            names = write_definitions(Path(folder), task)
            manager = TaskManager(include_path=folder, include_defaults=False)
            shots = int(places.dataset(task)["shots"])
            try:
                found = lm_eval.simple_evaluate(model=lm, tasks=names, task_manager=manager, bootstrap_iters=0,
                                                limit=limit, num_fewshot=shots, log_samples=True)
            except (ConnectionError, DatasetsError) as error:
                raise SfmpError(f"task {task}: expected its rows from the Hub, found: {error}; check the network, or "
                                "read a local copy (data.root, SFMP_DATA_ROOT)") from error
            scores[task] = _scores([(found["results"][name], found["samples"][name]) for name in names])
    return scores


def _scores(parts):
    """Join (metrics, samples) of the definitions that a task consists of."""
    counts = [len({sample["doc_id"] for sample in samples}) for _, samples in parts]
    n = sum(counts)
    choices = [len(sample["resps"]) for _, samples in parts for sample in samples]
    generated = any("exact_match,strict-match" in metrics for metrics, _ in parts)
    scores = {"n": n, "chance": 0.0 if generated else sum(1 / count for count in choices) / len(choices)}
    plain = "exact_match,strict-match" if generated else "acc,none"
    for metric, key in (("acc", plain), ("acc_norm", "acc_norm,none")):
        values = [float(metrics.get(key, metrics[plain])) for metrics, _ in parts]
        value = sum(v * count for v, count in zip(values, counts, strict=True)) / n
        scores |= {metric: value, f"{metric}_stderr": math.sqrt(value * (1 - value) / (n - 1)) if n > 1 else math.nan}
    return scores
