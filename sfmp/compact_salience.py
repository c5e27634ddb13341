"""Salience reduced to what an allocation needs: permutations, block sums and losses, some kilobytes per matrix.

The maps themselves are four bytes per weight (28 GB for an 8B model). What is kept here fits one block shape and one
way of reordering; under it a plan can be made for any budget, any levels and any scope.

Source: METHOD.md sections 1.3, 1.4.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable

import numpy as np

from sfmp.allocate import BlockProblem, level_losses
from sfmp.checks import SfmpError, write_atomically
from sfmp.grid import BlockGrid
from sfmp.spec import QuantSpec

_PARTS = ("row_perm", "col_perm", "sums", "losses")
_FIXED = ("group_size", "block_rows", "reorder", "skip", "shared_columns")  # what the sums depend on


def save_problem(problem: BlockProblem, path) -> None:
    """Write a `BlockProblem` to one safetensors file, atomically."""
    from safetensors.numpy import save_file

    tensors = {}
    for name, (rows, columns) in problem.permuted.items():
        parts = zip(_PARTS, (rows, columns, problem.sums[name], problem.losses[name]), strict=True)
        tensors |= {f"{name}.{part}": np.ascontiguousarray(array) for part, array in parts}
    record = {"sfmp_compact_salience": json.dumps({"format_version": 1, "spec": problem.spec.to_dict()})}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=record))


def load_problem(path, spec: QuantSpec | None = None) -> BlockProblem:
    """Read what `save_problem` wrote.

    Parameters
    ----------
    path : path
    spec : QuantSpec, optional
        Another budget, levels, scope or method than it was written with.

    Returns
    -------
    BlockProblem
        Give it to `sfmp.allocate.solve`.

    Raises
    ------
    SfmpError
        The file is none such, or the block shape, the reordering or what is skipped differs; for
        ``objective="measured"`` also other levels, as their losses were never measured.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            meta = json.loads((file.metadata() or {}).get("sfmp_compact_salience", "null"))
            found = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise SfmpError(f"{path}: expected a file of save_problem, found {error}; compute the salience "
                        "again") from error
    if meta is None or meta.get("format_version") != 1:
        raise SfmpError(f"{path}: expected compact salience of format_version 1, found metadata {meta}")
    written = QuantSpec.from_dict(meta["spec"])
    spec = spec or written
    fixed = _FIXED if spec.objective == "paper" else (*_FIXED, "candidate_levels", "objective")
    for key in fixed:
        if getattr(spec, key) != getattr(written, key):
            raise SfmpError(f"{path}: expected {key}={getattr(spec, key)!r}, found salience reduced with "
                            f"{getattr(written, key)!r}; compute the salience again")
    problem = BlockProblem(spec, {}, {}, {}, {})
    for name in sorted({key.rpartition(".")[0] for key in found}):
        rows, columns, sums, losses = (found[f"{name}.{part}"] for part in _PARTS)
        grid = BlockGrid(len(rows), len(columns), spec.block_rows, spec.group_size)
        if spec.objective == "paper":
            losses = level_losses(name, None, rows, columns, grid, spec, None, sums)
        problem.permuted[name], problem.grids[name] = (rows, columns), grid
        problem.sums[name], problem.losses[name] = sums, losses
    return problem


def merged(problems: Iterable[BlockProblem]) -> BlockProblem:
    """Return one problem of the matrices of several, in the order of names; all must have one specification."""
    problems = list(problems)
    if len({problem.spec for problem in problems}) != 1:
        raise SfmpError("problems: expected at least one, all with the same specification; reduce them again")
    fields = {}
    for key in ("permuted", "grids", "sums", "losses"):
        together = {name: value for problem in problems for name, value in getattr(problem, key).items()}
        fields[key] = {name: together[name] for name in sorted(together)}
    return dataclasses.replace(problems[0], **fields)
