"""Compiles CUDA kernels without a device: ``python compile_cuda.py MAJOR MINOR REQUESTS`` prints a JSON list of PTX.

A process per capability, because Numba keeps what it compiled of device functions for the first it compiled for. Numba
asks the current device for that capability even when it is given; here a stand-in answers.
"""

import json
import sys
from types import SimpleNamespace

from kernels_numba.gpu import lut

from numba import cuda, types  # isort: skip
from numba.cuda import dispatcher  # isort: skip

U, F, INT = (types.CPointer(kind) for kind in (types.uint32, types.float32, types.int32))
LUT = (U, U, INT, INT, INT, INT, INT, INT, INT)  # lines to panels
SIZES = (types.int32,) * 3


def request(name, kind, options):
    """(kernel, signature)"""
    x = F if kind == "float32" else types.CPointer(types.uint16)
    if name == "lut":
        return lut.make_kernel(kind=kind, **options), types.void(*LUT, x, F, *SIZES)
    return lut.make_sum(kind), types.void(F, INT, F, x, *SIZES, types.int32)


if __name__ == "__main__":
    capability = int(sys.argv[1]), int(sys.argv[2])
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
    found = []
    for asked in json.loads(sys.argv[3]):
        kernel, signature = request(asked.pop("name"), asked.pop("kind"), asked)
        bounds = kernel.targetoptions.get("launch_bounds")
        found.append(cuda.compile(kernel.py_func, signature, device=False, abi="numba", cc=capability,
                                  launch_bounds=bounds)[0])
    print(json.dumps(found))
