"""The quantized checkpoint that notebooks on packing and integration look at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sfmp.allocate import make_plan
from sfmp.apply import quantize_model
from sfmp.hf import save_checkpoint
from sfmp.spec import QuantSpec
from sfmp.stages import load_model, salience, windows


def checkpoint(run, spec: Mapping | None = None) -> Path:
    """Folder of a quantized checkpoint: the declared input ``checkpoint``, or the embedded model quantized by
    rounding.

    `spec` holds fields of :class:`sfmp.spec.QuantSpec` for the stand-in.
    """
    if "checkpoint" in run.inputs:
        return run.inputs["checkpoint"]

    model, tokenizer = load_model("embedded")
    chosen = {"bpw": 3.0, "group_size": 128, "block_rows": 64, "method": "rtn", **(spec or {})}
    plan = make_plan(salience(run, model, tokenizer), QuantSpec.from_dict(chosen), model)
    quantize_model(model, plan, windows(run, tokenizer))
    return save_checkpoint(model, run.out["stand-in"], tokenizer)
