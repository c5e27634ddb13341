"""The GPU bench of products: our kernels beside torch, gemlite and Triton, and what the device can do at most.

Parts are measured one after another in a process of their own. When it dies or takes too long, what it tried last is
left out and the part starts again, so that a broken candidate costs itself only. The result is one JSON file, written
after each part: device, versions, commit, ceilings, and rows with every sample.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from sfmp.bench.cpu import describe, write
from sfmp.checks import SfmpError

PARTS = ("product", "batch", "width", "accuracy", "host")
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192), (6144, 4096), (28672, 4096))  # out × in
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
MAIN_SHAPES = 4  # measured before the other parts
CPU_SHAPES, CPU_BATCHES = ((256, 512),), (1, 4)
ROUNDS, QUICK_ROUNDS = 31, 5
CPU_ROTATION, CPU_SAMPLE_US = 1 << 18, 50.0
SESSION_SECONDS, PART_SECONDS = 480, 240
WITH_CANDIDATES = ("product", "batch", "width")  # parts that can be measured without one of them
TRIES = 8  # candidates of one part that may break it
WHOLE_FAMILIES = ("gemlite", "triton")  # left out altogether once one of their candidates broke a part
PACKAGES = ("numba-cuda", "cuda-bindings", "cuda-core", "triton", "gemlite")


def add_arguments(parser: argparse.ArgumentParser, shape) -> None:
    """Declare the options of ``python -m sfmp.bench kernels``; `shape` reads "4096x4096"."""
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--shapes", nargs="+", type=shape, default=None, help="out×in, e.g. 4096x4096")
    parser.add_argument("--batches", nargs="+", type=_tokens, default=None, help="tokens of part batch")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=None,
                        help="cuda where there is one; cpu only shows that the command works")
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it runs, not to quote")
    parser.add_argument("--limit", type=float, default=SESSION_SECONDS, metavar="SECONDS",
                        help="after so long no further part is begun")
    parser.add_argument("--gemlite-autotune", choices=("default", "fast", "max"), default="fast",
                        help="max takes minutes for each shape")


def run(options: argparse.Namespace) -> int:
    """Measure and write; return the exit code: 0, 1 if something failed, 2 for bad arguments."""
    try:
        device = options.device or ("cuda" if has_cuda() else "cpu")
        if device == "cuda" and not has_cuda():
            raise SfmpError("--device: expected cpu, found cuda; torch sees no CUDA device here")
        on_cpu = device == "cpu"
        settings = {"device": device, "rounds": QUICK_ROUNDS if options.quick else ROUNDS,
                    "autotune": options.gemlite_autotune,
                    **({"rotation_bytes": CPU_ROTATION, "sample_us": CPU_SAMPLE_US} if on_cpu else {})}
        shapes = options.shapes or (CPU_SHAPES if on_cpu else SHAPES)
        chosen = parts(shapes, options.batches or (CPU_BATCHES if on_cpu else BATCHES), options.parts)
        result = measure(chosen, settings, options.out, options.limit)
    except SfmpError as error:
        print(error, file=sys.stderr)
        return 2
    failed = [describe(part) for part in result["parts"] if "failed" in part]
    print(f"written: {options.out}")
    if failed:
        print(f"failed: {', '.join(failed)}; the file says why", file=sys.stderr)
    return 1 if failed else 0


def _tokens(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a number of tokens of at least 1, found {text!r}")


def has_cuda() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def parts(shapes, batches, names=PARTS) -> list[dict]:
    """Everything that is measured, as arguments of `gpu_worker.run_part`; what matters most first."""
    first, long = list(shapes[0]), list(max(shapes[:2], key=lambda shape: shape[0] * shape[1]))
    found = [{"part": "host", "shape": first}, {"part": "accuracy", "shape": first}]
    products = [{"part": "product", "shape": list(shape)} for shape in shapes]
    found += products[:MAIN_SHAPES]
    found += [{"part": "batch", "shape": long, "batches": list(batches)}, {"part": "width", "shape": long}]
    found += products[MAIN_SHAPES:]
    return [part for part in found if part["part"] in names]


def measure(chosen: list[dict], settings: dict, path: Path, limit: float = SESSION_SECONDS, log=print) -> dict:
    """Run the parts and return what was written.

    Parameters
    ----------
    chosen : list of dict, `parts`
    settings : dict, arguments of `gpu_timing.Settings`
    path : Path
    limit : float, seconds after which no part is begun
    log : function

    Raises
    ------
    SfmpError
        The file cannot be written: said before anything is measured.
    """
    start = time.monotonic()
    found = begin("gpu kernels", settings, path)
    with Worker(settings) as worker:
        before = [{"part": "ceilings"}]
        before += [{"part": "compile", "parts": chosen}] if settings["device"] == "cuda" else []
        for part in [*before, *chosen]:
            spent = time.monotonic() - start
            if spent > limit:
                result = {"failed": f"not begun: {spent:.0f} s of {limit:g} s were spent; ask for it with --parts"}
            elif found["ceilings"] is None and part["part"] != "ceilings":
                result = {"failed": "not begun: the ceilings were not measured"}
            else:
                result = _measured(worker, part, found)
            _add(found, part, result)
            write(found, path)
            log(f"{time.monotonic() - start:6.0f} s  {describe(part)}{', FAILED' if 'failed' in result else ''}",
                flush=True)
            for line in summary(result.get("rows", []), found["ceilings"]):
                log(f"          {line}", flush=True)
    return found


def begin(kind: str, settings: dict, path: Path) -> dict:
    """A result without parts, written once: a file that cannot be written is said before anything is measured.

    Raises
    ------
    SfmpError
        The file cannot be written.
    """
    from sfmp import environment

    found = {"kind": kind, "command": ["python", "-m", "sfmp.bench", *sys.argv[1:]],
             "date": time.strftime("%Y-%m-%d"), **environment.git_state(), "device": None,
             "versions": {**environment.versions(), **_versions()}, "settings": settings, "ceilings": None,
             "compiled": None, "host": None, "absent": {}, "parts": []}
    try:
        write(found, path)
    except OSError as error:
        raise SfmpError(f"--out: expected a file that can be written, found {path} ({error}); choose another"
                        ) from error
    return found


def _measured(worker, part, found):
    """Result of a part, without the candidates that break it."""
    skip: dict[str, str] = {}
    copy_gbps = (found["ceilings"] or {}).get("copy_gbps")
    for _ in range(TRIES):
        result = worker.run({**part, "copy_gbps": copy_gbps, "skip": skip}, PART_SECONDS)
        name = result.pop("broke", None)
        if name is None or name in skip or part["part"] not in WITH_CANDIDATES:
            return result
        family = name.split()[0]
        skip[family if family in WHOLE_FAMILIES else name] = f"broke the process: {result['failed']}"
    return {"failed": f"given up after {TRIES} candidates that broke it: {json.dumps(skip)}"}


def _add(found, part, result):
    """Put a result where it belongs."""
    for key in ("device", "ceilings", "host", "compiled"):
        if key in result:
            found[key] = result[key]
    if "rotation_bytes" in result:
        found["settings"] = {**found["settings"], "rotation_bytes": result["rotation_bytes"]}
    found["absent"].update(result.get("absent", {}))
    if "rows" in result or "failed" in result:
        known = {key: value for key, value in part.items() if key != "parts"}
        found["parts"].append({**known, **{key: result[key] for key in ("failed", "rows") if key in result}})


def summary(rows: list[dict], ceilings: dict | None) -> list[str]:
    """One line for each row with times: measured, predicted, share of the copy bandwidth, times torch float16."""
    timed = [row for row in rows if row.get("samples_us")]
    medians = {row["name"]: statistics.median(row["samples_us"]) for row in timed}
    dense = {row["tokens"]: medians[row["name"]] for row in timed if row["name"].startswith("torch float16")}
    lines = []
    for row in timed:
        us = medians[row["name"]]
        share = row["packed_bytes"] / us / 1e3 / ceilings["copy_gbps"]
        words = [f"{row['name']:<40}", f"{us:9.2f} us", f"{100 * share:5.0f} % of copy"]
        words.append(f"predicted {row['predicted_us']:7.2f} us" if row["predicted_us"] else " " * 20)
        if row["tokens"] in dense:
            words.append(f"{dense[row['tokens']] / us:5.2f} x float16")
        lines.append("  ".join(words))
    return lines


def _versions():
    import importlib.metadata

    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


class Worker:
    """A process that measures, started when it is first needed and again after it died."""

    def __init__(self, settings: dict):
        self._settings, self._process = settings, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()

    def run(self, part: dict, seconds: float) -> dict:
        """Result of a part; {"failed": last lines it said, "broke": what it tried last} if the process died.

        It is killed after `seconds` without a word.
        """
        if self._process is None:
            self._start()
        trying, late = None, threading.Event()
        try:
            print(json.dumps(part), file=self._process.stdin, flush=True)
            while True:
                timer = threading.Timer(seconds, self._late, (late,))
                timer.start()
                line = self._process.stdout.readline()
                timer.cancel()
                if not line:
                    break
                said = json.loads(line)
                if "result" in said:
                    return said["result"]
                trying = said["trying"]
        except OSError:  # it died before it read the part
            pass
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().splitlines()[-8:]
        text = f"took more than {seconds:g} s" if late.is_set() else "\n".join(lines) or f"exit status {status}"
        self._stop()
        return {"failed": text, "broke": trying}

    def _late(self, late):
        late.set()
        self._process.kill()

    def _start(self):
        self._errors = tempfile.TemporaryFile("w+")
        command = [sys.executable, "-X", "faulthandler", "-m", "sfmp.bench.gpu_worker", json.dumps(self._settings)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
                                         text=True)

    def _stop(self):
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._errors.close()
            self._process = None
