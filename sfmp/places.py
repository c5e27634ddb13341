"""Where this machine has models and data, and where its jobs compute: environment variables, no torch.

The workflow sets them from its configuration (``data.root``, ``models.root``, ``device``, ``dtype``); they serve the
command line as well. Without them everything comes from the Hub and computes in float32 on the CPU.
"""

from __future__ import annotations

import json
import os
import shlex
import warnings
from pathlib import Path

from sfmp.checks import SfmpError
from sfmp.code_hash import ROOT
from sfmp.design import read_table
from sfmp.notebook_paths import base_directory

DATA_ROOT, MODELS_ROOT = "SFMP_DATA_ROOT", "SFMP_MODELS_ROOT"
DEVICE, DTYPE = "SFMP_DEVICE", "SFMP_DTYPE"


def placement() -> tuple[str, str]:
    """Return device (``cpu``, ``cuda`` or ``spread``) and dtype of the models that a job of the workflow loads."""
    return os.environ.get(DEVICE) or "cpu", os.environ.get(DTYPE) or "float32"


def local_model(repository: str, revision: str | None = None, root: str | None = None) -> Path | None:
    """Return the folder with the copy of a model, None where models come from the Hub.

    Parameters
    ----------
    repository : str
        ``owner/name``.
    revision : str, optional
        Commit that is asked for.
    root : str, optional
        Folder that holds ``owner/name`` or ``name``; the environment's by default.

    Raises
    ------
    SfmpError
        There is a root but no such model in it, its folder says that it is another revision, or it is not whole.
    """
    root = os.environ.get(MODELS_ROOT) if root is None else root
    if not root:
        return None
    places = [Path(root, repository), Path(root, repository.rpartition("/")[2])]
    found = next((folder for folder in places if (folder / "config.json").is_file()), None)
    if found is None:
        raise SfmpError(f"models.root: expected config.json in {places[0]}, found none; where there is a network: "
                        f"{download(repository, revision, places[0])}")
    known = copied_revision(found)
    if revision and known and known != revision:
        raise SfmpError(f"{found}: expected revision {revision} of {repository}, found {known}; copy the one that "
                        "config/models.tsv names, or change it there")
    if revision and not known:
        warnings.warn(f"{found}: no note of its revision, as hf download --local-dir leaves one; taken for {revision} "
                      f"of {repository}", stacklevel=3)
    if missing := _missing(found):
        raise SfmpError(f"{found}: expected a whole copy of {repository}, found {missing}; copy it again: "
                        f"{download(repository, revision, found)}")
    return found


def download(repository: str, revision: str | None, folder=None) -> str:
    """Return the command that copies a model, without the second copy of the weights that some repositories hold."""
    words = ["hf", "download", repository, *(["--revision", revision] if revision else []), "--exclude", "original/*"]
    return shlex.join([*words, *(["--local-dir", str(folder)] if folder else [])])


def _missing(folder):
    """What a copy of a model lacks: weights, a tokenizer, or the end of a file; "" if it is whole."""
    index = folder / "model.safetensors.index.json"
    try:
        shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values())) if index.is_file() else []
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"no list of weights in {index.name}"
    if not shards and (folder / "model.safetensors").is_file():
        shards = ["model.safetensors"]
    if not shards and not any(folder.glob("pytorch_model*.bin")):
        return "no weights"
    for name in shards:
        if not (folder / name).is_file():
            return f"no {name}"
        if not _has_its_end(folder / name):
            return f"{name} cut off or damaged"
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
    return "" if any((folder / name).is_file() for name in names) else "no tokenizer"


def _has_its_end(path):
    """Whether a safetensors file is as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            return False
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size == 8 + length + max(ends, default=0)


def copied_revision(folder: Path) -> str | None:
    """Return the revision that ``hf download --local-dir`` noted beside its files, None where there is no note."""
    note = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    lines = note.read_text("utf-8").split() if note.is_file() else []
    return lines[0] if lines else None


def dataset(name: str) -> dict[str, str]:
    """Return the row of ``config/datasets.tsv`` of this name; raises SfmpError if there is none."""
    path = base_directory() / "config" / "datasets.tsv"
    rows = read_table(path) if path.is_file() else []
    if not rows or "dataset" not in rows[0]:  # none here, or that of another project
        path = ROOT / "config" / "datasets.tsv"
        if not path.is_file():
            raise SfmpError(f"data set {name!r}: expected config/datasets.tsv in the working directory, found none; an "
                            "installed package does not carry it: run this in a clone of the repository")
        rows = read_table(path)
    for row in rows:
        if row["dataset"] == name:
            return row
    raise SfmpError(f"data set {name!r}: expected one of {', '.join(row['dataset'] for row in rows)}; choose one")


def local_data(row: dict[str, str], root: str | None = None, split: str | None = None) -> Path | None:
    """Return the file with the local copy of a data set, None where data come from the Hub.

    Parameters
    ----------
    row : dict
        Of ``config/datasets.tsv``.
    root : str, optional
        Folder that column `local` is relative to; the environment's by default.
    split : str, optional
        That of the worked examples, which lie in a file of their own; by default what is scored or read.

    Raises
    ------
    SfmpError
        There is a root but no such file in it, or no local copy of this data set can be read.
    """
    root = os.environ.get(DATA_ROOT) if root is None else root
    if not root:
        return None
    if row["local"] == "-":
        raise SfmpError(f"data set {row['dataset']}: local copies of it are not read; leave it out, or fill the cache "
                        "of the Hub (HF_HOME) where there is a network and unset data.root")
    path = copy_of(row, root, split)
    if not path.is_file():
        raise SfmpError(f"data.root: expected {row['dataset']} as {path}, found no such file; where there is a "
                        f"network: sfmp fetch {row['dataset']} --data-root {root}")
    return path


def copy_of(row: dict[str, str], root, split: str | None = None) -> Path:
    """Return where the local copy of a data set is to be, or that of its worked examples."""
    path = Path(root, row["local"])
    return path if split in (None, row["split"]) else path.with_suffix(f".{split}{path.suffix}")


def splits(row: dict[str, str]) -> list[str]:
    """Return the splits of a data set that are read, each a file of a local copy: the rows, and worked examples."""
    return [row["split"], *([row["shot_split"]] if row["shot_split"] != "-" else [])]


def whole(row: dict[str, str], found: list, where, split: str | None = None) -> list:
    """Return the rows of a copy that are read: all, or the first ones where a tier reads no more.

    Parameters
    ----------
    row : dict
        Of ``config/datasets.tsv``.
    found : list
        Rows of the copy.
    where : path
        Named in errors.
    split : str, optional
        As in `local_data`.

    Raises
    ------
    SfmpError
        The copy has more or fewer rows than the data set. Where only the first are read, a copy with fewer is
        warned of: it gives other windows.
    """
    count = row["count"] if split in (None, row["split"]) else row["shot_count"]
    if count != "-" and len(found) != int(count):
        raise SfmpError(f"{where}: expected the {count} rows of {row['dataset']} ({split or row['split']}), found "
                        f"{len(found)}; remove it and copy it again: sfmp fetch {row['dataset']}")
    if row["rows"] == "-":
        return found
    if len(found) < int(row["rows"]):
        warnings.warn(f"{where}: {len(found)} rows, where {row['rows']} of {row['dataset']} are read from the Hub; "
                      "windows cut from these are other windows", stacklevel=3)
    return found[:int(row["rows"])]


def text(name: str) -> tuple[dict[str, str], str]:
    """Return a text's row of ``config/datasets.tsv`` and its source for `sfmp.data.load_text`: a file or the Hub.

    Raises SfmpError if it is no text, or there is a data root and no copy in it.
    """
    row = dataset(name)
    if row["kind"] != "text":
        raise SfmpError(f"data set {name!r}: expected a text, found a {row['kind']}; see config/datasets.tsv")
    if (path := local_data(row)) is not None:
        return row, str(path)
    warn_unpinned(row)
    return row, hub_source(row)


def warn_unpinned(row: dict[str, str]) -> None:
    """Say so if what the Hub has today is read, which tomorrow may be something else."""
    if row["revision"] == "-":
        warnings.warn(f"data set {row['dataset']}: no revision in config/datasets.tsv, so what the Hub has today is "
                      "read; sfmp pin writes one", stacklevel=3)


def hub_source(row: dict[str, str]) -> str:
    """Return ``hub:ID[:CONFIG]:SPLIT[@REVISION][#FILE]`` of a text, whatever is on this machine."""
    config = "" if row["config"] == "-" else f":{row['config']}"
    rows = "" if row["rows"] == "-" else f"[:{row['rows']}]"
    revision = "" if row["revision"] == "-" else f"@{row['revision']}"
    file = "" if row["file"] == "-" else f"#{row['file']}"
    return f"hub:{row['source']}{config}:{row['split']}{rows}{revision}{file}"
