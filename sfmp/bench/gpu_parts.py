"""The parts of the GPU bench: which candidates meet in which part.

Names of ways: on a CUDA device "mma", "lut" and "dequantize"; on a processor, where the command only shows that it
works, the modes of the CPU kernels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from kernels_numba import matmul
from sfmp.bench import gpu_ceilings, gpu_peers
from sfmp.bench.gpu_candidates import Kind, Matrices
from sfmp.bench.gpu_products import WAYS, default_modes, table_bytes
from sfmp.bench.gpu_timing import Settings, relative_error
from sfmp.linear import SFMPLinear

BITS = (2, 2.5, 3, 3.5, 4)
KINDS = (*(Kind(bits) for bits in BITS), *(Kind(bits, "uniform") for bits in (2, 3, 4)),
         *(Kind(bits, "column groups", True) for bits in (2.5, 3, 3.5)), Kind(3, natural=True))
TABLE_WIDTHS, GROUP_SIZES = (2, 4, 6, 8), (32, 64, 128, 256)
ACCURACY_TOKENS, OUTLIER = 4, 20.0  # an outlier is this many standard deviations
CPU_TABLE_WIDTH = 4
HOST_CALLS, HOST_SAMPLES = 200, 11

Try = Callable[..., None]


def product(part: dict, settings: Settings, attempt: Try) -> None:
    """One token: our modes by bits and layouts, gather apart from the product, all peers."""
    shape, copy_gbps = part["shape"], part["copy_gbps"]
    x = _activations(1, shape[1], settings)
    for kind in KINDS:
        matrices = Matrices(*shape, kind, settings, copy_gbps)
        for mode in default_modes(settings.device):
            attempt(f"{mode} {kind.label}", partial(matrices.candidate, x, mode))
            if kind.layout == "blocks" and kind.natural:
                attempt(f"{mode} {kind.label} unfused", partial(matrices.candidate, x, mode, True))
            elif kind.layout == "blocks":
                attempt(f"{mode} {kind.label} bfloat16", partial(matrices.candidate, x.bfloat16(), mode))
            if kind == Kind(3) and mode == "mma":
                attempt(f"{mode} {kind.label} gather unfused", partial(matrices.candidate, x, mode, gather="unfused"))
    _peers(shape, x, settings, copy_gbps, attempt)


def batch(part: dict, settings: Settings, attempt: Try) -> None:
    """Several tokens: every way, torch and the peers that take them."""
    shape, copy_gbps = part["shape"], part["copy_gbps"]
    matrices = Matrices(*shape, Kind(3), settings, copy_gbps)
    for tokens in part["batches"]:
        x = _activations(tokens, shape[1], settings)
        for way in WAYS[settings.device]:
            attempt(f"{way} {tokens} tokens", partial(matrices.candidate, x, way))
        _peers(shape, x, settings, copy_gbps, attempt, f" {tokens} tokens")


def width(part: dict, settings: Settings, attempt: Try) -> None:
    """Look-up tables over 2, 4, 6 and 8 activations, for every group size, at 3 bits."""
    x = _activations(1, part["shape"][1], settings)
    for group_size in GROUP_SIZES:
        kind = Kind(3, "uniform", True, group_size)
        matrices = Matrices(*part["shape"], kind, settings, part["copy_gbps"])
        if settings.device == "cpu":
            attempt(f"lut16 {kind.label}", partial(_with_table, matrices, x, "lut16", CPU_TABLE_WIDTH))
            continue
        for table_width in TABLE_WIDTHS:
            attempt(f"lut {kind.label} width {table_width}", partial(_with_table, matrices, x, "lut", table_width))


def accuracy(part: dict, settings: Settings, tell: Callable[[str], None]) -> list[dict]:
    """Relative errors against float64: by mode, bits, kind of activations and dtype.

    "outlier" activations have one column of 20 standard deviations.
    """
    rows, columns = part["shape"]
    plain = _activations(ACCURACY_TOKENS, columns, settings).float()
    outlier = plain.clone()
    outlier[:, columns // 3] = OUTLIER
    found, few = [], Settings(settings.device, rotation_bytes=1)
    for bits in (2, 3, 4):
        matrices = Matrices(rows, columns, Kind(bits), few, part["copy_gbps"])
        dense = matrices.dense()
        for name, x in (("gaussian", plain), ("outlier", outlier)):
            for dtype in (torch.float16, torch.bfloat16):
                given, facts = x.to(dtype), {"activations": name, "dtype": str(dtype).removeprefix("torch.")}
                exact = given.double() @ dense.T
                for mode in default_modes(settings.device):
                    tell(f"accuracy {mode} {bits} {name} {facts['dtype']}")
                    y = matrices.products(given, mode)[0]()
                    found.append({"mode": mode, "bits": bits, **facts, "error": relative_error(y, exact)})
                y = torch.nn.functional.linear(given, dense.to(dtype))
                found.append({"mode": "torch", "bits": bits, **facts, "error": relative_error(y, exact)})
    return found


def host(part: dict, settings: Settings, tell: Callable[[str], None]) -> dict[str, dict]:
    """Microseconds of host time per eager call of one token, 3 bits, float16: {name: {median_us, samples_us}}."""
    rows, columns = part["shape"]
    few = Settings(settings.device, rotation_bytes=1)
    x = _activations(1, columns, settings)
    packed = Matrices(rows, columns, Kind(3), few, part["copy_gbps"]).moved()
    calls = {}
    for mode in default_modes(settings.device):
        layer = SFMPLinear.from_packed(packed)
        layer.backend, layer.mode = settings.device, mode
        calls[f"kernels_numba.matmul {mode}"] = partial(matmul, x, packed, settings.device, mode)
        calls[f"SFMPLinear {mode}"] = partial(layer, x)
    dense = torch.zeros(rows, columns, dtype=x.dtype, device=x.device)
    calls["torch linear"] = partial(torch.nn.functional.linear, x, dense)
    found = {}
    for name, call in calls.items():
        tell(f"host {name}")
        call()
        samples = [_host_us(call, settings) for _ in range(HOST_SAMPLES)]
        found[name] = {"median_us": round(statistics.median(samples), 3), "samples_us": samples}
    return found


def _host_us(call, settings):
    """Microseconds until a call returns; on a device nothing waits for its result."""
    calls = HOST_CALLS if settings.device == "cuda" else 3
    with torch.inference_mode():
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found = (time.perf_counter() - start) / calls * 1e6
    if settings.device == "cuda":
        torch.cuda.synchronize()
    return round(found, 3)


def ceilings(part: dict, settings: Settings, tell: Callable[[str], None]) -> dict:
    """The device and what it can do at most."""
    tell("ceilings")
    return {"device": gpu_ceilings.describe_device(settings.device), "ceilings": gpu_ceilings.ceilings(settings),
            "rotation_bytes": settings.rotation()}


def _activations(tokens, columns, settings):
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, columns, generator=generator).to(settings.device, torch.float16)


def _peers(shape, x, settings, copy_gbps, attempt, suffix=""):
    for name, make in gpu_peers.makers(*shape, x, settings, copy_gbps).items():
        attempt(name + suffix, make, peer=gpu_peers.missing(name, settings.device) or "")


def _with_table(matrices, x, mode, table_width):
    """The look-up kernel with tables of a width; the CPU kernels have one width, and their tables no bound."""
    on_device = x.device.type == "cuda"
    candidate = matrices.candidate(x, mode, **({"width": table_width} if on_device else {}))
    candidate.facts.update(table_width=table_width, table_bytes=table_bytes(table_width) if on_device else None)
    return candidate
