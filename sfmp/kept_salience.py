"""A folder with reduced salience, for more than one budget: what is expensive is measured once.

It holds the block sums (`sfmp.compact_salience`) and what they were made from, in the form of `sfmp.resume`.

Source: METHOD.md section 1.4 (one salience serves every budget).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from sfmp.allocate import BlockProblem, solve
from sfmp.checks import SfmpError
from sfmp.compact_salience import load_problem, save_problem
from sfmp.resume import differences
from sfmp.spec import Plan, QuantSpec

_BLOCKS, _IDENTITY = "blocks.safetensors", "identity.json"
_OF_THE_CHECKPOINT = ("specification", "origin", "max_shard_size")  # salience does not depend on these


def identity_of_salience(identity: Mapping[str, str], spec: QuantSpec) -> dict[str, str]:
    """Return the part of `sfmp.resume.fingerprint` that decides salience, and the seed."""
    return {**{key: value for key, value in identity.items() if key not in _OF_THE_CHECKPOINT}, "seed": str(spec.seed)}


def kept_plan(folder, spec: QuantSpec, identity: Mapping[str, str]) -> Plan | None:
    """Return the plan that a folder's salience gives under a specification; None if there is no such folder.

    Raises
    ------
    SfmpError
        The folder is none of `keep`, was made from something else (named), or for blocks of another shape.
    """
    folder = Path(folder)
    if not folder.exists():
        return None
    try:
        before = json.loads((folder / _IDENTITY).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SfmpError(f"{folder}: expected salience that an earlier run kept, found {error}; name another folder"
                        ) from error
    if wrong := differences(before, identity):
        raise SfmpError(f"{folder}: expected salience of this model and calibration, found another: {wrong}. Name "
                        "another folder, or remove it to measure again")
    return solve(load_problem(folder / _BLOCKS, spec))


def keep(problem: BlockProblem, folder, identity: Mapping[str, str]) -> None:
    """Write reduced salience and what it was made from; the folder appears whole."""
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_problem(problem, temporary / _BLOCKS)
        (temporary / _IDENTITY).write_text(json.dumps(dict(identity), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
