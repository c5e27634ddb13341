"""Tokens per second of one model, in this process: every candidate is made, decodes, and is captured; then all of them
generate once a round, in random order.

Before it tries a kind of weights it says so in a file; when it dies, the process that asked knows what to leave out.
A sample is the time of a generation after its prompt, by its number of tokens. Nothing is read from the device before
the last token is there.
"""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sfmp.bench import gpu_ceilings
from sfmp.bench.decode import weight_bytes
from sfmp.bench.decode_models import MODELS, Candidate, candidates, dense_model, shared_bytes
from sfmp.bench.gpu_timing import Settings
from sfmp.bench.static_decode import StaticDecoder
from sfmp.checks import write_atomically

BEFORE = 2  # steps that are not counted, at the head of every generation


@dataclasses.dataclass(frozen=True)
class Ready:
    """A candidate that decoded in one way.

    Attributes
    ----------
    candidate : Candidate
    decoder : StaticDecoder
    graph, compiled : bool
    weight_bytes : int, read by a step
    peak_bytes : int or None
        Most memory of the device that the model would have taken alone.
    """

    candidate: Candidate
    decoder: StaticDecoder
    graph: bool
    compiled: bool
    weight_bytes: int
    peak_bytes: int | None


def measure_model(part: dict, settings: dict, tell: Callable[[str], None]) -> dict:
    """Measure one model.

    Parameters
    ----------
    part : dict
        model, a name of `MODELS`; layers; skip {weights: why} of candidates to leave out.
    settings : dict
        device, bpw, modes, compile, prompt_tokens, new_tokens, eager_tokens, rounds.
    tell : function that is given the weights that are tried next

    Returns
    -------
    dict
        "device" and "ceilings"; "rows"; "absent" {candidate: why it was not measured}.
    """
    device = settings["device"]
    small = {"rotation_bytes": 1, "sample_us": 50.0} if device == "cpu" else {}
    found = {"device": gpu_ceilings.describe_device(device),
             "ceilings": gpu_ceilings.ceilings(Settings(device, rounds=settings["rounds"], **small))}
    if device == "cuda":
        torch.cuda.empty_cache()
    ready, absent = prepare(part, settings, tell)
    facts = {"random": True, "layers": part["layers"], "full_layers": MODELS[part["model"]]["num_hidden_layers"]}
    return {**found, "rows": measure(ready, settings, facts, tell), "absent": absent}


def prepare(part: dict, settings: dict, tell: Callable[[str], None]) -> tuple[list[Ready], dict[str, str]]:
    """Make the candidates and let them decode: (those that do, why others do not)."""
    device = settings["device"]
    meter = _Meter(device)
    dense = dense_model(part["model"], part["layers"], device)
    ready, absent = [], {}
    for candidate in candidates(dense, settings["bpw"], settings["modes"], device):
        if candidate.weights in part["skip"]:
            absent[candidate.name] = part["skip"][candidate.weights]
            continue
        tell(candidate.weights)
        decoder = None
        for way in ways(candidate, settings):
            try:
                decoder = _let_decode(candidate, way, decoder, settings)
                shared = 0 if decoder.network is dense else shared_bytes(decoder.network, dense)
                ready.append(Ready(candidate, decoder, decoder.replay is not None, way == "compiled",
                                   weight_bytes(decoder.network), meter.peak(shared)))
            except Exception as error:  # a compiler, the driver, transformers: whatever it raises, others are measured
                absent[f"{candidate.name} {way}"] = (f"{type(error).__name__}: "
                                                     f"{(str(error).splitlines() or [''])[0][:300]}")
                break
        meter = _Meter(device)  # raises after a bad access: nothing runs in this process any more
    return ready, absent


def ways(candidate: Candidate, settings: dict) -> list[str]:
    """"eager", "graph" on a CUDA device, and "compiled" for torch and fused matrices of what settings["compile"] says.

    Compiled by torch, norms, positions and activation functions are few kernels: what a fast product leaves to do.
    """
    found = ["eager", "graph"] if settings["device"] == "cuda" else ["eager"]
    chosen = candidate.fused and candidate.bpw in settings["compile"] and candidate.weights.endswith(
        settings["modes"][0])
    return [*found, "compiled"] if settings["compile"] and (candidate.bpw is None or chosen) else found


def _let_decode(candidate, way, decoder, settings) -> StaticDecoder:
    """The decoder of the way before, or of its network, after it decoded in this way too; with a graph on a device."""
    if way != "graph":
        network = candidate.make() if decoder is None else decoder.network
        new_tokens = BEFORE + max(settings["new_tokens"], settings["eager_tokens"])
        decoder = StaticDecoder(network, settings["prompt_tokens"], new_tokens,
                                compiled=torch.compile(network) if way == "compiled" else None)
        decoder.start(_prompt(decoder, settings))
        decoder.run(BEFORE, graph=False)
    if way != "eager" and settings["device"] == "cuda":
        decoder.start(_prompt(decoder, settings))
        decoder.capture()
    return decoder


class _Meter:
    """The most memory of the device that was allocated from now on; None without one."""

    def __init__(self, device: str):
        self._on_device = device == "cuda"
        if self._on_device:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()

    def peak(self, besides: int) -> int | None:
        """Bytes, with those of `besides`, which were there before."""
        return torch.cuda.max_memory_allocated() - self._before + besides if self._on_device else None


def _prompt(decoder, settings):
    generator = torch.Generator().manual_seed(0)
    size = decoder.network.config.vocab_size
    prompt = torch.randint(0, size, (1, settings["prompt_tokens"]), generator=generator)
    return prompt.to(decoder.token.device)


def measure(ready: list[Ready], settings: dict, facts: dict, tell: Callable[[str], None], seed: int = 0) -> list[dict]:
    """Generate with every candidate in rounds.

    Returns
    -------
    list of dict
        One row per candidate: name, weights, bpw, fused, graph, compiled, `facts`, tokens (of a sample),
        tokens_per_second (from the median), seconds_per_token (samples), gigabytes_per_second, weight_bytes,
        peak_bytes.
    """
    order, samples = random.Random(seed), [[] for _ in ready]
    tokens = [settings["new_tokens" if one.graph or settings["device"] == "cpu" else "eager_tokens"] for one in ready]
    for _ in range(settings["rounds"]):
        for index in order.sample(range(len(ready)), len(ready)):
            tell(ready[index].candidate.weights)
            samples[index].append(_sample(ready[index], tokens[index], settings))
    rows = []
    for one, count, seconds in zip(ready, tokens, samples, strict=True):
        median = statistics.median(seconds)
        rows.append({
            "name": one.candidate.name, "weights": one.candidate.weights, "bpw": one.candidate.bpw,
            "fused": one.candidate.fused, "graph": one.graph, "compiled": one.compiled, **facts, "tokens": count,
            "tokens_per_second": 1 / median, "seconds_per_token": seconds,
            "gigabytes_per_second": one.weight_bytes / 1e9 / median, "weight_bytes": one.weight_bytes,
            "peak_bytes": one.peak_bytes})
    return rows


def _sample(one, tokens, settings):
    """Seconds per token of one generation."""
    one.decoder.start(_prompt(one.decoder, settings))
    one.decoder.run(BEFORE, one.graph)
    _wait(settings["device"])
    start = time.perf_counter()
    one.decoder.run(tokens, one.graph)
    _wait(settings["device"])
    return (time.perf_counter() - start) / tokens


def _wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    given, chosen, target, trying = sys.argv[1:]
    measured = measure_model(json.loads(given), json.loads(chosen), Path(trying).write_text)
    write_atomically(Path(target), lambda path: path.write_text(json.dumps(measured, allow_nan=False)))
