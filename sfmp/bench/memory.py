"""Peak memory of ``sfmp quantize`` on random Llamas: ``python -m sfmp.bench memory --out FILE.json``.

Each size is written to disk by a process of its own and quantized by another, whose largest resident set the kernel
knows. It counts pages of mapped files too, which the kernel can drop: while a file of the checkpoint is written, that
file and what it is made from. Files are therefore kept small here. One larger model goes the whole way
(`sfmp.bench.whole_run`).

Source: METHOD.md section 4, C2.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sfmp.checks import SfmpError, write_atomically

SIZES = ("512x1376x4", "512x1376x16", "1024x2752x8")  # hidden x intermediate x layers: depth alone, then width
WHOLE, VOCABULARY = "2048x5632x22", 32000  # 1.1 billion weights
_MAKE = """
import sys, torch
from sfmp.bench.memory import make_model
make_model(sys.argv[1], [int(part) for part in sys.argv[2].split("x")])
"""
_RUN = """
import sys
from sfmp.bench.memory import resident_peak
from sfmp.cli import main
sys.stdout, shown = sys.stderr, sys.stdout
import sfmp.stream_quantize
started = resident_peak()
status = main(sys.argv[1:])
print(started, resident_peak(), file=shown)
sys.exit(status)
"""


def make_model(folder, size, vocabulary: int | None = None) -> None:
    """Write a random bfloat16 Llama of [hidden, intermediate, layers] with the embedded model's tokenizer.

    `vocabulary` is the number of rows of its embedding, that of the tokenizer if None.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sfmp.stages import load_tokenizer

    hidden, intermediate, layers = size
    heads = hidden // 64
    tokenizer = load_tokenizer("embedded")
    config = LlamaConfig(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=heads // 4 if heads % 4 == 0 else 1,
                         vocab_size=vocabulary or len(tokenizer), max_position_embeddings=2048)
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def resident_peak() -> int:
    """Return the largest resident set of this process so far, bytes (Linux)."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status: expected a line VmHWM, found none")


def measure(size: str, windows: int = 8, seqlen: int = 256, method: str = "awq", repeats: int = 3) -> dict:
    """Return sizes and peak memory of quantizing one model, in bytes.

    Parameters
    ----------
    size : str
        ``hidden x intermediate x layers``, written as in `SIZES`.
    windows, seqlen, method : of the quantization
    repeats : int
        The same run, in so many processes: the allocator leaves holes where chance has it.

    Returns
    -------
    dict
        ``model`` and ``layer`` (weights on disk), ``imports`` (peak before work began; median), all ``peaks`` and
        their median ``peak`` (the lower of two).
    """
    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        _output([sys.executable, "-c", _MAKE, str(folder), size])
        options = {"--method": method, "--windows": windows, "--seqlen": seqlen, "--device": "cpu",
                   "--max-shard-size": "8MB"}
        listed = [str(part) for option in options.items() for part in option]
        order = [sys.executable, "-c", _RUN, "quantize", str(folder)]
        told = [_output([*order, f"{place}/out-{number}", "--quiet", *listed]) for number in range(repeats)]
        with safe_open(folder / "model.safetensors", framework="np") as file:
            numbers = {name: _count(file.get_slice(name).get_shape()) for name in file.keys()}
    started, peaks = zip(*([int(part) for part in text.split()] for text in told), strict=True)
    layer = sum(count for name, count in numbers.items() if ".layers.0." in name)
    return {"size": size, "model": 2 * sum(numbers.values()), "layer": 2 * layer,
            "imports": statistics.median_low(started), "peaks": peaks, "peak": statistics.median_low(peaks)}


def _output(command):
    """Standard output of a process; one that fails is an error with its last lines."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = ("killed, perhaps for want of memory: choose a smaller size" if done.returncode == -signal.SIGKILL else
               "\n".join(["its last lines say why:", *done.stderr.strip().splitlines()[-5:]]))
        raise SfmpError(f"{' '.join(command[3:])}: expected the process to end with 0, found {done.returncode}; {why}")
    return done.stdout


def _count(shape):
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def _at_least_one(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a number of at least 1, found {text!r}")


def _size(text: str) -> str:
    if re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text) and int(text.split("x")[0]) % 64 == 0:
        return text
    raise argparse.ArgumentTypeError("expected hidden x intermediate x layers with hidden a multiple of 64, such as "
                                     f"{SIZES[0]}, found {text!r}")


def _whole(text: str) -> str:
    return text if text in ("none", "keep") else _size(text)


def add_arguments(parser) -> None:
    """Add the options of the command to an argparse parser."""
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write; FILE.part until all is measured")
    parser.add_argument("--sizes", nargs="*", type=_size, default=list(SIZES), metavar="SIZE",
                        help="hidden x intermediate x layers: these are quantized")
    parser.add_argument("--repeats", type=_at_least_one, default=3, help="of each of them; the median counts")
    parser.add_argument("--whole", type=_whole, default=WHOLE, metavar="SIZE",
                        help="this one goes from disk to generated text, killed once and resumed; none for no such "
                             "run, keep for the one that is in FILE already")
    parser.add_argument("--vocabulary", type=_at_least_one, default=VOCABULARY, help="of the latter")
    parser.add_argument("--again", action="store_true", help="also quantize it without a break, and compare the bytes")
    parser.add_argument("--method", default="awq", choices=("awq", "gptq", "rtn"))
    parser.add_argument("--windows", type=_at_least_one, default=8)
    parser.add_argument("--seqlen", type=_at_least_one, default=256)


def _whole_of(path, now):
    """The whole run of an earlier file, with its own date and commit; it must be of this machine and its libraries."""
    wanted, otherwise = f"{path}: expected a file with a whole run to keep, found", "leave --whole out to measure one"
    try:
        before = json.loads(path.read_text())
        whole = before["whole"]
        other = [f"{name} {before[part].get(name)} (here {now[part].get(name)})" for part in ("machine", "versions")
                 for name in {**before[part], **now[part]} if before[part].get(name) != now[part].get(name)]
        kept = whole and {"date": before["date"], "commit": before["commit"], "dirty": before.get("dirty"), **whole}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SfmpError(f"{wanted} {error!r}; {otherwise}") from error
    if not whole:
        raise SfmpError(f"{wanted} none in it; {otherwise}")
    if other:
        raise SfmpError(f"{wanted} one of {', '.join(other)}; run it as that was, or {otherwise}")
    return kept


def run(options) -> int:
    """Measure, and write one file; return 0."""
    from sfmp import environment
    from sfmp.bench import whole_run
    from sfmp.commands import check_writable

    check_writable(options.out)
    found = {"kind": "memory", "date": time.strftime("%Y-%m-%d"), "machine": environment.hardware(),
             "versions": environment.versions(), **environment.git_state(), "method": options.method,
             "windows": options.windows, "seqlen": options.seqlen, "repeats": options.repeats, "sizes": [],
             "whole": None}

    part = options.out.with_name(f"{options.out.name}.part")  # an earlier result stays until all is measured

    def write():
        write_atomically(part, lambda temporary: temporary.write_text(json.dumps(found, indent=1) + "\n"))

    if options.whole == "keep":
        found["whole"] = _whole_of(options.out, found)
    for size in options.sizes:
        found["sizes"].append(measure(size, options.windows, options.seqlen, options.method, options.repeats))
        write()
    if options.whole not in ("keep", "none"):
        with tempfile.TemporaryDirectory(dir=options.out.parent, prefix=".whole-") as place:
            whole = whole_run.measure(options.whole, options.vocabulary, place, method=options.method,
                                      windows=options.windows, seqlen=options.seqlen, again=options.again)
        found["whole"] = {"date": found["date"], "commit": found["commit"], "dirty": found["dirty"], **whole}
    write()
    os.replace(part, options.out)
    print(f"written: {options.out}")
    return 0
