"""What a device can do at most, measured in the same session: copying, reading, multiplying."""

from __future__ import annotations

import platform
import shutil
import statistics
import subprocess

import torch

from sfmp.bench.gpu_timing import Settings, prepare
from sfmp.bench.timing import Candidate

COPIED_BYTES = 2 << 30
MATMUL_SIZE = 8192
SMALL_BYTES, SMALL_SIZE = 16 << 20, 256  # on a processor, which only shows that the command works
CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit")


def ceilings(settings: Settings) -> dict[str, float]:
    """Return copy_gbps (bytes read and written), read_gbps and matmul_tflops, medians."""
    on_device = settings.device == "cuda"
    size, side = (COPIED_BYTES, MATMUL_SIZE) if on_device else (SMALL_BYTES, SMALL_SIZE)
    source = torch.ones(size // 4, device=settings.device)
    target = torch.empty_like(source)
    copy_us = _median(lambda: target.copy_(source), settings)
    read_us = _median(source.sum, settings)
    factors = [torch.randn(side, side, device=settings.device).to(torch.float16 if on_device else torch.float32)
               for _ in range(2)]
    matmul_us = _median(lambda: torch.matmul(*factors), settings)
    return {"copy_gbps": round(2 * size / copy_us / 1e3, 2), "read_gbps": round(size / read_us / 1e3, 2),
            "matmul_tflops": round(2 * side**3 / matmul_us / 1e6, 4)}


def _median(function, settings):
    sample = prepare(Candidate("ceiling", "ceiling", [function], 1), settings).sample
    return statistics.median(sample() for _ in range(max(3, settings.rounds // 2)))


def describe_device(device: str) -> dict:
    """Name, capability, multiprocessors, memory_bytes, l2_bytes, driver and clocks; None where there is none."""
    if device == "cpu":
        return {"name": f"CPU ({platform.processor() or platform.machine()})", "capability": None,
                "multiprocessors": None, "memory_bytes": None, "l2_bytes": None, "driver": None, "clocks": None}
    found = torch.cuda.get_device_properties(0)
    driver, clocks = _management(str(getattr(found, "uuid", "")))
    return {"name": found.name, "capability": [found.major, found.minor],
            "multiprocessors": found.multi_processor_count, "memory_bytes": found.total_memory,
            "l2_bytes": found.L2_cache_size, "driver": driver, "clocks": clocks}


def _management(uuid):
    """(driver version, clocks in MHz and power limit in W by name) as nvidia-smi says, None where it does not."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None, None
    chosen = ["-i", f"GPU-{uuid.removeprefix('GPU-')}"] if uuid else []
    command = [program, *chosen, f"--query-gpu=driver_version,{','.join(CLOCKS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None, None
    values = [value.strip() for value in done.stdout.partition("\n")[0].split(",")]
    if done.returncode or len(values) != 1 + len(CLOCKS):
        return None, None
    return values[0], {name: _number(value) for name, value in zip(CLOCKS, values[1:], strict=True)}


def _number(text):
    try:
        return float(text)
    except ValueError:
        return None
