"""The launch path in Numba's CUDA simulator: ``python cudasim_launch.py`` prints a JSON object of relative errors.

A driver's stand-in takes kernel handles, grids and parameters as the driver would, makes arrays of the memory that the
parameters point to and runs the kernels on them. Memory that torch gives out starts as NaN.
"""

import ctypes
import json
import os
import sys

os.environ["NUMBA_ENABLE_CUDASIM"] = "1"

import numpy as np
import torch
from cases import packed_case
from cuda_stand_in import Library, stand_in
from cudasim import SWITCH

from kernels_numba.gpu import check, devices, panels, product, weight
from sfmp.linear import SFMPLinear

NUMBERS = {"u": np.uint32, "h": np.uint16, "f": np.float32, "i": np.int32}


class Simulator(Library):
    """A driver that runs kernels; `memory` is a list of (first byte, end) of tensors whose address was asked."""

    def __init__(self):
        super().__init__()
        self.kernels, self.memory, self.tensors = {}, [], []

    def hold(self, tensor, first):
        """Let kernels reach a tensor, whose memory is not given out again."""
        self.tensors.append(tensor)
        place = first, first + tensor.numel() * tensor.element_size()
        if place not in self.memory:
            self.memory.append(place)

    def launched(self, kernel, grid, block, shared, stream, values):
        launch = self.kernels[kernel]
        pointers = sorted(value for value, letter in zip(values, launch.types, strict=True) if letter != "n")
        given = []
        for value, letter in zip(values, launch.types, strict=True):
            if letter == "n":
                given.append(np.int32(value))
                continue
            end = max((end for first, end in self.memory if first <= value < end), default=None)
            assert end, f"{launch.make.__name__}: a parameter points to no tensor"
            end = min([end, *(other for other in pointers if other > value)])
            size = np.dtype(NUMBERS[letter]).itemsize
            raw = (ctypes.c_uint8 * ((end - value) // size * size)).from_address(value)
            given.append(np.frombuffer(raw, NUMBERS[letter]))
        launch.make(*launch.options)[grid[:2], block[0], 0, shared](*given)


def prepare():
    """Put the simulator where the driver is; returns the device."""
    simulator = Simulator()
    device = stand_in(simulator, crossover=1e9)

    def get(launch):
        for handle, known in simulator.kernels.items():
            if known == launch:
                return handle
        handle = 0x1000 + len(simulator.kernels)
        simulator.kernels[handle], simulator.names[handle] = launch, str(handle)
        simulator.types[str(handle)] = launch.types
        return handle

    device.kernels.get = get
    devices.get = lambda index: device
    new_empty, data_ptr = torch.Tensor.new_empty, torch.Tensor.data_ptr

    def poisoned(tensor, *size, **options):
        made = new_empty(tensor, *size, **options)
        made.view(torch.uint8).fill_(255)
        return made

    def known(tensor):
        first = data_ptr(tensor)
        simulator.hold(tensor, first)
        return first

    torch.Tensor.new_empty, torch.Tensor.data_ptr = poisoned, known
    check.torch.device = lambda *_: torch.empty(0).device
    return device


def product_of(kind):
    """(product of a layer that was not used before, what it should be): float16 takes panels."""
    packed = packed_case(4, rows=70, cols=130, group_size=64, block_rows=40, levels=(2, 4), bias=True)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 130)).astype(kind))
    expected = x.double() @ packed.dequantize().double().T + packed.bias.double()
    first = product.without_gradient(x, packed.bias, packed, None)
    assert torch.equal(first, product.without_gradient(x, packed.bias, packed, None))
    keys = [key for key in packed.derived() if key[0] == "cuda"]
    assert keys == [("cuda", 0, None, "lut" if kind == np.float32 else "mma")]
    return first, expected


def relative_error(products):
    found, expected = products
    return float((found.double() - expected).norm() / expected.norm())


def layer_errors():
    """A layer and the operator on a case with a bias of half precision: relative errors."""
    packed = packed_case(3, rows=40, cols=200, group_size=64, block_rows=24, levels=(2, 3), bias=True)
    packed.bias = packed.bias.half()
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 1, 200))).half()
    expected = x.double() @ packed.dequantize().double().T + packed.bias.double()
    made, errors = {}, {}
    for mode in weight.LAYOUTS:
        made[mode] = weight.make_weight(packed, mode, torch.device("cpu"))
        layer = SFMPLinear(packed)
        layer.mode = mode
        layer._cache["ready"] = layer.backend, mode, made[mode], mode, *packed.source()
        found = {f"{mode} layer": layer(x), f"{mode} operator": made[mode].dispatch(x, layer.bias),
                 f"{mode} vmap": torch.vmap(lambda row, m=mode: made[m].dispatch(row, packed.bias))(x)}
        errors.update({name: relative_error((y, expected)) for name, y in found.items()})
    return errors


if __name__ == "__main__":
    sys.setswitchinterval(SWITCH)
    torch.set_num_threads(1)
    device = prepare()
    on_cpu = torch.library.Library("sfmp", "IMPL", "CPU")
    on_cpu.impl("cuda_linear", product._cuda_linear)
    errors = layer_errors()
    for mode in weight.LAYOUTS:
        errors.update({f"{mode} check, {name}": error for name, error in check.relative_errors(0, mode).items()})
    panels.WORKSPACE_BYTES = 1 << 15  # several panels
    device.settings.__dict__["crossover"] = 2
    errors["panels"] = relative_error(product_of(np.float16))
    errors["float32"] = relative_error(product_of(np.float32))
    errors["waits"] = device.counts["finish"]
    print(json.dumps(errors))
