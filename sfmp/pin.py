"""First contact with the Hub: write the revisions that a tier is to use, copy its data for machines without network.

Revisions are commits of repositories. They stand in ``config/models.tsv`` and ``config/datasets.tsv``; a ``-`` there is
replaced by the commit that ``main`` is at now, and from then on everyone who has the file reads the same content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from sfmp import places
from sfmp.checks import SfmpError, write_atomically
from sfmp.design import read_table
from sfmp.standard_tasks import STOCK, stock_parts

COMMIT = re.compile(r"[0-9a-f]{40}")


def pin(folder="config", tier: str | None = None, again: bool = False) -> list[tuple[str, str]]:
    """Write revisions into the tables of models and data sets.

    Parameters
    ----------
    folder : path
        That holds ``models.tsv`` and ``datasets.tsv``.
    tier : str, optional
        Models of this tier only. Data sets serve all tiers.
    again : bool
        Also replace revisions that are there.

    Returns
    -------
    list of (repository, revision)
        What was written; data sets have ``datasets/`` before their name.

    Raises
    ------
    SfmpError
        A table is missing, or the Hub does not say a revision; the tables are then as they were.
    """
    texts, found = {}, {}
    for name, kind in (("models", "model"), ("datasets", "dataset")):
        path = Path(folder, f"{name}.tsv")
        for row in read_table(path):
            wanted = row["source"] != "embedded" and (kind == "dataset" or tier in (None, row["tier"]))
            if wanted and (again or row["revision"] == "-"):
                key = kind, row["source"]
                found[key] = found.get(key) or _revision(*key)
        texts[path] = _rewritten(path, kind, tier, again, found)
    for path, text in texts.items():
        write_atomically(path, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
    return [(name if kind == "model" else f"datasets/{name}", commit) for (kind, name), commit in found.items()]


def _revision(kind, repository):
    """Commit that ``main`` of a repository is at."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    api = HfApi()
    ask = api.model_info if kind == "model" else api.dataset_info
    try:
        commit = ask(repository, revision="main", timeout=30).sha
    except (HTTPError, OfflineModeIsEnabled, OSError) as error:  # no network, in all its forms
        raise SfmpError(f"{repository}: expected the Hub to say its revision, found {type(error).__name__}: "
                        f"{(str(error).splitlines() or [''])[0]}; run this where there is a network, logged in "
                        "(hf auth login) if it is gated") from error
    if not COMMIT.fullmatch(commit or ""):
        raise SfmpError(f"{repository}: expected a commit of 40 hexadecimal digits from the Hub, found {commit!r}; try "
                        "again")
    return commit


def _rewritten(path, kind, tier, again, found):
    """Text of a table with the revisions that were found; every other character stays."""
    lines, header = [], None
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = line.split("\t")
        if line.startswith("#") or header is None:
            header = header or (cells if not line.startswith("#") else None)
        else:
            row = dict(zip(header, cells, strict=True))
            commit = found.get((kind, row["source"]))
            chosen = kind == "dataset" or tier in (None, row["tier"])
            if commit and chosen and (again or row["revision"] == "-"):
                cells[header.index("revision")] = commit
        lines.append("\t".join(cells))
    return "\n".join(lines) + "\n"


def fetch(names: Sequence[str], root) -> list[Path]:
    """Copy data sets of the Hub to where a data root has them; tasks with the columns the Hub has.

    Parameters
    ----------
    names : sequence of str
        Rows of ``config/datasets.tsv``.
    root : path
        Folder that column `local` is relative to.

    Returns
    -------
    list of Path
        The files, written atomically; those that are there already are left alone and not named.

    Raises
    ------
    SfmpError
        A name is unknown, has no revision or no local form, or the Hub does not give it.
    """
    rows = [places.dataset(name) for name in names]
    for row in rows:
        if row["revision"] == "-" or row["local"] == "-":
            what = "a revision" if row["revision"] == "-" else "a local form"
            raise SfmpError(f"data set {row['dataset']}: expected {what} in config/datasets.tsv, found none; run sfmp "
                            "pin first, or leave it out")
    written = []
    for row in rows:
        for split in places.splits(row):
            path = places.copy_of(row, root, split)
            if path.is_file():
                continue
            found = places.whole(row, _rows(row, split), row["source"], split)
            text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in found)
            write_atomically(path, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
            written.append(path)
    return written


def _rows(row, split):
    """Rows of a data set of the Hub: of a text its field ``text``, of a task everything."""
    from sfmp import data

    if row["kind"] == "text":
        return [{"text": text} for text in data.load_text(places.hub_source(row), blank=True)]
    if row["dataset"] not in STOCK:
        raise SfmpError(f"data set {row['dataset']}: expected a task of lm-eval ({', '.join(STOCK)}); correct its name")

    def read(config):
        return map(dict, data.read_hub(row["source"], config, split, row["revision"]))

    parts = [subject for _, subject in stock_parts(row["dataset"]).values()]
    if parts != [None]:  # read as lm-eval reads them, one after the other
        return [{**one, "subject": subject} for subject in parts for one in read(subject)]
    return list(read(None if row["config"] == "-" else row["config"]))
