"""One large random Llama from disk to generated text, killed once and resumed: each step in a process of its own.

``kill -9`` ends the first quantization when half of the layers are written; the second goes on. The kernel says how
much memory each process ever had resident, pages of mapped files included, which it could have dropped.

Source: METHOD.md section 4, C2; DESIGN.md section 7.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

from sfmp.checks import SfmpError

_MAKE = """
import sys
from sfmp.bench.memory import make_model
make_model(sys.argv[1], [int(part) for part in sys.argv[2].split("x")], int(sys.argv[3]))
"""
_POLL_SECONDS = 0.05


def measure(size: str, vocabulary: int, place, *, bpw: float = 3.0, method: str = "awq", windows: int = 8,
            seqlen: int = 256, tokens: int = 16, again: bool = False) -> dict:
    """Make, quantize (killed and resumed) and run one model; leave all folders in `place`.

    Parameters
    ----------
    size : str
        ``hidden x intermediate x layers``, as in `sfmp.bench.memory`.
    vocabulary : int
        Rows of the embedding and of the output layer.
    place : path
        Folder for the model and its quantized copy; both must not be there.
    bpw, method, windows, seqlen : of the quantization
    tokens : int
        How many new ones are generated from the finished folder.
    again : bool
        Also quantize without a break, and compare the bytes of all files.

    Returns
    -------
    dict
        Sizes in bytes; ``steps``, each with ``step``, ``seconds`` and ``peak`` (largest resident set, bytes); whether
        layers finished before the kill were ``kept``; ``not_quantized``, the bytes of the model without the matrices
        that were quantized (bfloat16); ``same`` bytes or None.
    """
    place = Path(place)
    model, out, layers = place / "model", place / "quantized", int(size.split("x")[2])
    steps = [_step("create", [sys.executable, "-c", _MAKE, str(model), size, str(vocabulary)])]
    order = [sys.executable, "-m", "sfmp", "quantize", str(model)]
    options = ["--bpw", str(bpw), "--method", method, "--windows", str(windows), "--seqlen", str(seqlen), "--device",
               "cpu"]
    work = out.with_name(f".{out.name}.work")

    def half():
        return len(_times(work)) >= math.ceil(layers / 2)

    steps.append(_step("quantize, killed", [*order, str(out), *options], half))
    before, remade = _times(work), set()

    def look():
        remade.update(name for name, made in _times(work).items() if before.get(name, made) != made)

    steps.append(_step("quantize, resumed", [*order, str(out), *options, "--resume"], look=look))
    text = "def main():\n"
    steps.append(_step("generate", [sys.executable, "-m", "sfmp", "generate", str(out), text, "--tokens", str(tokens),
                                    "--device", "cpu"]))
    same = None
    if again:
        steps.append(_step("quantize, no break", [*order, str(place / "again"), *options]))
        same = _hashes(out) == _hashes(place / "again")
    inspected = json.loads(subprocess.run([sys.executable, "-m", "sfmp", "inspect", str(out), "--json"], check=True,
                                          capture_output=True, text=True).stdout)
    return {"size": size, "vocabulary": vocabulary, "bpw": bpw, "method": method, "windows": windows,
            "seqlen": seqlen, "model": payload(model), "layers_at_kill": len(before),
            "layers_kept": bool(before) and not remade, "steps": steps, "quantized": payload(out),
            "weights": inspected["weights"], "bpw_stored": inspected["bpw_stored"],
            "not_quantized": payload(model) - 2 * inspected["weights"], "same": same}


def payload(folder) -> int:
    """Return the bytes of all tensors in the safetensors files of a folder, headers left out."""
    total = 0
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            header, = struct.unpack("<Q", file.read(8))
        total += path.stat().st_size - 8 - header
    return total


def _step(name, command, end=None, look=lambda: None):
    """Run a command, its progress on standard error; kill it as soon as `end()` says so. `look()` is called often."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=sys.stderr)
    killed = False
    while True:
        number, status, usage = os.wait4(process.pid, os.WNOHANG)
        if number:
            break
        look()
        if end is not None and not killed and end():
            process.send_signal(signal.SIGKILL)
            killed = True
        time.sleep(_POLL_SECONDS)
    process.returncode = code = os.waitstatus_to_exitcode(status)
    if code != (0 if end is None else -signal.SIGKILL):
        raise SfmpError(f"{' '.join(command)}: expected it to {'end with 0' if end is None else 'be killed'}, found "
                        f"{code}; its last lines say why")
    return {"step": name, "seconds": round(time.monotonic() - start, 1), "peak": usage.ru_maxrss * 1024}


def _times(work):
    """When each finished layer was written, by file name."""
    found = {}
    for path in work.glob("layer-*.safetensors"):
        with contextlib.suppress(FileNotFoundError):  # the other process has just ended and removes them
            found[path.name] = path.stat().st_mtime_ns
    return found


def _hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())}
