"""The parts of the GPU bench: what is tried and timed, and what is measured without timing.

On a processor, where the command only shows that it works, modes are those of the CPU kernels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from kernels_numba import matmul
from sfmp.bench import gpu_ceilings, gpu_peers
from sfmp.bench.gpu_candidates import Stock, activations
from sfmp.bench.gpu_products import table_bytes
from sfmp.bench.gpu_timing import Settings, relative_error
from sfmp.bench.gpu_wanted import ACCURACY_TOKENS, Kind, default_modes, wanted
from sfmp.linear import SFMPLinear

OUTLIER = 20.0  # standard deviations
CPU_TABLE_WIDTH = 4
TUNING_SECONDS = 60  # of a part, after which no further peer that is tuned or compiled at its first product is tried
HOST_CALLS, HOST_CPU_CALLS, HOST_SAMPLES = 200, 3, 11

Tell = Callable[[str], None]


def timed(part: dict, settings: Settings, attempt: Callable[..., None]) -> None:
    """Try every candidate of "product", "batch" or "width": ours, and of the first two the peers."""
    stock = Stock(part["shape"], settings, part["copy_gbps"])
    found = wanted(part, settings.device)
    if settings.device == "cuda":
        stock.lay_out(found)
    for one in found:
        attempt(one.name, partial(_with_table if part["part"] == "width" else _plain, stock, one))
    if part["part"] == "width":
        return
    start = time.monotonic()
    for tokens in part.get("batches", [1]):
        x = activations(tokens, part["shape"][1], settings.device)
        for name, make in gpu_peers.makers(*part["shape"], x, settings, part["copy_gbps"]).items():
            why = gpu_peers.missing(name, settings.device)
            if not why and not name.startswith("torch") and time.monotonic() - start > TUNING_SECONDS:
                name = f"{name} {tokens} tokens"
                why = f"not tried: the peers of {part['part']} had taken more than {TUNING_SECONDS} s"
            attempt(name, make, peer=why or "")


def _plain(stock, one):
    return stock.candidate(one)


def _with_table(stock, one):
    """The look-up kernel with tables of a width; the CPU kernels have one width, and their tables no bound."""
    candidate, width = stock.candidate(one), dict(one.options).get("width")
    candidate.facts.update(table_width=width or CPU_TABLE_WIDTH, table_bytes=width and table_bytes(width))
    return candidate


def accuracy(part: dict, settings: Settings, tell: Tell) -> list[dict]:
    """Relative errors against float64: by mode, bits, kind of activations and dtype.

    "outlier" activations have one column of 20 standard deviations.
    """
    plain = activations(ACCURACY_TOKENS, part["shape"][1], settings.device, torch.float32)
    outlier = plain.clone()
    outlier[:, len(outlier.T) // 3] = OUTLIER
    found, stock = [], Stock(part["shape"], _few(settings), part["copy_gbps"])
    for bits in (2, 3, 4):
        matrices = stock.matrices(Kind(bits))
        dense = matrices.dense()
        for name, x in (("gaussian", plain), ("outlier", outlier)):
            for dtype in (torch.float16, torch.bfloat16):
                given, facts = x.to(dtype), {"activations": name, "dtype": str(dtype).removeprefix("torch.")}
                exact = given.double() @ dense.T
                for mode in default_modes(settings.device):
                    tell(f"accuracy {mode} {bits} {name} {facts['dtype']}")
                    y = matrices.copies(mode).products(given)[0]()
                    found.append({"mode": mode, "bits": bits, **facts, "error": relative_error(y, exact)})
                y = torch.nn.functional.linear(given, dense.to(dtype))
                found.append({"mode": "torch", "bits": bits, **facts, "error": relative_error(y, exact)})
    return found


def host(part: dict, settings: Settings, tell: Tell) -> dict[str, dict]:
    """Microseconds of host time per eager call of one token, 3 bits, float16: {name: {median_us, samples_us}}.

    "SFMPLinear" is the layer, "operator" what a compiled model calls.
    """
    rows, columns = part["shape"]
    x = activations(1, columns, settings.device)
    packed = Stock(part["shape"], _few(settings), part["copy_gbps"]).matrices(Kind(3)).moved()
    calls = {}
    for mode in default_modes(settings.device):
        layer = SFMPLinear.from_packed(packed)
        layer.backend, layer.mode = settings.device, mode
        calls[f"kernels_numba.matmul {mode}"] = partial(matmul, x, packed, settings.device, mode)
        calls[f"SFMPLinear {mode}"] = partial(layer, x)
        calls[f"operator {mode}"] = partial(_operator, layer, x)
    dense = torch.zeros(rows, columns, dtype=x.dtype, device=x.device)
    calls["torch linear"] = partial(torch.nn.functional.linear, x, dense)
    found = {}
    for name, call in calls.items():
        tell(f"host {name}")
        call()
        samples = [_host_us(call, settings) for _ in range(HOST_SAMPLES)]
        found[name] = {"median_us": round(statistics.median(samples), 3), "samples_us": samples}
    return found


def _operator(layer, x):
    _, _, weight, mode, *_ = layer._cache["ready"]
    return weight.dispatch(x, None, mode)


def _few(settings):
    """Settings of a part that needs no copies."""
    return Settings(settings.device, rotation_bytes=1)


def _host_us(call, settings):
    """Microseconds until a call returns; on a device nothing waits for its result."""
    on_device = settings.device == "cuda"
    calls = HOST_CALLS if on_device else HOST_CPU_CALLS
    with torch.inference_mode():
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found = (time.perf_counter() - start) / calls * 1e6
    if on_device:
        torch.cuda.synchronize()
    return round(found, 3)


def ceilings(settings: Settings, tell: Tell) -> dict:
    """The device and what it can do at most."""
    tell("ceilings")
    return {"device": gpu_ceilings.describe_device(settings.device), "ceilings": gpu_ceilings.ceilings(settings),
            "rotation_bytes": settings.rotation()}
