"""What this process knows of each CUDA device: its kernels, its launch table, whether it can run them at all."""

from __future__ import annotations

import dataclasses
import functools

from kernels_numba.gpu import driver, launch
from kernels_numba.gpu.prepared import Kernels

wrong: set[tuple[int, str]] = set()  # (device, mode) whose first products were not right, see `check`
LEAST = (8, 0)  # compute capability: bfloat16 conversions and tensor-core tiles of 16 × 8 × 16


@dataclasses.dataclass(frozen=True)
class Device:
    """One CUDA device.

    Attributes
    ----------
    index : int
    name : str
    kernels : Kernels
    settings : launch.Settings
    multiprocessors : int
    alone : bool, the only one of the process
    """

    index: int
    name: str
    kernels: Kernels
    settings: launch.Settings
    multiprocessors: int
    alone: bool

    def guard(self):
        """Context in which this is torch's current device."""
        import torch

        return torch.cuda.device(self.index)

    def finish(self) -> None:
        """Wait for torch's current stream."""
        import torch

        torch.cuda.current_stream(self.index).synchronize()


@functools.cache
def get(index: int) -> Device:
    """Return a device.

    Raises
    ------
    SfmpError
        No driver that can launch the kernels.
    """
    import torch

    properties = torch.cuda.get_device_properties(index)
    kernels = Kernels(driver.current(), index, (properties.major, properties.minor),
                      torch.cuda.is_current_stream_capturing)
    return Device(index, properties.name, kernels, launch.settings(properties.name), properties.multi_processor_count,
                  torch.cuda.device_count() == 1)


def offered() -> str:
    """Return the names of the devices that can run the kernels."""
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
             if torch.cuda.get_device_capability(index) >= LEAST]
    return ", ".join(dict.fromkeys(names))


@functools.cache
def why_not() -> str | None:
    """Return why no device of this machine can run the kernels, or None. Starts CUDA in this process."""
    from importlib.util import find_spec

    missing = [name for name in ("torch", "numba", "numba_cuda") if find_spec(name) is None]
    if missing:
        names = " and ".join(name.replace("_", "-") for name in missing)
        return f"{names} cannot be imported; pip install 'sfmp[cuda]'"
    import torch

    if not torch.cuda.is_available():
        build = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        return f"{build}; needs an NVIDIA GPU"
    if torch.version.cuda is None:
        return "torch was built for AMD devices; needs an NVIDIA GPU"
    try:
        best = max(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    except RuntimeError as error:  # a forked process, a device that is broken or taken
        return f"CUDA does not start: {str(error).splitlines()[0]}"
    if best < LEAST:
        return f"compute capability {best[0]}.{best[1]}; needs {LEAST[0]}.{LEAST[1]} or newer"
    from kernels_numba.gpu.compile import missing_library
    from sfmp.checks import SfmpError

    try:
        driver.current()
    except SfmpError as error:
        return str(error)
    return missing_library()
