"""Products of torch tensors on a CUDA device, launched by Numba: what first runs and tests on a device need.

Numba's launches take tens of microseconds of host time each, so this is no way to measure a small product by the clock
on the wall. What a captured graph of it replays is the kernels alone.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from kernels_numba.gpu import lut_layout, lut_run, mma_layout, mma_run
from sfmp.checks import SfmpError

LUT_KINDS = (torch.float16, torch.bfloat16, torch.float32)
MMA_KINDS = LUT_KINDS[:2]
WAVES = 2  # blocks of the look-up kernel per multiprocessor that sharing out tiles aims at


class LutWeight:
    """A matrix laid out for the look-up kernel on a device.

    Attributes
    ----------
    layout : LutLayout
    width : int, of the tables: 2, 4, 6 or 8
    panels, shares : int, grid of the kernel
    """

    def __init__(self, packed, device, width: int = 8):
        self.layout, self.width = lut_layout.make_layout(packed), width
        host = lut_run.layout_arrays(self.layout, width)
        self.panels = len(host["panels"]) // 4
        blocks = WAVES * torch.cuda.get_device_properties(device).multi_processor_count
        self.shares = lut_run.choose_shares(self.layout, self.panels, blocks)
        self._arrays = {name: device_array(array, device) for name, array in host.items()}

    def multiply(self, x, y, bias):
        """Enqueue y = x Wᵀ + bias; x [tokens, K], y [tokens, N] contiguous and of one dtype, bias float32 [N]."""
        scratch = x.new_empty(lut_run.scratch_size(self.layout, self.width, self.shares), dtype=torch.float32)
        lut_run.multiply({name: wrap(array) for name, array in self._arrays.items()}, wrap(x), wrap(y), wrap(scratch),
                         wrap(bias), shape=(len(x), *self.layout.shape), segment=self.layout.segment,
                         kind=_kind(x), width=self.width, panels=self.panels, shares=self.shares, stream=stream())


class MmaWeight:
    """A matrix laid out for the tensor-core kernel on a device."""

    def __init__(self, packed, device):
        self.layout = mma_layout.make_layout(packed)
        self._arrays = {name: device_array(array, device) for name, array in
                        mma_run.layout_arrays(self.layout).items()}

    def multiply(self, x, y, bias):
        """Enqueue y = x Wᵀ + bias; see `LutWeight.multiply`."""
        scratch = {name: x.new_empty(size, dtype=torch.float32 if kind is np.float32 else torch.int16)
                   for name, (size, kind) in mma_run.scratch_sizes(self.layout, len(x)).items()}
        mma_run.multiply({name: wrap(array) for name, array in self._arrays.items()}, wrap(x), wrap(y),
                         {name: wrap(array) for name, array in scratch.items()}, wrap(bias),
                         shape=(len(x), *self.layout.shape), segment=self.layout.segment,
                         widths=self.layout.widths, kind=_kind(x), stream=stream())


def matmul(x: torch.Tensor, packed, mode: str | None = None, width: int = 8) -> torch.Tensor:
    """Return x Wᵀ + bias.

    Parameters
    ----------
    x : [..., K] on a CUDA device
        float16 or bfloat16; for "lut" also float32.
    packed : PackedMatrix, on any device
        Its layout on the device of x is kept in ``packed.cache``.
    mode : {"mma", "lut"}
        "mma" if None.
    width : int
        Of the tables of "lut".

    Raises
    ------
    SfmpError
        Wrong device, shape, dtype or mode.
    """
    mode = mode or "mma"
    if mode not in ("lut", "mma"):
        raise SfmpError(f"mode: expected lut or mma, found {mode!r}; leave it None")
    kinds = LUT_KINDS if mode == "lut" else MMA_KINDS
    if x.device.type != "cuda":
        raise SfmpError(f"x: expected a CUDA device for backend cuda, found {x.device}; move it")
    if x.ndim == 0 or x.shape[-1] != packed.shape[1] or x.dtype not in kinds:
        names = ", ".join(str(kind).removeprefix("torch.") for kind in kinds)
        raise SfmpError(f"x: expected {names} [..., {packed.shape[1]}] for mode {mode}, found {x.dtype} "
                        f"{list(x.shape)}; check in_features")
    with torch.cuda.device(x.device):
        key = ("cuda", x.device, mode, width)
        found = packed.derived().get(key)
        if found is None:
            found = LutWeight(packed, x.device, width) if mode == "lut" else MmaWeight(packed, x.device)
            packed.derived()[key] = found
        flat = x.detach().reshape(-1, packed.shape[1]).contiguous()
        y = flat.new_empty(len(flat), packed.shape[0])
        if packed.bias is None:
            bias = torch.zeros(packed.shape[0], device=x.device)
        else:
            bias = packed.bias.detach().to(x.device, torch.float32).contiguous()
        if len(flat):
            found.multiply(flat, y, bias)
        return y.reshape(*x.shape[:-1], packed.shape[0])


def device_array(array: np.ndarray, device) -> torch.Tensor:
    """Copy an array of 4-byte numbers to a device."""
    return torch.from_numpy(np.ascontiguousarray(array).view(np.int32)).to(device)


class _Memory:
    """Memory of a tensor as Numba takes it; torch names no unsigned types, and half-precision ones travel as uint16."""

    def __init__(self, tensor):
        kind = {torch.float32: "<f4", torch.int32: "<i4"}.get(tensor.dtype, "<u2")
        self.__cuda_array_interface__ = {"shape": (tensor.numel(),), "strides": None, "typestr": kind,
                                         "data": (tensor.data_ptr(), False), "version": 2}


def wrap(tensor: torch.Tensor):
    """The memory of a contiguous tensor as a one-dimensional Numba array."""
    from numba import cuda

    return cuda.as_cuda_array(_Memory(tensor), sync=False)


def stream():
    """torch's current stream as Numba takes it."""
    return _stream(torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream)


@functools.cache
def _stream(device: int, handle: int):
    from numba import cuda

    return cuda.external_stream(handle)


def _kind(x):
    return str(x.dtype).removeprefix("torch.")
