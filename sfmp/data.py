"""Text to fixed token windows: the installed Python itself, a local file, or a data set of the Hugging Face hub.

A *source* is one string: ``python:calibration`` or ``python:evaluation`` (:mod:`sfmp.corpus`), a path to a ``.txt``
file (one document) or a ``.jsonl`` file (one document a row, field ``text``), ``dataset:NAME`` (a text of
``config/datasets.tsv``: its local copy where there is a data root, else the Hub's), or
``hub:ID[:CONFIG]:SPLIT[@REVISION][#FILE]``. SPLIT may be cut, as in ``train[:1000]``; FILE is the one file of the
repository that is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sfmp import corpus, places
from sfmp.spec import SfmpError

if TYPE_CHECKING:
    import torch


HUB = re.compile(r"hub:([^:@#]+)(?::([^:@#\[]+))?:(\w+(?:\[[^\]]*\])?)(?:@([^#]+))?(?:#(.+))?")


def load_text(source: str, blank: bool = False) -> list[str]:
    """Read the documents of a source.

    Parameters
    ----------
    source : str
        See the module's first lines.
    blank : bool
        Keep documents without text. Rows of WikiText are lines of one text: perplexity is that of all of them.

    Returns
    -------
    list of str
        Documents in a fixed order.

    Raises
    ------
    SfmpError
        If the source has an unknown form, is missing, holds no text, or is a copy with rows missing or too many.
    """
    row = None
    if source.startswith("dataset:"):
        row, source = places.text(source.removeprefix("dataset:"))
    if source.startswith("python:"):
        split = source.removeprefix("python:")
        if split not in corpus.SPLITS:
            raise SfmpError(f"data source {source!r}: expected python:calibration, :evaluation or :train; choose one")
        documents = [doc.text for doc in corpus.stdlib_documents(split)]
    elif source.startswith("hub:"):
        documents = _hub_documents(source)
    else:
        documents = _file_documents(Path(source))
        documents = documents if row is None else places.whole(row, documents, source)
    if not blank or not any(text.strip() for text in documents):
        documents = [text for text in documents if text.strip()]
    if not documents:
        raise SfmpError(
            f"data source {source!r}: expected a document with text, found none; check the file or the split"
        )
    return documents


def _file_documents(path: Path) -> list[str]:
    if not path.is_file() or path.suffix not in (".txt", ".jsonl"):
        raise SfmpError(
            f"data source {str(path)!r}: expected python:SPLIT, dataset:NAME, hub:ID:SPLIT or an existing .txt or "
            ".jsonl file; check the path"
        )
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SfmpError(f"{path}: expected text in UTF-8, found {error}; unpack or convert it") from error
    if path.suffix == ".txt":
        return [text]
    documents = []
    lines = text.removesuffix("\n").split("\n") if text else []  # not splitlines: JSON may hold U+2028 as it is
    for number, line in enumerate(lines, 1):
        try:
            documents.append(_string(json.loads(line)["text"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise SfmpError(
                f"{path}, line {number}: expected a JSON object with a field 'text', found {line[:60]!r}; mend it"
            ) from error
    return documents


def _string(value):
    if not isinstance(value, str):
        raise TypeError
    return value


def _hub_documents(source: str) -> list[str]:
    found = HUB.fullmatch(source)
    if found is None:
        raise SfmpError(f"data source {source!r}: expected hub:ID:SPLIT or hub:ID:CONFIG:SPLIT, optionally @REVISION "
                        "and #FILE; correct it")
    name, config, split, revision, file = found.groups()
    chosen = {} if file is None else {"data_files": {split.partition("[")[0]: file}}
    rows = read_hub(name, config, split, revision, **chosen)
    try:
        return list(rows["text"])
    except KeyError as error:
        raise SfmpError(f"data source {source!r}: expected a column 'text', found none; choose another") from error


def read_hub(name: str, config: str | None, split: str, revision: str | None, **chosen):
    """Return the rows of a data set of the Hub.

    Parameters
    ----------
    name, config, split, revision, chosen : as ``datasets.load_dataset`` takes them

    Raises
    ------
    SfmpError
        The Hub does not give them: no network, no such data set, configuration, split or revision.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(name, config, split=split, revision=revision, **chosen)
    except (OSError, ValueError, DatasetsError) as error:  # OSError: no network, in its many forms
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise SfmpError(f"data set {name}: expected the Hub to give {split} of configuration {config or '-'} at "
                        f"revision {revision or 'main'}, found: {reason}; check them and the network, or read a local "
                        "copy (data.root, SFMP_DATA_ROOT)") from error


def calibration_windows(documents: list[str], tokenizer, n_windows: int, seqlen: int, seed: int = 0) -> torch.Tensor:
    """Cut windows at random offsets of random documents that are long enough.

    Parameters
    ----------
    documents : list of str
    tokenizer : transformers tokenizer
    n_windows, seqlen : int
        Number and length (tokens) of the windows; a document may give several.
    seed : int

    Returns
    -------
    int64 tensor [n_windows, seqlen]

    Raises
    ------
    SfmpError
        If no document has ``seqlen`` tokens.

    Notes
    -----
    Source: METHOD.md §1.2 (documents of at least seqlen tokens, one random window each).
    """
    import torch

    ids = [np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in documents]
    ids = [row for row in ids if len(row) >= seqlen]
    if not ids:
        raise SfmpError(
            f"calibration text: expected a document of at least {seqlen} tokens, found none in {len(documents)}; "
            "give longer text or a smaller seqlen"
        )
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(ids)) for _ in range(-(-n_windows // len(ids)))])[:n_windows]
    starts = [int(rng.integers(0, len(ids[i]) - seqlen + 1)) for i in order]
    return torch.from_numpy(
        np.stack([ids[i][s : s + seqlen] for i, s in zip(order, starts, strict=True)]).astype(np.int64)
    )


def evaluation_windows(
    documents: list[str], tokenizer, seqlen: int, separator: str = "\n\n"
) -> tuple[torch.Tensor, float]:
    """Join all documents, tokenise once, and cut non-overlapping windows (the GPTQ protocol); the tail is dropped.

    Parameters
    ----------
    documents : list of str
    tokenizer : transformers tokenizer
    seqlen : int
    separator : str

    Returns
    -------
    windows : int64 tensor [n, seqlen]
    bytes_per_token : float
        UTF-8 bytes of the text per token.

    Raises
    ------
    SfmpError
        If the text is shorter than one window.
    """
    import torch

    text = separator.join(documents)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    count = len(ids) // seqlen
    if count == 0:
        raise SfmpError(
            f"evaluation text: expected at least {seqlen} tokens, found {len(ids)}; give longer text "
            "or a smaller seqlen"
        )
    return ids[: count * seqlen].view(count, seqlen), len(text.encode()) / len(ids)


def fingerprint(windows: torch.Tensor) -> str:
    """Return the sha256 (hex) of the token ids and their shape: two equal fingerprints are the same calibration
    data."""
    array = np.ascontiguousarray(windows.cpu().numpy().astype("<i8"))
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()


def save_windows(windows: torch.Tensor, path: str | Path, **meta: str | float) -> None:
    """Write windows and their description to one safetensors file (temporary file, then rename)."""
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    description = {"fingerprint": fingerprint(windows), **{key: str(value) for key, value in meta.items()}}
    # One key: safetensors writes several in an order of its own, and equal windows should be equal files.
    save_file({"windows": windows.contiguous()}, path.with_suffix(".tmp"), {"windows": json.dumps(description)})
    os.replace(path.with_suffix(".tmp"), path)


def load_windows(path: str | Path) -> tuple[torch.Tensor, dict[str, str]]:
    """Read what :func:`save_windows` wrote.

    Returns
    -------
    windows : int64 tensor [n, seqlen]
    meta : dict of str to str

    Raises
    ------
    SfmpError
        If there is no such file, or its fingerprint does not fit its content.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            windows, meta = file.get_tensor("windows"), json.loads((file.metadata() or {}).get("windows", "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        raise SfmpError(f"{path}: expected a file of windows, found {error}; make it again") from error
    if meta.get("fingerprint") != fingerprint(windows):
        found = fingerprint(windows)
        raise SfmpError(
            f"{path}: expected windows with fingerprint {meta.get('fingerprint')}, found {found}; make the file again"
        )
    return windows, meta
