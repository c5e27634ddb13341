"""A CUDA driver without a device: it keeps what it is called with, and of kernel parameters what they point to."""

import contextlib
import ctypes
import traceback

from kernels_numba.gpu import devices, launch
from kernels_numba.gpu.driver import Driver
from kernels_numba.gpu.prepared import Kernels

FAILED = 999  # CUDA_ERROR_UNKNOWN
LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3)
RESULTS = {"cuLibraryLoadData": 0x10, "cuDeviceGet": 3, "cuDevicePrimaryCtxRetain": 0x77, "cuKernelGetFunction": 0x99,
           "cuCtxSetCurrent": None, "cuKernelSetAttribute": None, "cuFuncLoad": None, "cuLibraryGetKernel": None,
           "cuGetErrorName": b"CUDA_ERROR_STAND_IN", "cuGetErrorString": b"no device here"}


class Library:
    """Functions of libcuda.

    Attributes
    ----------
    types : dict, kernel name → letters of its parameters, which a launch reads by them
    names : dict, kernel handle → name
    calls : list of (function, values of its arguments after the first)
    launches : list of (kernel name, grid, block, shared bytes, stream, parameters)
    status : dict, function → list of what it returns, the last from then on
    """

    def __init__(self, types=None):
        self.types, self.names, self.calls, self.launches, self.status = dict(types or {}), {}, [], [], {}
        self.cuLaunchKernel = LAUNCH(self._launch)
        for name in RESULTS:
            setattr(self, name, _Function(self, name))

    def next_status(self, name):
        given = self.status.get(name, [0])
        return given.pop(0) if len(given) > 1 else given[0]

    def _launch(self, kernel, *rest):
        status = self.next_status("cuLaunchKernel")
        if status == 0:
            name, parameters = self.names[kernel], rest[8]
            pointers = (ctypes.c_void_p * len(self.types[name])).from_address(parameters)
            values = [(ctypes.c_int32 if letter == "n" else ctypes.c_uint64).from_address(pointer).value
                      for letter, pointer in zip(self.types[name], pointers, strict=True)]
            try:
                self.launched(kernel, rest[:3], rest[3:6], rest[6], rest[7] or 0, values)
            except Exception:  # ctypes would print it and return 0
                traceback.print_exc()
                return FAILED
        return status

    def launched(self, kernel, grid, block, shared, stream, values):
        self.launches.append((self.names[kernel], grid, block, shared, stream, values))


class _Function:
    restype = argtypes = None

    def __init__(self, library, name):
        self.library, self.name = library, name

    def __call__(self, first, *rest):
        values = [getattr(value, "value", value) for value in rest]
        self.library.calls.append((self.name, *values))
        result = RESULTS[self.name]
        if self.name == "cuLibraryGetKernel":
            result = 0x1000 + len(self.library.names)
            self.library.names[result] = values[1].decode()
        if self.name.startswith("cuGetError"):
            rest[0]._obj.value = result
        elif result is not None:
            first._obj.value = result
        return self.library.next_status(self.name)


class StandIn(devices.Device):
    """A device whose driver is a `Library` and whose memory is the host's; it counts guards and waits."""

    def guard(self):
        self.counts["guard"] += 1
        return contextlib.nullcontext()

    def finish(self):
        self.counts["finish"] += 1

    @property
    def counts(self):
        return self.__dict__.setdefault("_counts", {"guard": 0, "finish": 0})


def stand_in(library, *, index=0, current=lambda: 0, stream=lambda index: 5, capturing=lambda: False, alone=True,
             crossover=64, multiprocessors=4):
    """A device with this library."""
    kernels = Kernels(Driver(library, stream, current), index, (9, 0), capturing)
    settings = launch.Settings(crossover, {"mma": None, "lut": 8}, 2, False)
    return StandIn(index, "stand-in", kernels, settings, multiprocessors, alone)
