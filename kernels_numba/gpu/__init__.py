"""LUT-GEMM on CUDA, in Numba: what there is, what was tested where, and what is missing.

The folder is not called ``cuda``: numba-cuda's import hook takes every module whose name contains ``numba.cuda``, so
``import kernels_numba.cuda`` recurses without end once that package is installed (seen with numba-cuda 0.30.4).

Files, from the bottom: `records` (sizes), `segments` (tiles of equal bits), `lut_layout` and `mma_layout`
(PackedMatrix → arrays), `ptx` and `ptx_shared` (instructions), `twins` and `twins_shared` (the same in Python, for the
simulator), `primitives` (one of the two), `kinds` (half-precision numbers), `lut_tables` and `lut` (look-up kernel),
`mma_codes`, `mma_unit`, `mma_gather` and `mma` (tensor-core kernel), `dequantize` (the weight itself), `launches` (what
a product launches), `lut_run`, `mma_run` and `dequantize_run` (plans of products), `compile` and `cubins` (kernels →
machine code, kept on disk), `driver` and `prepared` (launches with arguments that lie ready), `launch` and `tune`
(launch table), `devices`, `weight` (a matrix on a device), `panels` (many tokens), `check` (a first product with known
result), `product` (torch operator), `host_time`.

State. No kernel here has run on a GPU yet, and there is no measured time of one.

* Layouts: read back bit by bit by slow oracles; any shape, group sizes that are multiples of 32, 1–8 bits.
* ``lut``: table widths 2, 4, 6 (6 + 2) and 8; 1–8 tokens a launch where the tables fit 48 KB (8 for widths 2 and 4, 4
  for 6, 1 for 8), more in several launches; float16, bfloat16, float32. Both permutations are inside the two kernels of
  a product; sums are float32 and in a fixed order.
* ``mma``: 1–32 tokens a launch, more in several; any mix of 1–8 bits; float16 and bfloat16. From the crossover of
  ``launch.json`` on, an estimate until `tune` has run on a device, the weight is dequantized and torch multiplies.
* Both ran in Numba's simulator on small matrices of mixed bits with ragged edges and permutations, within the rounding
  of the result: by plans, and through the whole launch path behind a stand-in for the driver.
* Compiled without a device for compute capabilities 8.0, 8.6, 8.9, 9.0 and 12.0: 128-bit loads, no local memory, no
  spills, no atomics (tests/test_cuda_ptx.py; skips where libnvvm or libnvrtc is missing).
* The launch path is tested byte for byte with a stand-in for the driver. Its host time without the driver is what
  ``python -m kernels_numba.gpu.host_time`` prints. tests/test_cuda_device*.py run all of it where there is a GPU:
  numbers, graphs, streams, threads, compiled models, compute-sanitizer.
* `kernels_numba.matmul` offers the backend where there is a device of capability 8.0 or newer, after `check` has
  compared a small product with the reference there.

Missing: programmatic dependent launches. Activations that are not finite give NaN where the exact product may be
infinite.

Importing this package loads neither torch nor numba.
"""

from __future__ import annotations


def available() -> str:
    """Return "yes: devices, modes, checks that failed so far" or "no: why" for `kernels_numba.available`."""
    from kernels_numba.gpu import devices

    why = devices.why_not()
    if why:
        return f"no: {why}"
    wrong = "".join(f"; but mode {mode} failed its check on device {index}" for index, mode in sorted(devices.wrong))
    return f"yes: {devices.offered()}; modes mma, lut{wrong}"
