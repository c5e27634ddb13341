"""What was measured once for a processor: how far to prefetch, from how many tokens on panels beat the tables.

The numbers are data, ``launch.json`` beside this file; ``python -m kernels_numba.cpu.tune`` measures them again.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import numpy as np

PATH = Path(__file__).with_name("launch.json")


@functools.cache
def table() -> dict:
    return json.loads(PATH.read_text())


def prefetch() -> tuple[int, int]:
    """(bytes ahead of the tile in work, locality as LLVM counts: 3 is the first-level cache)."""
    found = table()["prefetch"]
    return found["bytes"], found["locality"]


def singles(mode: str) -> int:
    """Up to so many tokens are multiplied one by one, which is then faster than one pass for several tokens."""
    return table()["modes"][mode]["singles"]


def crossover(mode: str, bits: float) -> float:
    """Tokens from which dequantized panels are faster, for a matrix of `bits` mean bits; infinite if never.

    Interpolated by the inverse of the tokens between the measured bit-widths: null in the table is never.

    Examples
    --------
    >>> crossover("lut8", 2) > 2
    True
    """
    measured = table()["modes"][mode]["crossover"]
    widths = sorted(map(int, measured))
    inverse = np.interp(bits, widths, [1 / (measured[str(width)] or math.inf) for width in widths])
    return 1 / inverse if inverse else math.inf


@functools.cache
def least_crossover(mode: str) -> float:
    return min(tokens or math.inf for tokens in table()["modes"][mode]["crossover"].values())
