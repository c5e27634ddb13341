"""Timing on a device: events around replays of captured graphs, every candidate once a round in random order.

A graph holds many products, each with another copy of the weight, so that no weight comes from the L2 cache and one
graph's launch is shared. A sample is a few replays of about a millisecond together. On a processor a sample is as many
calls by the clock on the wall.

Source: CUDA.md section 6.
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
import time
from collections.abc import Callable

import torch

from sfmp.bench.timing import Candidate

GRAPH_PRODUCTS = 48  # at least, in a graph of fast products
SLOW_US = 200.0  # a product from which one pass over the copies is a graph
SAMPLE_US = 1000.0
EAGER_SAMPLES = 5
LEAST_ROTATION = 180 << 20  # bytes of distinct weights


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a session measures.

    Attributes
    ----------
    device : "cuda" or "cpu"
    rounds : int, samples of every candidate
    rotation_bytes : int, of distinct weights that one candidate multiplies with in turn; 0 asks the device
    sample_us : float, a sample takes at least
    autotune : str, what gemlite is asked for
    """

    device: str = "cuda"
    rounds: int = 31
    rotation_bytes: int = 0
    sample_us: float = SAMPLE_US
    autotune: str = "fast"

    def copies(self, weight_bytes: int) -> int:
        """Copies of a weight that one candidate needs."""
        return max(2, math.ceil(self.rotation() / weight_bytes))

    def rotation(self) -> int:
        """Bytes of distinct weights that leave nothing of a weight in the L2 cache of this device."""
        return self.rotation_bytes or max(LEAST_ROTATION, 3 * torch.cuda.get_device_properties(0).L2_cache_size)


@dataclasses.dataclass
class Prepared:
    """A candidate that ran, with what one sample of it does.

    Attributes
    ----------
    candidate : Candidate
    sample : function that returns microseconds per product
    eager_us, host_us : float or None
        Per product called one by one: until all are done, and until all are enqueued.
    """

    candidate: Candidate
    sample: Callable[[], float]
    eager_us: float | None
    host_us: float | None


def prepare(candidate: Candidate, settings: Settings) -> Prepared:
    """Run a candidate, time it eagerly and make what a sample of it runs; a CUDA graph on a device."""
    candidate.run()
    on_device = settings.device == "cuda"
    once = _event_us(candidate.run) if on_device else _clock_us(candidate.run)
    product_us = max(once / candidate.copies, 1e-3)
    laps = 1 if product_us > SLOW_US else math.ceil(GRAPH_PRODUCTS / candidate.copies)
    if not on_device:
        laps = max(1, math.ceil(settings.sample_us / once))
        count = laps * candidate.copies
        return Prepared(candidate, lambda: _clock_us(lambda: _laps(candidate, laps)) / count, product_us, None)
    eager_us, host_us = _eager(candidate, laps)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _laps(candidate, laps)
    count = laps * candidate.copies
    replays = max(1, math.ceil(settings.sample_us / _event_us(graph.replay)))
    return Prepared(candidate, lambda: _event_us(graph.replay, replays) / (count * replays), eager_us, host_us)


def measure(prepared: list[Prepared], rounds: int, seed: int = 0) -> list[dict]:
    """Visit every candidate in `rounds` rounds.

    Returns
    -------
    list of dict
        One row per candidate: name, family, its facts, packed_bytes, copies, error, samples_us (microseconds per
        product, by round), eager_us, host_us.
    """
    order = random.Random(seed)
    samples: list[list[float]] = [[] for _ in prepared]
    for _ in range(rounds):
        for index in order.sample(range(len(prepared)), len(prepared)):
            samples[index].append(round(prepared[index].sample(), 4))
    return [{"name": one.candidate.name, "family": one.candidate.family, **one.candidate.facts,
             "packed_bytes": one.candidate.weight_bytes, "copies": one.candidate.copies,
             "error": one.candidate.error, "samples_us": found, "eager_us": _rounded(one.eager_us),
             "host_us": _rounded(one.host_us)}
            for one, found in zip(prepared, samples, strict=True)]


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float | None:
    """‖y − expected‖ / ‖expected‖ in float64; None if it is no finite number."""
    error = float((y.double() - expected).norm() / expected.norm())
    return error if math.isfinite(error) else None


def checked(product: Callable[[], torch.Tensor], expected: torch.Tensor, dtype: torch.dtype) -> float | None:
    """Relative error of a product whose result most likely lies where NaN was written before."""
    poison = torch.full(expected.shape, math.nan, dtype=dtype, device=expected.device)
    del poison
    return relative_error(product(), expected)


def _laps(candidate, laps):
    for _ in range(laps):
        candidate.run()


def _eager(candidate, laps):
    """(microseconds per product until all are done, until all are enqueued), medians."""
    totals, hosts, count = [], [], laps * candidate.copies
    for _ in range(EAGER_SAMPLES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        _laps(candidate, laps)
        enqueued = time.perf_counter()
        torch.cuda.synchronize()
        totals.append((time.perf_counter() - start) / count * 1e6)
        hosts.append((enqueued - start) / count * 1e6)
    return statistics.median(totals), statistics.median(hosts)


def _event_us(function, times=1):
    """Microseconds on the device, between events, after one run that is not counted."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    function()
    start.record()
    for _ in range(times):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _clock_us(function):
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e6


def _rounded(value):
    return None if value is None else round(value, 4)
