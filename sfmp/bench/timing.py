"""Interleaved timing: every candidate once a round, so that whatever disturbs the machine disturbs all of them alike.

A candidate is visited in random order. Before a visit memory is swept, so its weights come from memory: one pass over
all its copies is a sample ("cold"). Then one copy is multiplied again and again ("warm"). A sample during which
threads of this process waited for a processor longer than a few percent of it is not counted.

Source: CPU.md section 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

COPIES_BYTES = 128 << 20  # of distinct weights behind each other: more than caches hold
SWEEP_BYTES = 512 << 20
WAITED = 0.03  # of a sample's time
REPEATS = 8  # products of a warm sample
LONGEST = 0.25  # seconds of a cold pass that still makes room for a warm sample


@dataclasses.dataclass
class Candidate:
    """Something that multiplies, and what is known about it.

    Attributes
    ----------
    name, family : str
        "lut8 3", "sfmp"; families: sfmp, torch, onnxruntime, openvino, roof.
    products : list of callables
        Each multiplies the activations with another copy of the weight; they are called one after another.
    weight_bytes : int
        Read by one product.
    per_call : int
        Products of one call, for a peer whose calls cost more than its kernels.
    error : float or None
        ‖y − y₆₄‖ / ‖y₆₄‖ against float64 with the candidate's own dequantized weight.
    facts : dict
        Further columns of its rows: mode, bits, …
    """

    name: str
    family: str
    products: list[Callable]
    weight_bytes: int
    per_call: int = 1
    error: float | None = None
    facts: dict = dataclasses.field(default_factory=dict)

    @property
    def copies(self) -> int:
        return len(self.products) * self.per_call

    def run(self) -> None:
        for product in self.products:
            product()


def copies(weight_bytes: int) -> int:
    """Copies of a weight that are more than caches hold."""
    return max(2, -(-COPIES_BYTES // weight_bytes))


def relative_error(y, expected) -> float | None:
    """‖y − expected‖ / ‖expected‖ in float64; None if it is no finite number."""
    y, expected = (np.asarray(array, np.float64).reshape(-1) for array in (y, expected))
    error = float(np.linalg.norm(y - expected) / np.linalg.norm(expected))
    return error if math.isfinite(error) else None


def measure(candidates: list[Candidate], rounds: int, seed: int = 0) -> list[dict]:
    """Visit every candidate in `rounds` rounds.

    Returns
    -------
    list of dict
        One row per candidate: name, family, weight_bytes, copies, error, its facts, and by round, None where a sample
        was not counted: "cold" and "warm", microseconds per product.
    """
    order, sweep = random.Random(seed), np.ones(SWEEP_BYTES // 8)
    rows = [{"name": c.name, "family": c.family, "weight_bytes": c.weight_bytes, "copies": c.copies,
             "error": c.error, **c.facts, "cold": [], "warm": []} for c in candidates]
    for candidate in candidates:
        candidate.run()
    for _ in range(rounds):
        for index in order.sample(range(len(candidates)), len(candidates)):
            cold, warm = _visit(candidates[index], sweep)
            rows[index]["cold"].append(cold)
            rows[index]["warm"].append(warm)
    return rows


def _visit(candidate, sweep):
    """(cold, warm) microseconds per product of one visit."""
    sweep.sum()
    time.sleep(0.02)  # threads of the last candidate that still spin go to sleep
    with first_served():
        cold = _sample(candidate.run, candidate.copies)
        if candidate.per_call > 1 or cold is None or cold * candidate.copies > LONGEST * 1e6:
            return cold, None
        product = candidate.products[0]
        product()
        return cold, _sample(lambda: [product() for _ in range(REPEATS)], REPEATS)


def _sample(function, products):
    waited, start = waiting(), time.perf_counter()
    function()
    seconds = time.perf_counter() - start
    if waiting() - waited > WAITED * seconds:
        return None
    return round(seconds / products * 1e6, 3)


def waiting() -> float:
    """Seconds that threads of this process waited for a processor so far; 0 where the system does not say."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            total += int(path.read_text().split()[1])
    return total * 1e-9


@contextlib.contextmanager
def first_served() -> Iterator[None]:
    """Run the threads of this process before ordinary ones, where the system allows that."""
    if not hasattr(os, "SCHED_FIFO"):
        yield
        return
    try:
        _schedule(os.SCHED_FIFO, 1)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        _schedule(os.SCHED_OTHER, 0)


def _schedule(policy, priority):
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setscheduler(int(task), policy, os.sched_param(priority))


def median(samples) -> float | None:
    """Median of the counted samples; None if there is none."""
    counted = [sample for sample in samples if sample is not None]
    return statistics.median(counted) if counted else None


def ratio(slow: list, fast: list) -> float | None:
    """Median over rounds of slow / fast, of the rounds in which both were counted."""
    both = [a / b for a, b in zip(slow, fast, strict=True) if a is not None and b is not None]
    return statistics.median(both) if both else None
