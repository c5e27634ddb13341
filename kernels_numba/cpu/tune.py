"""Measure the launch table of this processor: ``python -m kernels_numba.cpu.tune [--rows N] [--columns K]``.

How far ahead to prefetch; for each mode, up to how many tokens the one-token kernel beats a shared pass, and for some
bit-widths from how many tokens on dequantized panels beat the tables. ``SFMP_CPU_TARGET`` forces a lower target, of
which alone the second part is then measured. Times are the least of several, interleaved, so that a busy moment of the
machine hits all sides; run it on a quiet machine all the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

import numpy as np
import torch

from kernels_numba.cpu import drive, launch, product, targets, threads
from kernels_numba.cpu.records import TOKENS
from sfmp.checks import write_atomically
from sfmp.environment import hardware
from sfmp.pack import pack

BITS = (2, 3, 4, 8)
BATCHES = (16, 32, 64, 128, 256, 512, 1024)
REPEATS = 7
PREFETCHES = [{"bytes": ahead, "locality": locality}  # no multiples of a page
              for ahead, locality in ((4160, 2), (2112, 3), (4160, 3), (8256, 3))]
COLD = 128 << 20  # bytes of weights that no cache holds


def measure(rows: int, columns: int, modes) -> dict:
    """Return mode → {"singles", "crossover": {bits: tokens}} for a matrix of rows × columns."""
    weights = {width: _random(rows, columns, width) for width in BITS}
    table = {}
    for mode in modes:
        crossover = {str(width): _crossover(mode, packed, BATCHES) for width, packed in weights.items()}
        table[mode] = {"singles": _singles(mode, weights[BITS[0]]), "crossover": crossover}
    return table


def best_prefetch(rows: int, columns: int, mode: str) -> dict:
    """Return {"bytes", "locality"} with which weights from memory are multiplied fastest."""
    packed = [_random(rows, columns, width) for width in (2, 4)]
    copies = COLD // sum(part.nbytes for part in packed) + 1
    weights = [product.weight(dataclasses.replace(part)) for part in packed for _ in range(copies)]
    kept = launch.table()["prefetch"]
    try:
        functions = [_with_prefetch(choice, weights, torch.randn(1, columns), mode) for choice in PREFETCHES]
    finally:
        launch.table()["prefetch"] = kept
        _forget_kernels()
    return PREFETCHES[int(np.argmin(_least(*functions)))]


def _with_prefetch(choice, weights, x, mode):
    """Products with kernels that prefetch as `choice` says, compiled at the first."""
    launch.table()["prefetch"] = choice
    _forget_kernels()
    weights = [product.Weight(w.image, w.rows, w.columns, w.tile_columns, w.target) for w in weights]

    def multiply():
        for weight in weights:
            weight.multiply(x, None, mode)

    multiply()
    return multiply


def _forget_kernels():
    for cached in (drive.source_hash, drive.worker, product._kernels):
        cached.cache_clear()


def _random(rows, columns, width):
    """A matrix of random codes, 512 × 128 blocks."""
    rng = np.random.default_rng(width)
    groups, blocks = -(-columns // 128), -(-rows // 512)
    codes = rng.integers(0, 1 << width, (rows, columns), dtype=np.uint8)
    scales = np.full((rows, groups), 0.01)
    return pack(codes, scales, scales * 0 + (1 << width) // 2, np.full((blocks, groups), width), group_size=128,
                block_rows=512)


def _least(*functions) -> list[float]:
    """Least seconds of each function, called in turn; the first call of each is not counted."""
    seconds = [[] for _ in functions]
    for _ in range(REPEATS + 1):
        for times, function in zip(seconds, functions, strict=True):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return [min(times[1:]) for times in seconds]


def _tables(mode, packed, tokens, together):
    """One product through tables, with activations that are new each time."""
    x, weight = torch.randn(tokens, packed.shape[1]), product.weight(packed)
    image = weight.image

    def multiply():
        x.neg_()  # new tables each time
        product.through_tables(x, image, None, packed.shape[0], weight.tile_columns, weight.target, mode, together)

    return multiply


def _panels(mode, packed, tokens):
    x, image = torch.randn(tokens, packed.shape[1]), product.weight(packed).image
    return lambda: product.through_panels(x, image, None, mode == "lut8")


def _singles(mode, packed) -> int:
    """Most tokens for which one by one is as fast as a shared pass; all of a run if a full pass is not faster."""
    for tokens in range(2, TOKENS[mode] + 1):
        alone, shared = _least(_tables(mode, packed, tokens, 1), _tables(mode, packed, tokens, TOKENS[mode]))
        if alone > shared:
            return tokens - 1
    return product.RUN_TOKENS


def _crossover(mode, packed, batches) -> int | None:
    """Tokens at which both ways take equally long, interpolated between the measured batches; None if they never do."""
    before = None
    for tokens in batches:
        tables, panels = _least(_tables(mode, packed, tokens, None), _panels(mode, packed, tokens))
        gain = tables - panels
        if gain > 0:
            if before is None:
                return tokens
            return round(before[0] + (tokens - before[0]) * before[1] / (before[1] + gain))
        before = tokens, -gain
    return None


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels_numba.cpu.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--output", type=Path, default=launch.PATH)
    options = parser.parse_args(arguments)
    target, why = targets.detect()
    if target is None:
        parser.error(why)
    table = json.loads(options.output.read_text()) if options.output.exists() else dict(launch.table())
    if not os.environ.get(targets.VARIABLE):
        table["prefetch"] = best_prefetch(options.rows, options.columns, targets.MODES[target][0])
    table["targets"] = {**table["targets"], target: {
        "modes": measure(options.rows, options.columns, targets.MODES[target]),
        "measured": {"processor": hardware()["cpu"], "threads": threads.count(),
                     "shape": [options.rows, options.columns], "torch": torch.__version__}}}
    write_atomically(options.output, lambda path: path.write_text(json.dumps(table, indent=2) + "\n"))
    print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
