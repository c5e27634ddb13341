"""Claims ledger: every claim of the paper, judged on our tables by one of a closed list of verdicts.

A claim is a row of ``config/claims.tsv``; its `rule` names a function of :mod:`sfmp.claim_rules` or
:mod:`sfmp.claim_rules_comparison`, and its `args` (one JSON object) are that function's keyword arguments.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from sfmp import claim_rules, claim_rules_comparison
from sfmp.checks import SfmpError
from sfmp.claim_rules import VERDICTS, control_first, outcome

RULES = claim_rules.RULES | claim_rules_comparison.RULES
NO_GPU_EVIDENCE = "no GPU evidence in results/reference/gpu; `python -m sfmp.bench kernels` makes it"
QUICK_GPU_EVIDENCE = "GPU evidence of a quick run; measure without --quick"

COLUMNS = [
    "claim",
    "paper_version",
    "where",
    "text",
    "kind",
    "experiment",
    "notebook",
    "result",
    "expected",
    "rule",
    "args",
    "tier_min",
    "gpu_needed",
    "time",
]


def read_claims(path) -> pd.DataFrame:
    """Read and check ``claims.tsv``: exact columns, unique ids, known rules, JSON arguments, at most 25
    words of text.

    Raises
    ------
    SfmpError
        Naming the claim and what is wrong with it.
    """
    frame = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, quoting=3)
    if list(frame.columns) != COLUMNS:
        raise SfmpError(f"{path}: expected the columns {COLUMNS}, found {list(frame.columns)}.")
    if frame.claim.duplicated().any():
        raise SfmpError(f"{path}: claims {sorted(frame.claim[frame.claim.duplicated()])} are listed twice.")
    for row in frame.itertuples():
        if row.rule not in RULES:
            raise SfmpError(
                f"{path}: claim {row.claim}: rule {row.rule!r} is unknown; expected one of {sorted(RULES)}."
            )
        if len(row.text.split()) > 25:
            raise SfmpError(
                f"{path}: claim {row.claim}: the text has {len(row.text.split())} words; at most 25 allowed."
            )
        _arguments(path, row)
    return frame


def _arguments(path, row) -> dict:
    try:
        args = json.loads(row.args)
    except json.JSONDecodeError as error:
        raise SfmpError(
            f"{path}: claim {row.claim}: args must be one JSON object, found {row.args!r}."
        ) from error
    if not isinstance(args, dict):
        raise SfmpError(f"{path}: claim {row.claim}: args must be one JSON object, found {row.args!r}.")
    return args


def load_tables(paths, **more: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Read result tables (CSV files, or folders of them) by file stem; `more` adds frames that were
    computed on the spot.
    """
    files = [
        file
        for path in map(Path, paths)
        for file in (sorted(path.glob("*.csv")) if path.is_dir() else [path])
    ]
    found = {file.stem: pd.read_csv(file) for file in files}
    for file in files:
        found[file.stem].attrs["manifest"] = f"{file.name}.manifest.json"
    return found | more


def allocation_speed(blocks: int = 1_000_000, seed: int = 0) -> pd.DataFrame:
    """Time one allocation of `blocks` log-normal saliences to levels 2, 3, 4: columns `blocks`, `seconds`."""
    from sfmp.allocate import allocate

    salience = np.random.default_rng(seed).lognormal(sigma=2.0, size=blocks)
    losses = salience[:, None] / (2.0 ** np.array([2, 3, 4]) - 1) ** 2
    began = time.perf_counter()
    allocate(losses, np.ones(blocks, dtype=np.int64), (2, 3, 4), int(2.75 * blocks), salience)
    frame = pd.DataFrame({"blocks": [blocks], "seconds": [time.perf_counter() - began]})
    frame.attrs["manifest"] = "claims.csv.manifest.json"  # measured by the notebook that writes the ledger
    return frame


def evaluate(claims, tables: Mapping[str, pd.DataFrame], paper: pd.DataFrame) -> pd.DataFrame:
    """Judge every claim.

    Parameters
    ----------
    claims : path-like
        ``config/claims.tsv``.
    tables : mapping of str to pandas.DataFrame
        Tables by file stem, as ``{"e1_main": ..., "e3_reorder": ...}``.
    paper : pandas.DataFrame
        From :func:`sfmp.tables.read_paper_values`; words ``paper:<id>`` of `expected` are replaced by its
        numbers.

    Returns
    -------
    pandas.DataFrame
        The ledger's columns plus `ours` (k/n and the size of the effect), `verdict` and `manifest`, in
        ledger order.

    Notes
    -----
    Controls first: where the main table has no fp row, nothing measured can be judged, and every rule that
    reads tables returns ``not-run (no fp control)``. A claim whose control is beaten by a quantized run is
    shown by its own row. Claims that need a GPU are not-run while ``e4_gpu_conditions`` is empty, for nothing was
    measured on one, or says that a run was quick.
    """
    ledger, judged = read_claims(claims), []
    ledger["expected"] = [_resolve(text, paper) for text in ledger.expected]
    gate = control_first(tables, table="e1_main")["verdict"].startswith("not-run")
    open_on_gpu = _open_on_gpu(tables.get("e4_gpu_conditions", pd.DataFrame()))
    for row in ledger.itertuples():
        free = row.rule in ("not_run", "not_possible_here")
        args = _arguments(claims, row)
        if gate and not free:
            result = outcome("not-run", "", "no fp control")
        elif row.gpu_needed == "yes" and open_on_gpu and not free:
            result = outcome("not-run", "", open_on_gpu)
        else:
            result = RULES[row.rule](tables, **args)
        table = tables.get(args.get("table"))
        judged.append({**result, "manifest": "" if table is None else table.attrs.get("manifest", "")})
    return pd.concat([ledger, pd.DataFrame(judged, columns=["ours", "verdict", "manifest"])], axis=1)


def _open_on_gpu(conditions: pd.DataFrame) -> str:
    """Why no claim about a GPU can be judged, or ""."""
    if conditions.empty:
        return NO_GPU_EVIDENCE
    quick = conditions.value[conditions.what == "quick"].astype(str).str.startswith("yes")
    return QUICK_GPU_EVIDENCE if quick.any() else ""


def _resolve(text: str, paper: pd.DataFrame) -> str:
    def number(match):
        found = paper[paper.id == match[1]]
        if found.empty:
            raise SfmpError(
                f"claims: expected value {match[0]!r} is not in paper_values.tsv; add it or correct its id."
            )
        return f"{found.value.iloc[0]:g} {found.unit.iloc[0]}"

    return re.sub(r"paper:(\S+)", number, text)


def summary(judged: pd.DataFrame) -> pd.DataFrame:
    """Count verdicts (without their reasons), in the order of the closed list."""
    kinds = judged.verdict.str.split(" ").str[0]
    return pd.DataFrame({"verdict": VERDICTS, "claims": [int((kinds == v).sum()) for v in VERDICTS]})
