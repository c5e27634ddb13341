"""Compiles CUDA kernels without a device: ``python compile_cuda.py MAJOR MINOR REQUESTS`` prints a JSON list of PTX.

A process per capability, because Numba keeps what it compiled of device functions for the first it compiled for. Numba
asks the current device for that capability even when it is given; here a stand-in answers.
"""

import json
import sys
from types import SimpleNamespace

from kernels_numba.gpu import lut, mma

from numba import cuda, types  # isort: skip
from numba.cuda import dispatcher  # isort: skip

SIZES = (types.int32,) * 3


def request(name, kind, options):
    """(kernel, signature); arguments are arrays as Numba's launches pass them, or pointers as the driver takes them."""
    pass_as = (lambda number: types.Array(number, 1, "C")) if options.pop("arrays", False) else types.CPointer
    words, halves, floats, ints = map(pass_as, (types.uint32, types.uint16, types.float32, types.int32))
    x = floats if kind == "float32" else halves
    if name == "lut":
        return lut.make_kernel(kind=kind, **options), types.void(words, words, *[ints] * 7, x, floats, *SIZES)
    if name == "mma":
        options["widths"] = tuple(options["widths"])
        return mma.make_kernel(kind=kind, **options), types.void(
            words, words, *[ints] * 8, halves, floats, floats, floats, x, *SIZES)
    if name == "arrange":
        return mma.make_arrange(kind, **options), types.void(x, ints, halves, floats, floats, *SIZES[:2])
    return lut.make_sum(kind), types.void(floats, ints, floats, x, *SIZES, types.int32)


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
