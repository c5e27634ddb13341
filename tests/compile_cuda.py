"""Compiles CUDA kernels without a device: ``python compile_cuda.py MAJOR MINOR REQUESTS`` prints a JSON list of PTX.

A process per capability, so that no kernel depends on what was compiled before it.
"""

import json
import sys

from cases import packed_case

from kernels_numba.gpu import compile as compiler
from kernels_numba.gpu import dequantize_run, lut_layout, lut_run, mma_layout, mma_run


def plan(name, kind, levels, group_size, tokens=1, **options):
    """A plan of a small matrix with blocks of all levels."""
    packed = packed_case(0, rows=32 * len(levels), cols=8 * group_size, block_rows=32, group_size=group_size,
                         levels=levels)
    if name == "lut":
        return lut_run.plan(lut_layout.make_layout(packed), tokens, kind, **options)
    layout = mma_layout.make_layout(packed)
    assert layout.widths == tuple(levels)
    return mma_run.plan(layout, tokens, kind, **options) if name == "mma" else dequantize_run.plan(layout, kind)


if __name__ == "__main__":
    capability = int(sys.argv[1]), int(sys.argv[2])
    found = []
    for asked in json.loads(sys.argv[3]):
        launch = asked.pop("launch", -1)
        found.append(compiler.make_ptx(plan(**asked).launches[launch], capability))
    print(json.dumps(found))
