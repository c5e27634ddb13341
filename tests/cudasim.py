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

from kernels_numba.gpu import dequantize_run, launches, lut_layout, lut_run, mma_layout, mma_run

OPTIONS = ("width", "shares", "warps", "gather", "stages", "panel")  # of runs; others are of matrices
SWITCH = 5e-5  # seconds; threads of the simulator wait for each other more than they work


def run_lut(packed, x, y, width, shares, warps):
    """Write the product of the look-up kernel into y."""
    layout = lut_layout.make_layout(packed)
    plan = lut_run.plan(layout, len(x), str(x.dtype).removeprefix("torch."), width=width, shares=shares, warps=warps)
    launches.run(plan, {**lut_run.layout_arrays(layout), **filled(plan), **ends(packed, x, y)})


def run_mma(packed, x, y, **options):
    """Write the product of the tensor-core kernel into y."""
    layout = mma_layout.make_layout(packed)
    plan = mma_run.plan(layout, len(x), str(x.dtype).removeprefix("torch."), **options)
    launches.run(plan, {**mma_run.layout_arrays(layout), **filled(plan), **ends(packed, x, y)})


def run_dequantize(packed, x, y, panel):
    """Multiply with weights that the kernel wrote panel by panel, in float64."""
    layout = mma_layout.make_layout(packed)
    count, places = len(layout.strip_chunk), dequantize_run.columns(layout)
    taken = torch.where(torch.from_numpy(places) >= 0, x.double()[:, np.maximum(places, 0)], 0)
    for first in range(0, count, panel):
        strips = min(panel, count - first)
        weight = torch.full(dequantize_run.workspace_shape(layout, strips), torch.nan, dtype=x.dtype)
        arrays = {**mma_run.layout_arrays(layout), "workspace": plain(weight).view(np.uint32)}
        launches.run(dequantize_run.plan(layout, str(x.dtype).removeprefix("torch."), first, strips), arrays)
        found, rows = (taken @ weight.double().T).to(y.dtype), dequantize_run.rows(layout, first, strips)
        if rows is None:
            y[:] = found
        else:
            assert not weight[rows < 0].any()
            y[:, rows[rows >= 0]] = found[:, rows >= 0]


def filled(plan):
    """Scratch arrays of a plan, filled with NaN."""
    kinds = {"f": (np.float32, np.nan), "h": (np.uint16, 0x7FFF), "u": (np.uint32, 0x7FFF7FFF)}
    return {name: np.full(size, kinds[letter][1], kinds[letter][0]) for name, (size, letter) in plan.scratch.items()}


def ends(packed, x, y):
    """x, y and bias as launches name them."""
    return {"x": plain(x), "y": plain(y), "bias": bias_of(packed)}


def plain(tensor):
    """One-dimensional array on the memory of a tensor, half-precision numbers as uint16."""
    return (tensor if tensor.dtype == torch.float32 else tensor.view(torch.uint16)).numpy().reshape(-1)


def bias_of(packed):
    return np.zeros(packed.shape[0], np.float32) if packed.bias is None else packed.bias.numpy()


def error(run, tokens, kind, seed=0, magnitude=1.0, spoiled=None, **options):
    """‖y − reference‖ / ‖reference‖ of a random matrix, against float64.

    One activation of the last token may be `spoiled`, infinite or no number: then its results have to be no finite
    numbers either, and the error is that of the other tokens.
    """
    shape = {key: options.pop(key) for key in tuple(options) if key not in OPTIONS}
    packed = packed_case(seed, **shape)
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(tokens, packed.shape[1])) * magnitude)
    x = x.to(getattr(torch, kind))
    if spoiled:
        x[-1, packed.shape[1] // 2] = float(spoiled)
    y = torch.full((tokens, packed.shape[0]), torch.nan, dtype=x.dtype)
    run(packed, x, y, **options)
    if spoiled:
        if y[-1].isfinite().any():
            return None
        x, y = x[:-1], y[:-1]
    reference = x.double() @ packed.dequantize().double().T
    if packed.bias is not None:
        reference += packed.bias.double()
    return ((y.double() - reference).norm() / reference.norm()).item()


RUNS = {"lut": run_lut, "mma": run_mma, "dequantize": run_dequantize}

if __name__ == "__main__":
    sys.setswitchinterval(SWITCH)
    torch.set_num_threads(1)
    for case in json.loads(sys.argv[1]):
        print(json.dumps(error(RUNS[case.pop("kernel")], **case)), flush=True)
