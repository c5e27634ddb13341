"""What the targets of a tier would cost: GPU hours and disk, estimated from counts of operations and bytes. No torch.

Nothing here is measured. A model pass over a token is 2 operations a parameter, a gradient twice that (METHOD.md
section 1.2); what is not products of matrices has an assumed time for a billion weights. `ASSUMPTIONS` says it all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from sfmp.design import FP, Design

FLOPS, FLOAT32 = 1.2e14, 2e13  # operations a second that a GPU sustains in bfloat16 and in float32
READ = 1e9  # bytes a second in which a model is read
ROUNDING = 0.04  # seconds to round a billion weights once: 60 bytes a weight at 1.5 TB/s
GPTQ, PACKING, SVD = 80, 30, 60  # seconds for a billion weights; of SVD for each level
AWQ_GRID, AWQ_TOKENS = 20, 2048
GUIDED_PASSES, GUIDED_WINDOWS = 100, 8  # of the allocation notebook, which holds 2 GiB of Hessians at once
ASSUMPTIONS = (
    "ESTIMATES, nothing of this was measured: 2 operations a parameter and token, 6 with gradients, at 120 TFLOP/s (an",
    "A100 at 40 %), at 20 where float32 is used: calibrated quantizers, packed models in evaluation; models read at",
    "1 GB/s; GPTQ 80 s, packing 30 s, an SVD 60 s for a billion weights; the hours of a job count all its GPUs; disk:",
    "2 bytes a parameter to download, 4 for a salience, bpw / 8 for a checkpoint",
)
COSTS = ("calibration", "salience", "quantization", "search", "rival")
# Target → rules it needs, None for all. Every table needs every model scored, so most cost the same.
TARGETS = {"downloads": ("calibration",), "costs": COSTS,
           **dict.fromkeys(("publish", "summary", "report", "html", "claims", "figures", "tables", "all"))}


class Job(NamedTuple):
    """One job: its rule, model, seconds on its GPUs, number of GPUs and bytes it leaves on disk."""

    rule: str
    model: str
    seconds: float
    gpus: int
    bytes: float


def jobs(design: Design) -> list[Job]:
    """Return every job of a tier that holds a model."""
    size = design.config.get("gpu_size_gb", 80)
    found = []
    for rule, model, seconds, stored in _work(design):
        row = design.models[model]
        billions = float(row["parameters_m"]) / 1e3
        loading = 2e9 * billions / READ if seconds else 0
        found.append(Job(rule, model, seconds + loading, math.ceil(int(row["gpu_gb"]) / size), stored))
    return found


def _work(design: Design) -> Iterator[tuple[str, str, float, float]]:
    """Rule, model, seconds of computing and bytes of every job."""
    tokens = design.config["n_windows"] * design.config["seqlen"]
    rows = list(design.runs.values())
    pass_of = {model: _pass(float(row["parameters_m"]) * 1e6) for model, row in design.models.items()}
    for model, row in design.models.items():
        weights, one = float(row["parameters_m"]) * 1e6, pass_of[model]
        local = (design.config.get("models") or {}).get("root")
        yield "calibration", model, 0.0, 0.0 if local else 2 * weights
        sources = {r["salience"] for r in rows if r["model"] == model} - {"-"}
        for source in sorted(sources | ({"fisher", "guided"} if model == design.showcase_model else set())):
            passes = {"fisher": 3, "guided": 3, "activation": 1}.get(source, 0)
            yield "salience", model, passes * one * tokens, 4 * weights
        if any(r["method"] == "amq" for r in rows if r["model"] == model):
            yield "search", model, _search(design) * one, 0.0
        if model == design.showcase_model:
            guided = GUIDED_PASSES * 3 * one * min(GUIDED_WINDOWS * design.config["seqlen"], tokens)
            yield "allocation", model, guided, 0.0
    for run, row in design.runs.items():
        model = row["model"]
        weights, one = float(design.models[model]["parameters_m"]) * 1e6, pass_of[model]
        if row["method"] != FP:
            rule = "rival" if run in design.rivals else "quantization"
            seconds = _quantizing(design, row, weights / 1e9, one, tokens)
            yield rule, model, seconds + PACKING * weights / 1e9, float(row["bpw"]) / 8 * weights
        read = sum(float(design.datasets[name]["tokens_k"]) * 1e3
                   for name in ("wikitext2", *(design.config["tasks"] if row["tasks"] == "yes" else ())))
        yield "evaluation", model, one * read * (1 if row["method"] == FP else FLOPS / FLOAT32), 0.0


def _pass(weights):
    """Seconds in which a token passes a model of so many weights."""
    return 2 * weights / FLOPS


def _search(design):
    """Tokens that AMQ's evaluations read."""
    knobs, config = design.knobs["amq"], design.config
    evaluations = knobs["n_initial"] + knobs["iterations"] * knobs["per_iteration"]
    return evaluations * min(knobs["n_windows"], config["n_windows"]) * min(knobs["n_tokens"], config["seqlen"])


def _quantizing(design, row, billions, one, tokens):
    """Seconds of quantizing a model as a row says, without packing."""
    method, knobs = row["method"].removeprefix("sfmp-"), design.knobs
    exact = one * FLOPS / FLOAT32  # a token through the layers of a calibrated quantizer
    awq = AWQ_GRID * (ROUNDING * billions + exact * AWQ_TOKENS) + 2 * exact * tokens
    gptq = GPTQ * billions + 2 * exact * tokens
    if method == "slim_llm":
        windows = min(knobs[method]["sba_windows"], design.config["n_windows"])
        exchanges = max(1, 4096 // int(row["group_size"]) // 2 - 1)
        return gptq + exchanges * (windows * ROUNDING * billions + exact * windows * design.config["seqlen"])
    if method == "bitstack":
        layers = int(design.models[row["model"]]["layers"])
        sorting = 7 * layers * one * knobs[method]["sort_windows"] * design.config["seqlen"]
        return knobs[method]["n_levels"] * (SVD * billions + sorting)
    if method == "scalebits":
        return awq + 3 * one * tokens * (knobs[method]["refreshes"] or knobs[method]["rounds"])
    if method == "efficient_qat":
        trained = knobs[method]["epochs"] + knobs[method]["e2e_epochs"]
        return 4 * one * tokens * trained
    return {"awq": awq, "amq": awq, "gptq": gptq}.get(method, ROUNDING * billions)


def cost_words(design: Design) -> str:
    """Return what is printed before a dry run: hours and disk by rule, by model and by target, and how they were found.

    The embedded tier is measured, not estimated: its line is that of its configuration.
    """
    runs = f"tier {design.tier}: {len(design.runs)} runs of {len(design.models)} models"
    if design.tier == "embedded":
        needs = design.config["needs"]
        return f"{runs}; every target: no GPU, {needs['time']} (measured), disk {needs['disk']}"
    every = jobs(design)
    head = f"  {'rule':<40}{'jobs':>6}{'GPU hours':>12}{'longest job, h':>16}{'disk, GB':>10}"
    lines = [runs, *(f"  {line}" for line in ASSUMPTIONS), head]
    for title, key in (("rule", "rule"), ("model", "model")):
        lines += [] if title == "rule" else [f"  {title}"]
        for name in dict.fromkeys(getattr(job, key) for job in every):
            lines.append(_line(name, [job for job in every if getattr(job, key) == name], counted=True))
    lines.append("  target")
    for target, rules in TARGETS.items():
        needed = [job for job in every if rules is None or job.rule in rules]
        # Downloads compute nothing: what calibration leaves on disk is the model.
        lines.append(_line(target, [job._replace(seconds=0) for job in needed] if target == "downloads" else needed))
    return "\n".join(lines)


def _line(name, chosen, counted=False):
    hours = sum(job.seconds * job.gpus for job in chosen) / 3600
    longest, disk = max(job.seconds for job in chosen) / 3600, sum(job.bytes for job in chosen) / 1e9
    return f"    {name:<38}{len(chosen) if counted else '':>6}{hours:>12.1f}{longest:>16.1f}{disk:>10.0f}"
