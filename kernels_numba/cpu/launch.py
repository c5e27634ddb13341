"""What was measured once for a processor: how far to prefetch, from how many tokens on panels beat the tables.

The numbers are data, ``launch.json`` beside this file; ``python -m kernels_numba.cpu.tune`` measures them again. They
hold for a processor, not for all that have its instructions: null ("never") was measured where torch has no matrix
instructions (AMX) to multiply panels with.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import numpy as np

PATH = Path(__file__).with_name("launch.json")
NEAREST = "avx2"  # stands for a target that was not measured (neon)


@functools.cache
def table() -> dict:
    return json.loads(PATH.read_text())


def prefetch() -> tuple[int, int]:
    """(bytes ahead of the tile in work, locality as LLVM counts: 3 is the first-level cache)."""
    found = table()["prefetch"]
    return found["bytes"], found["locality"]


def modes(target: str) -> dict:
    """What was measured with the kernels of a target, by mode; of `NEAREST`, or of any, where nothing was."""
    measured = table()["targets"]
    return measured[next(name for name in (target, NEAREST, *measured) if name in measured)]["modes"]


def singles(target: str, mode: str) -> int:
    """Up to so many tokens are multiplied one by one, which is then faster than one pass for several tokens."""
    return modes(target)[mode]["singles"]


def crossover(target: str, mode: str, bits: float) -> float:
    """Tokens from which dequantized panels are faster, for a matrix of `bits` mean bits; infinite if never.

    Interpolated by the inverse of the tokens between the measured bit-widths: null in the table is never.

    Examples
    --------
    >>> crossover("avx512_vbmi", "lut8", 2) > 2
    True
    """
    measured = modes(target)[mode]["crossover"]
    widths = sorted(map(int, measured))
    inverse = np.interp(bits, widths, [1 / (measured[str(width)] or math.inf) for width in widths])
    return 1 / inverse if inverse else math.inf


@functools.cache
def least_crossover(target: str, mode: str) -> float:
    return min(tokens or math.inf for tokens in modes(target)[mode]["crossover"].values())
