"""Host time of a product: ``python -m kernels_numba.gpu.host_time [--calls N]``.

Where there is no CUDA device a stand-in takes the place of the driver: compiled code that reads the parameters of every
launch and returns. Memory is the host's then, and torch's allocator that of the host. What is measured is all that this
package and torch do for a call; what the driver does is not in it, and the number says so.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import time
from types import SimpleNamespace

import torch

from kernels_numba.gpu import cubins, devices, launch
from kernels_numba.gpu.driver import Driver
from kernels_numba.gpu.prepared import Kernels
from kernels_numba.gpu.weight import LAYOUTS, make_weight
from sfmp.bench.random_model import random_packed
from sfmp.linear import SFMPLinear

SHAPE, RUNS = (256, 1024), 100  # the least of many short runs: other work of the machine hits some of them


def stand_in() -> devices.Device:
    """A device without a driver."""
    from numba import cfunc, types

    @cfunc(types.int32(types.uint64, *[types.uint32] * 7, types.uint64, types.CPointer(types.CPointer(types.uint64)),
                       types.uint64))
    def take(kernel, x, y, z, a, b, c, shared, stream, parameters, extra):
        found = types.uint64(0)
        for i in range(6):  # no kernel has fewer
            found ^= parameters[i][0]
        return 0 if found else 999  # so that reading is not optimized away; it is never 0 with addresses among them

    def nothing(*_):
        return 0

    functions = ("cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelSetAttribute", "cuKernelGetFunction",
                 "cuGetErrorName", "cuGetErrorString", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent")
    library = SimpleNamespace(**{name: _Named(nothing) for name in functions})
    library.cuLaunchKernel = ctypes.CFUNCTYPE(ctypes.c_int)(take.address)
    library.take = take
    kernels = Kernels(Driver(library, lambda index: 1, lambda: 0), 0, (9, 0), lambda: False)
    return _Host(0, "no device", kernels, launch.settings(launch.DEFAULT), 132, True)


class _Named:
    restype = argtypes = None

    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments):
        return self.function(*arguments)


class _Host(devices.Device):
    def guard(self):
        return contextlib.nullcontext()

    def finish(self):
        return None


def measure(calls: int, device: torch.device) -> list[dict]:
    """Return one row per mode: microseconds of a product of one token, least of several runs of `calls` calls."""
    packed, found = random_packed(*SHAPE, 3.25), []  # 2, 3 and 4 bits
    x = torch.zeros(1, SHAPE[1], dtype=torch.float16, device=device)
    for mode in LAYOUTS:
        weight = make_weight(packed, mode, device)
        layer = SFMPLinear(packed)
        layer.mode = mode
        layer._cache["ready"] = layer.backend, mode, weight, mode, *packed.source()
        with torch.inference_mode():
            row = {"mode": mode, "launches": len(weight.prepared(1, x.dtype)._handles),
                   "multiply_us": _least(calls, lambda: weight.multiply(x, None)),  # noqa: B023 - called at once
                   "layer_us": _least(calls, lambda: layer.forward(x)),  # noqa: B023
                   "memory_us": _least(calls, lambda: (x.new_empty(1, SHAPE[0]), x.new_empty(512)))}
        found.append(row)
    return found


def _least(calls, function) -> float:
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times.append(time.perf_counter() - start)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return round(min(times) / calls * 1e6, 3)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels_numba.gpu.host_time",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=500)
    options = parser.parse_args(arguments)
    real = torch.cuda.is_available()
    if not real:
        device = stand_in()
        devices.get, cubins.get = lambda index: device, lambda launch, capability: b""
    rows = measure(options.calls, torch.device("cuda", 0) if real else torch.device("cpu"))
    driver = "included" if real else "excluded: a stand-in takes its place, and memory is the host's"
    print(json.dumps({"driver": driver, "torch": torch.__version__, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
