"""Compiling kernels before they are measured, on all processors at once.

A kernel takes Numba seconds, and a session measures with dozens. Which ones is asked of the plans; a kernel that this
misses is compiled when it is first used.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor

from sfmp.bench.gpu_wanted import Wanted, wanted
from sfmp.checks import SfmpError

MOST_ROWS = 8192  # a matrix with so many rows is launched with the kernels of any taller one
MOST_PROCESSES = 12


def build(parts: list[dict], settings, tell: Callable[[str], None]) -> dict:
    """Compile what the parts need into the cache on disk.

    Returns
    -------
    dict
        "compiled": {kernels, seconds, failed: what did not compile, and why}; nothing on a processor or without a
        cache on disk.
    """
    import torch

    from kernels_numba.gpu import cubins

    if settings.device == "cpu" or cubins.folder() is None:
        return {}
    tell("compile")
    start = time.perf_counter()
    with ProcessPoolExecutor(min(MOST_PROCESSES, multiprocessing.cpu_count()),
                             multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
                             ) as pool:
        count, failed = compile_all(tasks(parts, settings.device), torch.cuda.get_device_capability(), pool, tell)
    return {"compiled": {"kernels": count, "seconds": round(time.perf_counter() - start, 1), "failed": failed}}


def tasks(parts: list[dict], device: str) -> list[tuple]:
    """(shape, candidates of one matrix and layout) of all parts, each candidate once."""
    found: dict[tuple, dict[Wanted, None]] = {}
    for part in parts:
        for one in wanted(part, device):
            if one.way != "dequantize" and not one.around:
                rows, columns = part["shape"]
                found.setdefault((min(rows, MOST_ROWS), columns, one.kind, one.way), {})[one] = None
    return [((rows, columns), list(ones)) for (rows, columns, _, _), ones in found.items()]


def compile_all(found: list[tuple], capability: tuple[int, int], pool: Executor, tell) -> tuple[int, dict]:
    """Compile all kernels that tasks need; return how many, and {kernel: why} of those that failed."""
    kernels = {}
    for number, launches in enumerate(pool.map(launches_of, *zip(*found, strict=True))):
        tell(f"compile: plans {number + 1} of {len(found)}")
        kernels.update({(launch.make.__qualname__, launch.options, launch.types): launch for launch in launches})
    failed = {}
    work = {key: pool.submit(compile_one, launch, capability) for key, launch in kernels.items()}
    for number, (key, one) in enumerate(work.items()):
        why = one.result()
        tell(f"compile: {number + 1} of {len(work)}")
        if why:
            failed[f"{key[0]}{key[1]}"] = why
    return len(work), failed


def launches_of(shape: tuple[int, int], ones: list[Wanted]) -> list:
    """The launches of candidates of one matrix, without what does not decide their code."""
    from kernels_numba.gpu.weight import LAYOUTS
    from sfmp.bench.gpu_candidates import random_matrix

    layouts, plans = LAYOUTS[ones[0].way]
    layout = layouts.make_layout(random_matrix(*shape, ones[0].kind))
    return [dataclasses.replace(launch, arguments=(), grid=(1, 1)) for one in ones
            for launch in plans.plan(layout, one.tokens, one.dtype, **dict(one.options)).launches]


def compile_one(launch, capability: tuple[int, int]) -> str | None:
    """Compile a kernel into the cache; return why it cannot be, or None."""
    from kernels_numba.gpu import cubins

    try:
        cubins.get(launch, capability)
    except SfmpError as error:
        return str(error).splitlines()[0]
    return None
