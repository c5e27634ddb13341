"""What was measured on a GPU: JSON files of ``python -m sfmp.bench kernels`` and ``decode``, and measuring here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from sfmp.checks import SfmpError
from sfmp.notebook_paths import base_directory

COMMANDS = {"kernels": "python -m sfmp.bench kernels", "decode": "python -m sfmp.bench decode"}
VERSIONS = ("python", "torch", "numba", "numba-cuda", "cuda-bindings", "numpy", "triton", "gemlite", "transformers")
QUICK_SECONDS = 120  # after which no further part is begun
LEAST_ROUNDS = 7  # of a session that may be quoted


def read_evidence(paths: Mapping[str, Path | str]) -> dict[str, dict]:
    """Read what was measured on a GPU.

    Parameters
    ----------
    paths : Mapping
        "kernels" and "decode" → file; either may be missing.

    Returns
    -------
    dict, the same keys → content of the file

    Raises
    ------
    SfmpError
        A file is no such result, or was measured without a GPU.
    """
    found = {}
    for name, path in paths.items():
        try:
            found[name] = json.loads(Path(path).read_text("utf-8"))
            device, parts = found[name]["device"], found[name]["parts"]
            gpu = device["capability"] is not None
            whole = all("part" in part and ("failed" in part or "rows" in part) for part in parts)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SfmpError(f"{path}: expected a result of `{COMMANDS[name]}`, found {error!r}; measure again"
                            ) from error
        if not gpu:
            raise SfmpError(f"{path}: expected times of a GPU, found device {device.get('name')!r}; measure on a GPU")
        if not whole:
            raise SfmpError(f"{path}: expected rows in every part, found a part without; measure again")
    return found


def conditions(evidence: Mapping[str, dict]) -> pd.DataFrame:
    """Where and how each file was measured: `file, what, value`; no rows without evidence."""
    found = []
    for name, bench in evidence.items():
        device, versions, ceilings = bench["device"], bench.get("versions") or {}, bench.get("ceilings") or {}
        told = {
            "device": device.get("name"), "capability": ".".join(map(str, device["capability"])),
            "driver": device.get("driver"), "multiprocessors": device.get("multiprocessors"),
            "memory": None if device.get("memory_bytes") is None else f"{device['memory_bytes'] / 2**30:.0f} GB",
            "clocks": device.get("clocks"), "date": bench.get("date"), "commit": bench.get("commit"),
            "uncommitted changes": bench.get("dirty"), "command": bench.get("command"),
            "quick": "yes: not to be quoted" if (bench.get("settings") or {}).get("rounds", 0) < LEAST_ROUNDS else "no",
            "settings": bench.get("settings"), **ceilings,
            **{package: versions.get(package) or "not installed" for package in VERSIONS},
        }
        found += [(name, what, _text(value)) for what, value in told.items()]
    return pd.DataFrame(found, columns=["file", "what", "value"])


def _text(value):
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "unknown" if value is None else str(value)


def not_measured(evidence: Mapping[str, dict]) -> pd.DataFrame:
    """Peers and parts that a file could not measure, and why: `file, what, why`; also a file that is not there."""
    found = [(name, "everything", f"no {name}.json; `{command}` on a GPU makes it")
             for name, command in COMMANDS.items() if name not in evidence]
    for name, bench in evidence.items():
        found += [(name, peer, why) for peer, why in (bench.get("absent") or {}).items()]
        for part in bench["parts"]:
            named = " ".join([part["part"], shape_of(part), str(part.get("model") or "")]).strip()
            found += [(name, named, str(part["failed"]))] if "failed" in part else []
            found += [(name, f"{named}: {peer}", why) for peer, why in (part.get("absent") or {}).items()]
    return pd.DataFrame(found, columns=["file", "what", "why"])


def shape_of(part) -> str:
    """"out×in" of a part; "" if it has no shape."""
    return "×".join(map(str, part.get("shape") or ()))


def rows_of(evidence, name, file="kernels") -> list[tuple[dict, list]]:
    """(part, its rows) of every part of this name that was measured; of one that failed, what it measured before."""
    parts = evidence[file]["parts"] if file in evidence else []
    return [(part, part["rows"]) for part in parts if part["part"] == name and "rows" in part]


def measure_here() -> dict[str, dict]:
    """Measure the kernels on the GPU of this machine, quickly, into ``results/scratch/gpu``; {} where there is none.

    Jobs that run beside this one disturb what it measures: it shows that the kernels run here, and about how fast.

    Raises
    ------
    SfmpError
        There is a GPU and the bench failed.
    """
    import torch

    import kernels_numba

    available = kernels_numba.available()["cuda"]
    if not torch.cuda.is_available() or not available.startswith("yes"):
        reason = available if torch.cuda.is_available() else "no GPU here"
        print(f"not measured on this machine: {reason}")
        return {}
    path = base_directory() / "results" / "scratch" / "gpu" / "kernels.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    options = ["--quick", "--limit", str(QUICK_SECONDS), "--out", str(path)]
    command = [sys.executable, "-m", "sfmp.bench", "kernels", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if not path.exists():  # a part that failed is told by the file
        raise SfmpError(f"`{' '.join(command[1:])}`: expected times, found {done.stderr[-600:]!r}; run it by hand")
    return read_evidence({"kernels": path})
