"""Tokens per second under CUDA graphs: packed weights beside torch in float16, of the same model in the same run.

Models have the shapes of published ones and random weights, so only their times mean something, and rows say so. Every
model is measured in a process of its own (`sfmp.bench.decode_worker`), all its candidates in memory together; when that
dies, the weights it tried last are left out and the model is measured again without them. Without a GPU the same code
decodes a tiny model with the CPU kernels and without graphs, which shows that it works and nothing else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sfmp.bench.cpu import describe, write
from sfmp.bench.kernels import begin
from sfmp.checks import SfmpError, integer

BPW = (2.5, 3.0, 4.0)
MODES = {"cuda": ("mma", "lut"), "cpu": ("lut16",)}
COMPILE = {"cuda": (3.0,), "cpu": ()}
SIZES = {"prompt_tokens": 32, "new_tokens": 64, "eager_tokens": 8, "rounds": 7}
QUICK = {"prompt_tokens": 8, "new_tokens": 8, "eager_tokens": 4, "rounds": 2}
SESSION_SECONDS, PART_SECONDS = 480, 400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``python -m sfmp.bench decode``."""
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--models", nargs="+", default=None, help="names of sfmp.bench.decode_models.MODELS")
    parser.add_argument("--bpw", nargs="+", type=float, default=list(BPW), help="bits per weight, scales included")
    parser.add_argument("--modes", nargs="+", default=None, help="of our kernels; on a GPU mma and lut")
    parser.add_argument("--compile", nargs="*", type=float, default=None, metavar="BPW",
                        help="bits per weight, 3 if there is a GPU, at which torch.compile fuses what is between "
                        "products, in torch's float16 too; nothing after it: nowhere")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=None,
                        help="cuda where there is one; cpu only shows that the command works")
    parser.add_argument("--layers", type=int, default=None, help="decoder layers of every model")
    parser.add_argument("--quick", action="store_true", help="few tokens: to see that it runs, not to quote")
    parser.add_argument("--limit", type=float, default=SESSION_SECONDS, metavar="SECONDS",
                        help="after so long no further model is begun")


def run(options: argparse.Namespace) -> int:
    """Measure and write; return the exit code: 0, 1 if something failed, 2 for bad arguments."""
    try:
        chosen, settings = session(options)
        result = measure(chosen, settings, options.out, options.limit)
    except SfmpError as error:
        print(error, file=sys.stderr)
        return 2
    failed = [describe(part) for part in result["parts"] if "failed" in part or part["absent"]]
    print(f"written: {options.out}")
    if failed:
        print(f"failed: {', '.join(failed)}; the file says what and why", file=sys.stderr)
    return 1 if failed else 0


def session(options: argparse.Namespace) -> tuple[list[dict], dict]:
    """(parts, settings) of `measure`.

    Raises
    ------
    SfmpError
        No CUDA device, an unknown model, or no layers.
    """
    import torch

    from sfmp.bench.decode_models import LAYERS, MODELS

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SfmpError("--device: expected cpu, found cuda; torch sees no CUDA device here")
    models = options.models or [name for name in MODELS if (name == "tiny") == (device == "cpu")]
    unknown = [name for name in models if name not in MODELS]
    if unknown:
        raise SfmpError(f"--models: expected some of {', '.join(MODELS)}, found {', '.join(unknown)}")
    if options.layers is not None:
        integer("--layers", options.layers, 1)
    chosen = [{"part": "decode", "model": name, "layers": options.layers or LAYERS.get(
        name, MODELS[name]["num_hidden_layers"])} for name in models]
    return chosen, {"device": device, "bpw": options.bpw, "modes": options.modes or list(MODES[device]),
                    "compile": list(COMPILE[device]) if options.compile is None else options.compile,
                    **(QUICK if options.quick else SIZES)}


def measure(chosen: list[dict], settings: dict, path: Path, limit: float = SESSION_SECONDS, log=print) -> dict:
    """Measure the models one after another; write after each, and return what was written.

    Parameters
    ----------
    chosen : list of dict
        part "decode", model, layers.
    settings : dict, see `decode_worker.measure_model`
    path : Path
    limit : float, seconds after which no model is begun
    log : function

    Raises
    ------
    SfmpError
        The file cannot be written: said before anything is measured.
    """
    start = time.monotonic()
    found = begin("gpu decode", settings, path)
    for part in chosen:
        spent = time.monotonic() - start
        if spent > limit:
            why = f"not begun: {spent:.0f} s of {limit:g} s were spent; ask for it with --models"
            result = {"failed": why, "absent": {}}
        else:
            result = _measured(part, settings)
        for key in ("device", "ceilings"):
            value = result.pop(key, None)
            found[key] = found[key] or value
        found["parts"].append({**part, **result})
        write(found, path)
        word = ", FAILED" if "failed" in result else ""
        log(f"{time.monotonic() - start:6.0f} s  {describe(part)}{word}", flush=True)
        lines = [*summary(result.get("rows", [])), *(f"{name}: {why}" for name, why in result["absent"].items())]
        for line in lines:
            log(f"          {line}", flush=True)
    return found


def summary(rows: list[dict]) -> list[str]:
    """One line for each row: tokens per second, GB/s, peak memory, times the fastest of torch in float16."""
    dense = [row["tokens_per_second"] for row in rows if row["weights"] == "torch fp16"]
    lines = []
    for row in rows:
        way = ("graph" if row["graph"] else "eager") + (", compiled" if row["compiled"] else "")
        words = [f"{row['name']:<26}", f"{way:<15}",
                 f"{row['tokens_per_second']:8.1f} tokens/s", f"{row['gigabytes_per_second']:7.0f} GB/s"]
        words += [f"{row['peak_bytes'] / 1e9:6.1f} GB"] if row["peak_bytes"] else []
        words += [f"{row['tokens_per_second'] / max(dense):5.2f} x fp16"] if dense else []
        lines.append("  ".join(words))
    return lines


def _measured(part, settings):
    """What `decode_worker.measure_model` returns, without weights that break it; or {"failed": why, "absent": …}."""
    skip: dict[str, str] = {}
    while True:
        result, trying = _in_a_process({**part, "skip": skip}, settings)
        if "failed" not in result or not trying or trying in skip:
            return {"absent": skip, **result}
        skip[trying] = f"broke the process: {result['failed']}"


def _in_a_process(part, settings):
    """(result, or {"failed": the last lines it said} if it died; the weights it tried last)."""
    with tempfile.TemporaryDirectory() as folder:
        output, trying = Path(folder) / "result.json", Path(folder) / "trying.txt"
        command = [sys.executable, "-X", "faulthandler", "-m", "sfmp.bench.decode_worker", json.dumps(part),
                   json.dumps(settings), str(output), str(trying)]
        late = None
        try:
            done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                  timeout=PART_SECONDS)
        except subprocess.TimeoutExpired:
            late = f"took more than {PART_SECONDS} s"
        if output.exists():
            return json.loads(output.read_text()), ""
        last = trying.read_text() if trying.exists() else ""
        return {"failed": late or "\n".join(done.stderr.splitlines()[-8:]) or f"exit status {done.returncode}"}, last
