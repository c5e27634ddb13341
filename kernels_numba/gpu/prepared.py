"""Launches whose arguments lie ready: a call writes a few addresses and hands the rest to the driver as it is.

The parameters of all launches of a plan are 8-byte slots of one buffer, those that change from call to call first, so
that one instruction of Python writes them all; two launches that take the same address share its slot. What the driver
is called with are ctypes objects made once. It copies parameters before it returns.

Two threads may multiply with one matrix at a time, and the driver lets other threads of Python run meanwhile, so a call
takes a buffer that nobody else has from a list and puts it back (both are single steps of the interpreter): no lock is
held while the driver waits for room in a queue, and no thread waits for another.
"""

from __future__ import annotations

import ctypes
import dataclasses
import struct
import threading

from kernels_numba.gpu import cubins
from kernels_numba.gpu.compile import name_of
from kernels_numba.gpu.driver import NO_CONTEXT, Driver
from kernels_numba.gpu.launches import Launch, Plan
from sfmp.checks import SfmpError

SIZES = {"u": 4, "h": 2, "f": 4, "i": 4}  # bytes of an element, by letter of `launches.TYPES`
ALIGNMENT = 256  # of arrays in one allocation; what torch's allocator gives its own


class Kernels:
    """Kernels on one device, loaded when they are first asked for.

    Parameters
    ----------
    driver : Driver
    device : int
    capability : (major, minor)
    capturing : function → whether torch's current stream records a graph
    """

    def __init__(self, driver: Driver, device: int, capability: tuple[int, int], capturing):
        self.driver, self.device, self.capability, self.capturing = driver, device, capability, capturing
        self._handles: dict[tuple, int] = {}
        self._shared: dict[int, int] = {}  # kernel → most shared memory asked for
        self._lock = threading.RLock()  # a thread that loads late must not take shared memory back

    def get(self, launch: Launch) -> int:
        """Return the handle of a kernel.

        Raises
        ------
        SfmpError
            It is not loaded yet and a graph is being captured, or it cannot be compiled or loaded.
        """
        key, name = (launch.make, launch.options, launch.types), name_of(launch)
        with self._lock:
            handle = self._handles.get(key)
            if handle is None:
                self.forbid_capture(f"kernel {name}{launch.options} is not loaded on device {self.device}")
                handle = self.driver.load(cubins.get(launch, self.capability), name)
                self.driver.settle(handle, self.device, name)
                self._handles[key] = handle
            if launch.shared_bytes > self._shared.get(handle, 0):
                self.driver.allow_shared(handle, launch.shared_bytes, self.device, name)
                self._shared[handle] = launch.shared_bytes
        return handle

    def forbid_capture(self, what: str) -> None:
        """Raise SfmpError while a graph is being captured."""
        if self.capturing():
            raise SfmpError(f"CUDA graph: expected a product that has run before on this device, but {what}; call the "
                            "model once with the same number of tokens and dtype before the capture")


def scratch_places(plan: Plan) -> tuple[dict[str, int], int]:
    """First byte of every scratch array of a plan in one allocation, and the bytes of all.

    Examples
    --------
    >>> scratch_places(Plan({"a": (3, "h"), "b": (1, "f")}, ()))
    ({'a': 0, 'b': 256}, 260)
    """
    places, end = {}, 0
    for name, (elements, letter) in plan.scratch.items():
        places[name] = -(-end // ALIGNMENT) * ALIGNMENT
        end = places[name] + elements * SIZES[letter]
    return places, end


@dataclasses.dataclass
class _Buffer:
    """Parameters of one call at a time.

    Attributes
    ----------
    slots : ctypes array of 8-byte numbers
    stream : ctypes object, an argument of every launch
    calls : per launch the arguments of ``cuLaunchKernel``
    kept : what the driver is given addresses of
    """

    slots: ctypes.Array
    stream: ctypes.c_void_p
    calls: list[tuple]
    kept: list


class Prepared:
    """A plan on one device with the arrays of one matrix.

    Parameters
    ----------
    plan : Plan
    addresses : dict
        Of the arrays of the matrix.
    kernels : Kernels
    call : names of the arrays that come with a call, scratch aside

    Attributes
    ----------
    scratch_bytes : int, of the scratch array that a call takes
    """

    def __init__(self, plan: Plan, addresses: dict[str, int], kernels: Kernels,
                 call: tuple[str, ...] = ("x", "y", "bias")):
        self._driver, self._device = kernels.driver, kernels.device
        self._launch, self._stream = kernels.driver.launch, kernels.driver.stream
        self._handles = [kernels.get(launch) for launch in plan.launches]
        self._launches = plan.launches
        scratch, self.scratch_bytes = scratch_places(plan)
        changing: dict[tuple, int] = {}  # (number among the arguments of a call, bytes beyond) → slot
        constants: dict[int, int] = {}  # value → slot
        wanted = []
        for launch in plan.launches:
            own = []
            for argument, letter in zip(launch.arguments, launch.types, strict=True):
                if letter == "n":
                    own.append((constants, int(argument) & 0xFFFFFFFF))  # little-endian: the first 4 bytes of a slot
                    continue
                name, first = argument if isinstance(argument, tuple) else (argument, 0)
                if name in addresses:
                    own.append((constants, addresses[name] + first * SIZES[letter]))
                else:
                    base, beyond = (call.index(name), 0) if name in call else (len(call), scratch[name])
                    own.append((changing, (base, beyond + first * SIZES[letter])))
            wanted.append(own)
        for own in wanted:
            for table, value in own:
                table.setdefault(value, len(table))
        self._changing = tuple(changing)
        self._values = [*[0] * len(changing), *constants]
        self._places = [[table[value] + (0 if table is changing else len(changing)) for table, value in own]
                        for own in wanted]
        self._write = struct.Struct(f"{len(changing)}Q").pack_into
        self._free: list[_Buffer] = []

    def __call__(self, *given: int) -> None:
        """Enqueue the launches on torch's current stream of the device.

        Parameters
        ----------
        given : addresses of the arrays that come with a call, then that of scratch

        Raises
        ------
        SfmpError
            The driver refuses a launch.
        """
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = self._make()
        self._write(buffer.slots, 0, *[given[base] + beyond for base, beyond in self._changing])
        buffer.stream.value = self._stream(self._device)
        for call in buffer.calls:
            status = self._launch(*call)
            if status:
                self._failed(status, call, buffer)
        self._free.append(buffer)

    def _failed(self, status, call, buffer):
        """Try again with a context, which a thread that has not used CUDA yet does not have; else raise."""
        if status == NO_CONTEXT:
            self._driver.bind(self._device)
            status = self._driver.launch(*call)
        name = name_of(self._launches[buffer.calls.index(call)])
        self._driver.check(status, f"launching {name} on device {self._device}")

    def _make(self) -> _Buffer:
        slots = (ctypes.c_uint64 * len(self._values))(*self._values)
        start, stream = ctypes.addressof(slots), ctypes.c_void_p()
        calls, kept = [], []
        for launch, handle, places in zip(self._launches, self._handles, self._places, strict=True):
            pointers = (ctypes.c_void_p * len(places))(*[start + 8 * place for place in places])
            kept.append(pointers)
            calls.append((ctypes.c_void_p(handle), *map(ctypes.c_uint, (*launch.grid, 1, launch.threads, 1, 1,
                                                                        launch.shared_bytes)),
                          stream, ctypes.c_void_p(ctypes.addressof(pointers)), ctypes.c_void_p()))
        return _Buffer(slots, stream, calls, kept)
