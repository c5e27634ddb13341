"""Commands of rules/downloads.smk: copies of a tier's models and data sets. No torch."""

from __future__ import annotations

import shlex
from pathlib import Path

from sfmp import places
from sfmp.design import Design
from sfmp.tiers import TEXTS, roots


def model_command(design: Design, model: str) -> str:
    """Return the command that copies one model at its revision to the models root, or to the cache of the Hub."""
    row, root = design.models[model], roots(design)["models"]
    folder = Path(root).expanduser() / row["repository"] if root else None
    return places.download(row["repository"], None if row["revision"] == "-" else row["revision"], folder)


def data_command(design: Design) -> str:
    """Return the command that copies what a tier reads to the data root; without one, a word that says so."""
    root = roots(design)["data"]
    if not root:
        return "echo no data.root: jobs read data sets from the Hub"
    names = dict.fromkeys((*TEXTS, *design.config["tasks"]))
    return shlex.join(["python", "-m", "sfmp", "fetch", *names, "--data-root", str(Path(root).expanduser())])
