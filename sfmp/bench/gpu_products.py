"""Copies of one packed matrix, and functions that multiply with one of them each.

On a CUDA device a matrix is laid out once and its image is copied there; products go the way that a layer's go, so
eager times are those of users. On a processor every copy is repacked by the CPU kernels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

from kernels_numba import matmul
from sfmp.checks import SfmpError
from sfmp.packed import PackedMatrix

Products = list[Callable[[], torch.Tensor]]


def table_bytes(width: int) -> int:
    """Shared memory of a block of the look-up kernel for one token: its tables and the sums beside them."""
    from kernels_numba.gpu import lut

    return lut.shared_bytes(width, 1)


def make_copies(packed: PackedMatrix, way: str, count: int, device: str) -> DeviceCopies | HostCopies:
    """Copies of a matrix for one of `gpu_wanted.WAYS`, on "cuda" or "cpu"."""
    if device == "cpu":
        return HostCopies(packed, way, count)
    return DeviceCopies(packed, way, count, torch.device("cuda", torch.cuda.current_device()))


class DeviceCopies:
    """Copies on a CUDA device: one layout, several images."""

    def __init__(self, packed: PackedMatrix, way: str, count: int, device: torch.device):
        from kernels_numba.gpu import weight

        self._way, mode = way, "lut" if way == "lut" else "mma"
        first = weight.make_weight(packed, mode, device)
        self._weights = [first, *(weight.Weight(first.image.clone(), first.structure) for _ in range(count - 1))]

    def products(self, x: torch.Tensor, columns=None, rows=None, **options) -> Products:
        """One function for each copy that returns x Wᵀ.

        Parameters
        ----------
        x : [tokens, K]
        columns, rows : int64 [K], [N], optional
            torch permutes x before the product and y after it.
        options : of `mma_run.plan` or `lut_run.plan`
        """
        weights = [_with(weight, options) for weight in self._weights] if options else self._weights
        multiply = _dequantized if self._way == "dequantize" else _by_kernel
        bias = torch.zeros(weights[0].rows, device=x.device)
        products = [functools.partial(multiply, weight, bias) for weight in weights]
        return [functools.partial(_around, product, x, columns, rows) for product in products]

    def gather(self, x: torch.Tensor, **options) -> str:
        """Who orders activations: "fused", or "own kernel" where a launch before the product does."""
        from kernels_numba.gpu import mma_gather
        from kernels_numba.gpu.weight import LAYOUTS, name_of

        structure = self._weights[0].structure
        if self._way == "dequantize":
            return "own kernel"
        plan = LAYOUTS[structure.mode][1].plan(structure.layout, len(x), name_of(x.dtype), **options)
        return "own kernel" if any(launch.make is mma_gather.make_arrange for launch in plan.launches) else "fused"


def _with(weight, options):
    """The same image, multiplied with other options."""
    structure = dataclasses.replace(weight.structure, options={**weight.structure.options, **options})
    return type(weight)(weight.image, structure, weight.kinds)


def _by_kernel(weight, bias, x):
    """As a layer multiplies; from the crossover on, where a layer dequantizes, with the kernel all the same."""
    from kernels_numba.gpu import devices
    from kernels_numba.gpu.weight import CHUNK

    if weight.structure.mode == "lut" or len(x) < devices.get(x.device.index or 0).settings.crossover:
        return weight.multiply(x, None)
    y = x.new_empty(len(x), weight.rows)
    for first in range(0, len(x), CHUNK):
        run = weight.prepared(min(CHUNK, len(x) - first), x.dtype)
        scratch = x.new_empty(run.scratch_bytes, dtype=torch.uint8)
        run(x[first].data_ptr(), y[first].data_ptr(), bias.data_ptr(), scratch.data_ptr())
    return y


def _dequantized(weight, bias, x):
    from kernels_numba.gpu import panels

    y = x.new_empty(len(x), weight.rows)
    panels.multiply(weight, x, y, None)
    return y


class HostCopies:
    """Copies for the CPU kernels."""

    def __init__(self, packed: PackedMatrix, way: str, count: int):
        self._way = way
        self._packed = [dataclasses.replace(packed, planes=packed.planes.clone()) for _ in range(count)]

    def products(self, x: torch.Tensor, columns=None, rows=None, **options) -> Products:
        """See `DeviceCopies.products`; there are no options here."""
        if options:
            raise SfmpError(f"{', '.join(options)}: expected a CUDA device, found a processor; leave it out")
        products = [functools.partial(matmul, packed=packed, backend="cpu", mode=self._way) for packed in self._packed]
        return [functools.partial(_around, product, x, columns, rows) for product in products]

    def gather(self, x: torch.Tensor) -> str:
        """The CPU kernels read activations in order."""
        return "fused"


def _around(product, x, columns, rows):
    if columns is None:
        return product(x)
    return product(x.index_select(1, columns)).index_select(1, rows)
