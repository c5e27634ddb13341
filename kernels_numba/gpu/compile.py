"""Launch → machine code, without a device: Numba writes PTX, nvJitLink assembles it.

Numba is asked for PTX only and never touches the driver: nothing of it is in torch's context, no memory, no stream.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

from kernels_numba.gpu.launches import Launch, signature
from sfmp.checks import SfmpError

# What Numba compiles with, and what it asks for the architectures it may compile for: library → package.
LIBRARIES = {"nvvm": "nvidia-nvvm", "nvrtc": "nvidia-cuda-nvrtc"}
_lock = threading.RLock()  # Numba's front end, and the stand-in below, serve one thread at a time


def missing_library() -> str | None:
    """Return why kernels cannot be compiled here, or None."""
    try:
        from cuda import pathfinder
    except ImportError as error:
        return f"{error}; install numba-cuda"
    for library, package in LIBRARIES.items():
        try:
            pathfinder.load_nvidia_dynamic_lib(library)
        except (RuntimeError, OSError) as error:  # DynamicLibNotFoundError is a RuntimeError
            toolkit = _toolkit()
            if toolkit is not None and not {"CUDA_HOME", "CUDA_PATH"} & os.environ.keys():
                os.environ["CUDA_HOME"] = toolkit  # where Numba looks for what is in no package and no system folder
                return missing_library()
            return f"lib{library}: {str(error).splitlines()[0]}; install {package} or the CUDA toolkit"
    return None


def _toolkit() -> str | None:
    """Folder of an installed CUDA toolkit: that of nvcc, or the usual one."""
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parents[1]] if nvcc else []
    return next((str(path) for path in (*folders, Path("/usr/local/cuda")) if (path / "nvvm").is_dir()), None)


def name_of(launch: Launch) -> str:
    """What a kernel is called in compiled code and in profiles.

    Examples
    --------
    >>> from kernels_numba.gpu import lut
    >>> name_of(Launch(lut.make_sum, ("float16",), "", (), (1, 1), 32))
    'sfmp_lut_sum'
    """
    file = launch.make.__module__.rpartition(".")[2]
    return f"sfmp_{file}_{launch.make.__name__.removeprefix('make_')}"


def make_ptx(launch: Launch, capability: tuple[int, int]) -> str:
    """Return the PTX of a kernel, its entry called `name_of`.

    Raises
    ------
    SfmpError
        A library is missing, or Numba cannot compile it.
    """
    why = missing_library()
    if why:
        raise SfmpError(f"CUDA kernels: expected the libraries that compile them, but {why}")
    from kernels_numba.gpu import primitives  # noqa: F401 - mends NumPy for Numba before the first compile

    from numba import cuda  # isort: skip
    from numba.core.errors import NumbaError  # isort: skip

    with _lock, _current_device(capability):
        kernel = launch.make(*launch.options)
        try:
            ptx = cuda.compile(kernel.py_func, signature(launch.types), device=False, abi="numba", cc=capability,
                               launch_bounds=kernel.targetoptions.get("launch_bounds"))[0]
        except (NumbaError, RuntimeError) as error:
            raise SfmpError(f"kernel {name_of(launch)}{launch.options}: expected Numba to compile it for {capability}, "
                            f"but {error}; report it with the versions of numba and numba-cuda") from error
    entry = re.search(r"\.entry\s+(\w+)\s*\(", ptx)[1]
    return re.sub(rf"\b{entry}\b", name_of(launch), ptx)


@contextlib.contextmanager
def _current_device(capability):
    """Answer for Numba's current device: it asks for that when it compiles device functions, whatever it is given."""
    dispatcher = importlib.import_module("numba.cuda.dispatcher")
    kept = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
    try:
        yield
    finally:
        dispatcher.get_current_device = kept


def assemble(ptx: str, capability: tuple[int, int], name: str) -> bytes:
    """PTX → cubin with nvJitLink; where that cannot be loaded the PTX itself, which the driver assembles.

    Raises
    ------
    SfmpError
        nvJitLink finds an error in the PTX.
    """
    linker = nvjitlink()
    source = ptx.encode()
    if linker is None:
        return source + b"\0"
    link = linker.create(1, [f"-arch=sm_{capability[0]}{capability[1]}"])
    try:
        try:
            linker.add_data(link, linker.InputType.PTX, source, len(source), name)
            linker.complete(link)
        except linker.nvJitLinkError as error:
            log = bytearray(linker.get_error_log_size(link))
            linker.get_error_log(link, log)
            if b"version" in log:  # older than libnvvm; a driver that runs the device may be newer
                return source + b"\0"
            raise SfmpError(f"kernel {name}: expected nvJitLink to assemble it for {capability}, but {error}: "
                            f"{log.decode(errors='replace')[:2000]}") from error
        cubin = bytearray(linker.get_linked_cubin_size(link))
        linker.get_linked_cubin(link, cubin)
        return bytes(cubin)
    finally:
        linker.destroy(link)


def nvjitlink():
    """The module that calls nvJitLink, or None where it or the library is missing."""
    try:
        from cuda.bindings import nvjitlink as linker

        linker.version()  # loads the library
    except Exception:  # what is raised for a missing library differs from version to version; the driver can do it too
        return None
    return linker
