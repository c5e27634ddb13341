"""Measure the launch table of a device: ``python -m kernels_numba.gpu.tune [--rows N] [--columns K] [--device I]``.

For a matrix of some mean bits: how many warps a block of each kernel should have for one token, how many blocks per
multiprocessor sharing out tiles should aim at, and from how many tokens on a dequantized weight is faster. Times are
medians of replayed CUDA graphs over several copies of the weight, so that no cache holds it. The entry of the device,
with where it was measured, replaces what the file has.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from kernels_numba.gpu import check, devices, launch, panels
from kernels_numba.gpu.weight import make_weight
from sfmp.bench.random_model import random_packed
from sfmp.checks import SfmpError, write_atomically

WARPS = {"mma": (4, 8, 16), "lut": (4, 8, 16)}
WAVES = (1, 2, 4, 8)
BATCHES = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
GROUP = 128  # columns of a block, as `random_packed` has them
COLD = 256 << 20  # bytes of weights that no cache holds
REPLAYS, LOOPS = 20, 4


def copies(packed, mode: str, device, **options) -> list:
    """Weights of equal content in different places, together more than caches hold."""
    weights = [make_weight(packed, mode, device, **options)]
    count = min(64, COLD // weights[0].image.numel() + 1)
    for _ in range(count - 1):
        first = weights[0]
        weights.append(type(first)(first.image.clone(), first.structure, first.kinds))
    return weights


def seconds(functions) -> float:
    """Median seconds of a call of one of the functions, called in turn in a replayed graph."""
    for function in functions:
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LOOPS):
            for function in functions:
                function()
    times = []
    for _ in range(REPLAYS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[3:]) / (LOOPS * len(functions))


def products(weights, tokens: int, dequantized: bool = False) -> list:
    """One function per weight."""
    first = weights[0]
    x = torch.randn(tokens, first.columns, device=first.device).half()
    if dequantized:
        y = x.new_empty(tokens, first.rows)
        return [lambda weight=weight: panels.multiply(weight, x, y, None) for weight in weights]
    return [lambda weight=weight: weight.through_codes(x, None) for weight in weights]


def best(packed, mode: str, device, name: str, choices) -> tuple:
    """Return (choice with the least time, choice → microseconds); a choice the device refuses is left out."""
    times = {}
    for choice in choices:
        try:
            times[choice] = round(seconds(products(copies(packed, mode, device, **{name: choice}), 1)) * 1e6, 3)
        except SfmpError as error:
            print(f"{mode}, {name} {choice}: {error}")
    return min(times, key=times.get), times


def crossover(packed, device, warps) -> tuple[int | None, dict]:
    """Return (least measured number of tokens from which on dequantizing is faster, or None; times in microseconds)."""
    weights, times = copies(packed, "mma", device, warps=warps), {}
    for tokens in BATCHES:
        times[tokens] = [round(seconds(products(weights, tokens, way)) * 1e6, 3) for way in (False, True)]
    faster = [tokens for tokens, (codes, dequantized) in times.items() if dequantized < codes]
    slower = [tokens for tokens, (codes, dequantized) in times.items() if dequantized >= codes]
    return next((tokens for tokens in faster if tokens > max(slower, default=0)), None), times


def measure(rows: int, columns: int, bits: float, index: int) -> dict:
    """Return the entry of a device."""
    device, found = torch.device("cuda", index), devices.get(index)
    packed, entry, times = random_packed(rows, columns, bits + 32 / GROUP), {"warps": {}}, {}
    with found.guard():  # graphs and events are of torch's current device
        for mode, choices in WARPS.items():
            check.demand(index, mode)
            entry["warps"][mode], times[f"{mode} warps"] = best(packed, mode, device, "warps", choices)
        blocks = {wave * found.multiprocessors: wave for wave in WAVES}
        chosen, times["lut blocks"] = best(packed, "lut", device, "blocks", blocks)
        entry["waves"] = blocks[chosen]
        entry["crossover"], times["tokens"] = crossover(packed, device, entry["warps"]["mma"])
    entry["measured"] = {"shape": [rows, columns], "bits": bits, "torch": torch.__version__,
                         "cuda": torch.version.cuda, "microseconds": times}
    return entry


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels_numba.gpu.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--bits", type=float, default=3, help="mean bits of a code, 2 to 4")
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--output", type=Path, default=launch.PATH)
    options = parser.parse_args(arguments)
    why = devices.why_not()
    if why:
        parser.error(why)
    entry = measure(options.rows, options.columns, options.bits, options.device)
    table = json.loads(options.output.read_text()) if options.output.exists() else dict(launch.table())
    table["devices"][torch.cuda.get_device_name(options.device)] = entry
    write_atomically(options.output, lambda path: path.write_text(json.dumps(table, indent=2) + "\n"))
    print(json.dumps(entry, indent=2))


if __name__ == "__main__":
    main()
