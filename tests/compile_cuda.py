"""Compiles CUDA kernels without a device: ``python compile_cuda.py MAJOR MINOR REQUESTS`` prints a JSON list of PTX.

A process per capability, because Numba keeps what it compiled of device functions for the first it compiled for. Numba
asks the current device for that capability even when it is given; here a stand-in answers.
"""

import json
import sys
from types import SimpleNamespace

from cases import packed_case

from kernels_numba.gpu import dequantize_run, launches, lut, mma_layout, mma_run

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
    if name in ("mma", "dequantize"):
        launch = plan(name, kind, **options).launches[options.get("launch", -1)]
        return launch.make(*launch.options), launches.signature(launch.types)
    return lut.make_sum(kind), types.void(floats, ints, floats, x, *SIZES, types.int32)


def plan(name, kind, levels, group_size, tokens=1, launch=-1, **options):
    """A plan of a small matrix with blocks of all levels."""
    packed = packed_case(0, rows=32 * len(levels), cols=8 * group_size, block_rows=32, group_size=group_size,
                         levels=levels)
    layout = mma_layout.make_layout(packed)
    assert layout.widths == tuple(levels)
    return mma_run.plan(layout, tokens, kind, **options) if name == "mma" else dequantize_run.plan(layout, kind)


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
