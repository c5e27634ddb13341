"""Runs kernels in Numba's CUDA simulator: ``python cudasim.py CASES.json``, one JSON line of relative errors per case.

The simulator is chosen when Numba is first imported, so it has a process of its own. Outputs and scratch memory start
as NaN, so that an element which is not written is an error.
"""

import json
import os
import sys

os.environ["NUMBA_ENABLE_CUDASIM"] = "1"

import numpy as np
import torch
from cases import packed_case

from kernels_numba.gpu import lut_layout, lut_run, mma_layout, mma_run

SWITCH = 5e-5  # seconds; threads of the simulator wait for each other more than they work


def run_lut(packed, x, y, width, shares, warps):
    """Write the product of the look-up kernel into y."""
    layout = lut_layout.make_layout(packed)
    arrays = lut_run.layout_arrays(layout, width)
    scratch = np.full(lut_run.scratch_size(layout, width, shares), np.nan, np.float32)
    kind = str(x.dtype).removeprefix("torch.")
    lut_run.multiply(arrays, plain(x), plain(y), scratch, bias_of(packed), shape=(len(x), *packed.shape),
                     segment=layout.segment, kind=kind, width=width, panels=len(arrays["panels"]) // 4, shares=shares,
                     warps=warps)


def run_mma(packed, x, y, warps):
    """Write the product of the tensor-core kernel into y."""
    layout = mma_layout.make_layout(packed)
    arrays = mma_run.layout_arrays(layout)
    scratch = {name: np.full(size, fill, type_) for (name, (size, type_)), fill in
               zip(mma_run.scratch_sizes(layout, len(x)).items(), (0x7FFF, np.nan, np.nan), strict=True)}
    kind = str(x.dtype).removeprefix("torch.")
    mma_run.multiply(arrays, plain(x), plain(y), scratch, bias_of(packed), shape=(len(x), *packed.shape),
                     segment=layout.segment, widths=layout.widths, kind=kind, warps=warps)


def plain(tensor):
    """One-dimensional array on the memory of a tensor, half-precision numbers as uint16."""
    return (tensor if tensor.dtype == torch.float32 else tensor.view(torch.uint16)).numpy().reshape(-1)


def bias_of(packed):
    return np.zeros(packed.shape[0], np.float32) if packed.bias is None else packed.bias.numpy()


def error(run, tokens, kind, seed=0, **options):
    """‖y − reference‖ / ‖reference‖ of a random matrix, against float64."""
    shape = {key: options.pop(key) for key in tuple(options) if key not in ("width", "shares", "warps")}
    packed = packed_case(seed, **shape)
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(tokens, packed.shape[1]))).to(getattr(torch, kind))
    y = torch.full((tokens, packed.shape[0]), torch.nan, dtype=x.dtype)
    run(packed, x, y, **options)
    reference = x.double() @ packed.dequantize().double().T
    if packed.bias is not None:
        reference += packed.bias.double()
    return ((y.double() - reference).norm() / reference.norm()).item()


RUNS = {"lut": run_lut, "mma": run_mma}

if __name__ == "__main__":
    sys.setswitchinterval(SWITCH)
    torch.set_num_threads(1)
    for case in json.loads(sys.argv[1]):
        print(json.dumps(error(RUNS[case.pop("kernel")], **case)), flush=True)
