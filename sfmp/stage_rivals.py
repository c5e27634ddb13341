"""One run of a rival: from its row in config/runs.tsv to a quantized model, a checkpoint and a record."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from sfmp import baselines
from sfmp.accounting import quantization_record, tensor_sizes
from sfmp.baselines import amq, bitstack, efficient_qat, slim_llm
from sfmp.baselines.bitstack_linear import level_bytes
from sfmp.cost import CostRecord
from sfmp.hf import save_checkpoint
from sfmp.linear import StoredLinear
from sfmp.salience import fisher_salience, linear_modules, load_salience

MIXED = "sfmp-"  # prefix: the same quantizer with SFMP's mixed widths
PLANNED = ("scalebits", "sfmp-efficient_qat", "layer_wise", "element")  # decide by a salience that is given to them
# Not knobs but what the run is: the controls of granularity round to nearest, so that nothing repairs a bad choice.
FIXED = {"sfmp-efficient_qat": {"mixed": True}, "layer_wise": {"method": "rtn"}}
# Bits per weight: SliM-LLM's exchanges keep the mean, AMQ publishes a tolerance. METHOD.md sections 2.3 and 2.4
TOLERANCES = {"slim_llm": 1e-9, "amq": 0.005}
OURS = ("scalebits",)  # no settings are published (METHOD.md section 2.9): the full ones are ours
# Amounts that windows limit, and by which axis of [n, seqlen]; null is all.
LIMITED = {"n_windows": 0, "sba_windows": 0, "sort_windows": 0, "refresh_windows": 0, "e2e_windows": 0, "n_tokens": 1,
           "sba_tokens": 1}
# Tokens of a window in the publication, of methods without a knob for it (AMQ has one).
FULL_TOKENS = {"slim_llm": slim_llm.FULL_TOKENS, "bitstack": bitstack.FULL_TOKENS,
               "efficient_qat": efficient_qat.FULL_TOKENS}


def quantize(job, model, windows, method: str, settings: Mapping, knobs: Mapping, seed: int = 0):
    """Quantize `model` in place as a row of the design says.

    Parameters
    ----------
    job : sfmp.provenance.Run
        Its input ``salience``, if declared, is what the methods of `PLANNED` decide by; they compute Fisher
        salience from `windows` if not. Its input ``search``, if declared, is a search of AMQ to choose from.
    model : nn.Module
    windows : Tensor int64 [n, seqlen]
    method : str
        Column `method` of the design.
    settings : mapping
        `bpw`, and `group_size`, `block_rows` where the row has them.
    knobs : mapping
        Keywords of the method; the rest keep their published values.
    seed : int

    Returns
    -------
    sfmp.baselines.outcome.Outcome
    """
    arguments = {**knobs, **settings, **FIXED.get(method, {})}
    bpw = arguments.pop("bpw")
    if method in PLANNED:
        given = "salience" in job.inputs
        arguments["salience"] = load_salience(job.inputs["salience"]) if given else fisher_salience(model, windows)
    if method == "amq" and "search" in job.inputs:
        arguments["found"] = job.inputs["search"]
    return baselines.quantize(method.removeprefix(MIXED), model, windows, bpw, seed=seed, **arguments)


def knob_table(method: str, knobs: Mapping, windows=None) -> pd.DataFrame:
    """Knobs used beside those of the publication.

    Parameters
    ----------
    method : str
    knobs : mapping
        Those given; all others are as published.
    windows : Tensor int64 [n, seqlen], optional
        What the run has. No more windows and tokens can be used, whatever was asked for.

    Returns
    -------
    pandas.DataFrame
        Columns `knob`, `used`, `published`, `reduced` (differs); one row for each given knob, and
        with `windows` one for the tokens of a window where a length is published. The settings of a method that
        has no published ones are marked as ours.
    """
    method = method.removeprefix(MIXED)
    published = {name: p.default for name, p in inspect.signature(baselines.methods()[method]).parameters.items()}
    rows = []
    for name, value in knobs.items():
        used, full = value, published[name]
        if windows is not None and name in LIMITED:
            axis = LIMITED[name]
            used = min(windows.shape[axis] if value is None else value, windows.shape[axis])
            if full is None:  # all there are; of tokens, all of a window of the publication
                full = FULL_TOKENS[method] if axis else windows.shape[axis]
        rows.append((name, used, published[name], used != full))
    if windows is not None and method in FULL_TOKENS:
        length, full = windows.shape[1], FULL_TOKENS[method]
        rows.append(("tokens of a window", length, full, length != full))
    if method in OURS:
        rows = [(name, used, f"{'–' if full is None else full} (ours)", reduced) for name, used, full, reduced in rows]
    return pd.DataFrame(rows, columns=["knob", "used", "published", "reduced"], dtype=object)


def search(model, windows, knobs: Mapping, seed: int = 0):
    """Search of AMQ, which serves every budget.

    Returns
    -------
    (sfmp.baselines.search_archive.Search, sfmp.cost.CostRecord)
    """
    cost = CostRecord()
    effort = {name: value for name, value in knobs.items() if name != "tolerance"}  # that is of the choice afterwards
    return amq.search(model, windows, seed=seed, cost=cost, **effort), cost


def cost_rows(job, outcome) -> list[dict]:
    """Stages of an outcome (:meth:`sfmp.cost.CostRecord.rows`), after those of the search it was given, if any:
    what the method costs for one budget.
    """
    path = job.inputs["search_cost"] if "search_cost" in job.inputs else None
    return [*(json.loads(path.read_text(encoding="utf-8"))["stages"] if path else []), *outcome.cost.rows()]


def cost_table(rows: list[dict]) -> pd.DataFrame:
    """What each stage cost here, and what it would cost with the published knobs on this model.

    Returns
    -------
    pandas.DataFrame
        Columns `stage, unit, units, unit_seconds, full_units, unit_scale` (how much dearer a unit is then) and
        `full_seconds`, their product.
    """
    frame = pd.DataFrame(rows)
    frame["unit_seconds"] = frame.wall_seconds / frame.units.where(frame.units > 0, 1)
    return frame[["stage", "unit", "units", "unit_seconds", "full_units", "unit_scale", "full_seconds"]]


def save(outcome, tokenizer, folder) -> Path:
    """Write the outcome's model as a Hugging Face folder that ``from_pretrained`` loads; complete or not at all.

    A method without a packed form (`element`) is written dense, with the weights it computed.
    """
    folder = Path(folder)
    if any(isinstance(module, StoredLinear) for module in outcome.model.modules()):
        return save_checkpoint(outcome.model, folder, tokenizer)
    new = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    try:
        outcome.model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def rival_record(folder, outcome, run: str, method: str, target: float) -> dict:
    """Describe one run of a rival; everything in it is deterministic (clocks live elsewhere).

    Parameters
    ----------
    folder : path-like
        The saved checkpoint.
    outcome : sfmp.baselines.outcome.Outcome
    run, method : str
        As in the design.
    target : float
        Budget that was asked for, bits per weight.

    Returns
    -------
    dict
        The keys of :func:`sfmp.accounting.quantization_record` and :func:`stored_record`, `target`, whether it was
        `reached` (never from above, from below within `bpw_tolerance`), and the `knobs` as text, with how many matrices
        had a choice at all where the method counts them (``with_choice``). `wbits` and
        `levels_used` are null for a method without codes of whole bits.
    """
    sizes = [_shape(module) for module in _quantized(outcome.model).values()]
    weights = sum(rows * columns for rows, columns in sizes)
    record = {"run": run, "bpw": float(outcome.bpw), "wbits": None, "bpw_tolerance": 1e-9}
    if outcome.plan is not None:
        record |= quantization_record(folder, outcome.plan, run)
    else:
        record |= {"bpw_stored": 8 * outcome.stored_bytes / weights,
                   "model_bytes": int(tensor_sizes(folder).bytes.sum()), "quantized_weights": weights,
                   "plan_hash": None, "levels_used": None}
    record["bpw_tolerance"] = _tolerance(method, outcome, sizes, record["bpw_tolerance"])
    gap, knobs = target - record["bpw"], dict(outcome.notes.get("knobs", {}))
    if "with_choice" in outcome.notes:
        knobs["with_choice"] = f"{outcome.notes['with_choice']}/{len(sizes)}"
    return {**record, **stored_record(outcome.stored_bytes, len(sizes), weights), "target": target,
            "reached": bool(-1e-9 <= gap <= record["bpw_tolerance"]),
            "knobs": json.dumps(knobs, sort_keys=True)}


def stored_record(stored: int, matrices: int, weights: int) -> dict:
    """`stored_bytes`, what the method itself has to store for its matrices; as bits per weight, `bpw_bytes`."""
    return {"matrices": matrices, "stored_bytes": int(stored), "bpw_bytes": 8 * stored / weights}


def _tolerance(method, outcome, sizes, planned):
    """How far below its budget a method may end: the largest step of what it decides, in bits per weight."""
    weights = sum(rows * columns for rows, columns in sizes)
    if method in TOLERANCES:
        return TOLERANCES[method]
    if method in ("layer_wise", "element"):
        levels = outcome.notes["knobs"]["levels"]
        unit = max(rows * columns for rows, columns in sizes) if method == "layer_wise" else 1
        steps = [high - low for low, high in zip(levels, levels[1:], strict=False)]
        return max(steps, default=0) * unit / weights + 1e-9
    if method == "scalebits":  # its greedy raises a block by one level at a time
        spec = outcome.plan.spec
        block = max(min(spec.block_rows, rows) * min(spec.group_size, columns) for rows, columns in sizes)
        return int(max(np.diff(spec.candidate_levels), default=0)) * block / weights + 1e-9
    if method == "bitstack":
        ranks = (module.rank for module in _quantized(outcome.model).values())
        return max(8 * level_bytes(*size, rank) / weights for size, rank in zip(sizes, ranks, strict=True))
    return planned


def _quantized(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with stored tensors; of a dense model the linear layers."""
    stored = {name: module for name, module in model.named_modules() if isinstance(module, StoredLinear)}
    return stored or linear_modules(model)


def _shape(module):
    return module.out_features, module.in_features
