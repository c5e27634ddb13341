"""Where this machine has models and data, and where its jobs compute: environment variables, no torch.

The workflow sets them from its configuration (``data.root``, ``models.root``, ``device``, ``dtype``); they serve the
command line as well. Without them everything comes from the Hub and computes in float32 on the CPU.
"""

from __future__ import annotations

import os
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
        There is a root but no such model in it, or its folder says that it is another revision.
    """
    root = os.environ.get(MODELS_ROOT) if root is None else root
    if not root:
        return None
    places = [Path(root, repository), Path(root, repository.rpartition("/")[2])]
    found = next((folder for folder in places if (folder / "config.json").is_file()), None)
    if found is None:
        pin = f" --revision {revision}" if revision else ""
        raise SfmpError(f"models.root: expected config.json in {places[0]}, found none; where there is a network: "
                        f"hf download {repository}{pin} --local-dir {places[0]}")
    known = copied_revision(found)
    if revision and known and known != revision:
        raise SfmpError(f"{found}: expected revision {revision} of {repository}, found {known}; copy the one that "
                        "config/models.tsv names, or change it there")
    return found


def copied_revision(folder: Path) -> str | None:
    """Return the revision that ``hf download --local-dir`` noted beside its files, None where there is no note."""
    note = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    lines = note.read_text("utf-8").split() if note.is_file() else []
    return lines[0] if lines else None


def dataset(name: str) -> dict[str, str]:
    """Return the row of ``config/datasets.tsv`` of this name; raises SfmpError if there is none."""
    path = base_directory() / "config" / "datasets.tsv"
    rows = read_table(path if path.is_file() else ROOT / "config" / "datasets.tsv")
    for row in rows:
        if row["dataset"] == name:
            return row
    raise SfmpError(f"data set {name!r}: expected one of {', '.join(row['dataset'] for row in rows)}; choose one")


def local_data(row: dict[str, str], root: str | None = None) -> Path | None:
    """Return the file with the local copy of a data set, None where data come from the Hub.

    Parameters
    ----------
    row : dict
        Of ``config/datasets.tsv``.
    root : str, optional
        Folder that column `local` is relative to; the environment's by default.

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
    path = Path(root, row["local"])
    if not path.is_file():
        raise SfmpError(f"data.root: expected {row['dataset']} as {path}, found no such file; where there is a "
                        f"network: sfmp fetch {row['dataset']} --data-root {root}")
    return path


def text_source(name: str) -> str:
    """Return the source, as `sfmp.data.load_text` takes it, of a text of ``config/datasets.tsv``: a file or the Hub."""
    row = dataset(name)
    if row["kind"] != "text":
        raise SfmpError(f"data set {name!r}: expected a text, found a {row['kind']}; see config/datasets.tsv")
    if (path := local_data(row)) is not None:
        return str(path)
    return hub_source(row)


def hub_source(row: dict[str, str]) -> str:
    """Return ``hub:ID[:CONFIG]:SPLIT[@REVISION][#FILE]`` of a text, whatever is on this machine."""
    config = "" if row["config"] == "-" else f":{row['config']}"
    rows = "" if row["rows"] == "-" else f"[:{row['rows']}]"
    revision = "" if row["revision"] == "-" else f"@{row['revision']}"
    file = "" if row["file"] == "-" else f"#{row['file']}"
    return f"hub:{row['source']}{config}:{row['split']}{rows}{revision}{file}"
