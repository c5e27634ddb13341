"""Peak memory of ``sfmp quantize`` on random Llamas: ``python -m sfmp.bench.memory [SIZE …]``.

Each size is written to disk by a process of its own and quantized by another, whose largest resident set the kernel
knows. It counts pages of mapped files too, which the kernel can drop: while a file of the checkpoint is written, that
file and what it is made from. Files are therefore kept small here.

Source: METHOD.md section 4, C2.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

SIZES = ("512x1376x4", "512x1376x16", "1024x2752x8")  # hidden x intermediate x layers: depth alone, then width
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


def make_model(folder, size) -> None:
    """Write a random bfloat16 Llama of [hidden, intermediate, layers] with the embedded model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sfmp.stages import load_tokenizer

    hidden, intermediate, layers = size
    tokenizer = load_tokenizer("embedded")
    config = LlamaConfig(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                         num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256),
                         vocab_size=len(tokenizer), max_position_embeddings=2048)
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def resident_peak() -> int:
    """Return the largest resident set of this process so far, bytes (Linux)."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status: expected a line VmHWM, found none")


def measure(size: str, windows: int = 8, seqlen: int = 256, method: str = "awq") -> dict:
    """Return sizes and peak memory of one run, in bytes.

    Parameters
    ----------
    size : str
        ``hidden x intermediate x layers``, written as in `SIZES`.
    windows, seqlen, method : of the quantization

    Returns
    -------
    dict
        ``model`` and ``layer`` (weights on disk), ``imports`` (peak before work began) and ``peak``.
    """
    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        subprocess.run([sys.executable, "-c", _MAKE, str(folder), size], check=True, capture_output=True)
        options = {"--method": method, "--windows": windows, "--seqlen": seqlen, "--device": "cpu",
                   "--max-shard-size": "8MB"}
        listed = [str(part) for option in options.items() for part in option]
        done = subprocess.run([sys.executable, "-c", _RUN, "quantize", str(folder), f"{place}/out", "--quiet", *listed],
                              check=True, capture_output=True, text=True)
        with safe_open(folder / "model.safetensors", framework="np") as file:
            numbers = {name: _count(file.get_slice(name).get_shape()) for name in file.keys()}
    started, peak = map(int, done.stdout.split())
    layer = sum(count for name, count in numbers.items() if ".layers.0." in name)
    return {"size": size, "model": 2 * sum(numbers.values()), "layer": 2 * layer, "imports": started, "peak": peak}


def _count(shape):
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sfmp.bench.memory", description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", default=list(SIZES), metavar="SIZE", help="hidden x intermediate x layers")
    parser.add_argument("--method", default="awq", choices=("awq", "gptq", "rtn"))
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args(arguments)
    rows = [measure(size, options.windows, options.seqlen, options.method) for size in options.sizes]
    print(f"{'size':>18} {'model':>8} {'layer':>8} {'imports':>8} {'peak':>8} {'above imports':>14}   MB")
    for row in rows:
        cells = [f"{row[key] / 1e6:8.0f}" for key in ("model", "layer", "imports", "peak")]
        print(f"{row['size']:>18} {' '.join(cells)} {(row['peak'] - row['imports']) / 1e6:14.0f}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
