"""What tells one tier from another: where its jobs find models and data, what must be known before it runs, and the
first and the last words of a run. No torch.
"""

from __future__ import annotations

import csv
import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from sfmp import places
from sfmp.checks import SfmpError
from sfmp.design import Design, read_yaml
from sfmp.locks import release_stale_lock
from sfmp.tier_cost import cost_words

TIERS = ("embedded", "small", "paper")
TEXTS = ("c4", "wikitext2")  # calibration and evaluation of models of the Hub, see sfmp.stages


def roots(design: Design) -> dict[str, str | None]:
    """Return the folders with local copies of ``data`` and ``models``, None where they come from the Hub."""
    return {kind: (design.config.get(kind) or {}).get("root") for kind in ("data", "models")}


def environment(design: Design) -> str:
    """Return assignments of shell variables for every job of a tier (see `sfmp.places`).

    No network is used in the embedded tier, nor where both roots are set.
    """
    if design.tier == "embedded":
        return "HF_HUB_OFFLINE=1"
    root = roots(design)
    found = {places.DEVICE: design.config["device"], places.DTYPE: design.config.get("dtype", "float32"),
             places.DATA_ROOT: _absolute(root["data"]), places.MODELS_ROOT: _absolute(root["models"])}
    if all(root.values()):
        found["HF_HUB_OFFLINE"] = "1"
    words = " ".join(f"{name}={shlex.quote(value)}" for name, value in found.items())
    return words.replace("{", "{{").replace("}", "}}")  # Snakemake formats the prefix of a shell command


def _absolute(path):
    # Symbolic links stay as they were given: on another node they may lead elsewhere.
    return str(Path(path).expanduser().absolute()) if path else ""


def local_files(design: Design, names: Iterable[str]) -> list[str]:
    """Return the local copies of data sets: inputs of the rules that read them. None in the embedded tier.

    Raises SfmpError if there is a data root and a copy is missing.
    """
    root = roots(design)["data"]
    if design.tier == "embedded" or not root:
        return []
    rows = [design.datasets[name] for name in names]
    return [str(places.local_data(row, _absolute(root), split)) for row in rows for split in places.splits(row)]


def unpinned(design: Design) -> list[str]:
    """Return what a tier reads from the Hub without a revision in ``config/models.tsv`` or ``config/datasets.tsv``.

    Local copies need none in the tier small. In the tier paper every model does, wherever its files are: numbers
    that are held against the paper's must say which weights they are of.
    """
    if design.tier == "embedded":
        return []
    root = roots(design)
    missing = [row["repository"] for row in design.models.values() if row["revision"] == "-"
               and (design.tier == "paper" or not root["models"])]
    used = dict.fromkeys((*TEXTS, *design.config["tasks"])) if not root["data"] else ()
    return missing + [name for name in used if design.datasets[name]["revision"] == "-"]


def short(design: Design) -> list[str]:
    """Return the copies that have fewer rows than the tier paper reads from the Hub, and in which it would cut other
    windows. Copies that are not there yet are not short; other tiers may use what there is.
    """
    root = roots(design)["data"]
    if design.tier != "paper" or not root:
        return []
    copies = {name: places.copy_of(design.datasets[name], _absolute(root)) for name in TEXTS}
    return [f"{design.datasets[name]['rows']} rows in {path}, found {found}" for name, path in copies.items()
            if path.is_file() and design.datasets[name]["rows"] != "-"
            and (found := path.read_bytes().count(b"\n")) < int(design.datasets[name]["rows"])]


def begin(design: Design, dryrun: bool) -> None:
    """Say what a dry run's jobs would cost, and whether they would be refused; release the lock of a killed run."""
    if dryrun:
        needs = [f"before it can run: sfmp pin --tier {design.tier}"] if unpinned(design) else []
        print(cost_words(design), *needs, sep="\n  ", file=sys.stderr)
    elif released := release_stale_lock():
        print(released, file=sys.stderr)


def check_ready(design: Design) -> None:
    """Refuse to run a tier that no one could run again: raises SfmpError naming what has no revision, or is short."""
    if missing := unpinned(design):
        raise SfmpError(
            f"tier {design.tier}: expected a revision of {', '.join(dict.fromkeys(missing))}, found none in "
            f"config/models.tsv and config/datasets.tsv; where there is a network run: sfmp pin --tier {design.tier}"
        )
    if fewer := short(design):
        raise SfmpError(f"tier {design.tier}: expected {fewer[0]}; remove it and copy it again: sfmp fetch")


def closing_words(design: Design, seconds: float | None = None, failed: bool = False) -> str:
    """Return what is printed at the end: what ran, how long, where results are, what a bigger tier needs."""
    stages: dict[str, dict[str, float]] = {}
    for path in sorted(Path(design.results).rglob("*.manifest.json")):
        text = path.read_text(encoding="utf-8")  # the same beside every result of one execution
        manifest = json.loads(text)
        stages.setdefault(manifest["notebook"], {})[text] = manifest["wall_seconds"]
    lines = [
        "",
        f"SFMP replication, tier {design.tier}: "
        + ("STOPPED; the failing rule's log is above, the same command continues" if failed else "done")
        + (f" after {seconds:.0f} s" if seconds is not None else ""),
    ]
    lines += [
        f"  {name:<24}{len(times):4} notebook runs {sum(times.values()):8.0f} s"
        for name, times in sorted(stages.items())
    ]
    claims = Path(design.results) / "claims.csv"
    if claims.is_file():
        with open(claims, encoding="utf-8", newline="") as file:
            verdicts = Counter(row.get("verdict", "").split(" (")[0] for row in csv.DictReader(file))
        counts = (f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
        lines.append(f"  claims    {', '.join(counts)}")
    lines += [
        f"  results   {design.results}/tables, figures, claims.csv, html/index.html, report.html",
        "  evidence  every result has a manifest beside it: <file>.manifest.json",
    ]
    for path in (design.folder / "tiers" / f"{tier}.yaml" for tier in TIERS):
        needs = read_yaml(path)["needs"]
        if path.stem != design.tier:
            lines.append(
                f"  tier {path.stem} ({needs['status']} here): {needs['hardware']}; disk {needs['disk']}; "
                f"time {needs['time']}\n    its plan: snakemake -n --config tier={path.stem}"
            )
    return "\n".join(lines)
