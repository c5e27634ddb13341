"""The few functions of the CUDA driver that a launch needs, called through ctypes.

A kernel loaded with ``cuLibraryLoadData`` belongs to no context: the driver puts it into the context that is current
when it is launched, so one handle serves every device of an architecture.

Source: CUDA driver API 13.0, sections "Library Management", "Execution Control" and "Primary Context Management".
"""

from __future__ import annotations

import ctypes
import functools
import sys

from sfmp.checks import SfmpError

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
OLD_DRIVER = "the driver must be of CUDA 12.0 or newer: update it"

_handle, _number = ctypes.c_void_p, ctypes.c_int


class Driver:
    """Functions of the driver.

    Parameters
    ----------
    library : ctypes.CDLL or what has its functions; tests give a stand-in
    stream : function, index of a device → handle of torch's current stream there
    device : function → index of torch's current device

    Attributes
    ----------
    launch : ``cuLaunchKernel``, which takes ctypes objects and gives a status for `check`
        It copies what the parameters point to before it returns.
    stream, device : as given
    """

    def __init__(self, library, stream, device):
        self._library, self.stream, self.device = library, stream, device
        self._contexts: dict[int, int] = {}
        try:
            self.launch = library.cuLaunchKernel
            functions = [getattr(library, name) for name in (
                "cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelSetAttribute", "cuKernelGetFunction",
                "cuGetErrorName", "cuGetErrorString", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent")]
        except AttributeError as error:
            raise SfmpError(f"CUDA driver: expected the functions of CUDA 12.0, but {error}; {OLD_DRIVER}") from error
        for function in (self.launch, *functions):
            function.restype = _number
        (self._load, self._kernel, self._set, self._function, self._name, self._text, self._device, self._retain,
         self._make_current) = functions
        self._load.argtypes = [_handle, ctypes.c_char_p, *[_handle] * 2, ctypes.c_uint, *[_handle] * 2, ctypes.c_uint]
        self._kernel.argtypes = [_handle, _handle, ctypes.c_char_p]
        self._set.argtypes = [_number, _number, _handle, _number]
        self._function.argtypes = [_handle, _handle]
        self._name.argtypes = self._text.argtypes = [_number, _handle]
        self._device.argtypes = [_handle, _number]
        self._retain.argtypes = [_handle, _number]
        self._make_current.argtypes = [_handle]

    def load(self, image: bytes, name: str) -> int:
        """Return the handle of a kernel from compiled code: a cubin, or PTX that the driver compiles.

        Libraries stay loaded: their kernels may be in graphs.

        Raises
        ------
        SfmpError
            The driver cannot load the code.
        """
        library, kernel = _handle(), _handle()
        self.check(self._load(ctypes.byref(library), image, None, None, 0, None, None, 0), f"loading kernel {name}")
        self.check(self._kernel(ctypes.byref(kernel), library, name.encode()), f"finding kernel {name}")
        return kernel.value

    def settle(self, kernel: int, device: int, name: str) -> None:
        """Put a kernel into the current context, that of `device`, now: at a launch inside a graph it is too late."""
        function = _handle()
        status = self._function(ctypes.byref(function), kernel)
        if status == NO_CONTEXT:
            self.bind(device)
            status = self._function(ctypes.byref(function), kernel)
        self.check(status, f"loading kernel {name} onto device {device}")
        force = getattr(self._library, "cuFuncLoad", None)  # CUDA 12.4
        if force is not None:
            force.restype, force.argtypes = _number, [_handle]
            self.check(force(function), f"loading kernel {name} onto device {device}")

    def allow_shared(self, kernel: int, size: int, device: int, name: str) -> None:
        """Let a kernel be launched with so many bytes of shared memory beyond what it declares."""
        self.check(self._set(MAX_DYNAMIC_SHARED, size, kernel, self._number_of(device)),
                   f"kernel {name}: {size} bytes of shared memory")

    def bind(self, device: int) -> None:
        """Make the context of a device, which torch uses too, current in this thread."""
        if device not in self._contexts:
            context = _handle()
            self.check(self._retain(ctypes.byref(context), self._number_of(device)), f"context of device {device}")
            self._contexts[device] = context.value
        self.check(self._make_current(self._contexts[device]), f"context of device {device}")

    def _number_of(self, device: int) -> int:
        """The driver's number of a device, from torch's: both leave out what CUDA_VISIBLE_DEVICES does."""
        number = _number()
        self.check(self._device(ctypes.byref(number), device), f"finding device {device}")
        return number.value

    def check(self, status: int, what: str) -> None:
        """Raise SfmpError with the driver's name and words for a status other than success."""
        if status:
            name, text = ctypes.c_char_p(), ctypes.c_char_p()
            self._name(status, ctypes.byref(name))
            self._text(status, ctypes.byref(text))
            name, text = (part.value.decode() if part.value else "unknown" for part in (name, text))
            raise SfmpError(f"CUDA driver, {what}: expected success, found {name} ({status}, {text}); if it is not "
                            "the first error of the process, look for the first")


@functools.cache
def current() -> Driver:
    """The driver of this machine.

    Raises
    ------
    SfmpError
        There is none, or it is too old.
    """
    import torch

    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise SfmpError(f"CUDA driver: expected {LIBRARY}, but {error}; install NVIDIA's driver") from error
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # what compiled models use; the public way makes objects

    def stream(index):
        return torch.cuda.current_stream(index).cuda_stream

    return Driver(library, raw or stream, torch.cuda.current_device)
