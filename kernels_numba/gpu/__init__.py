"""LUT-GEMM on CUDA, in Numba: what there is, what was tested where, and what is missing.

The folder is not called ``cuda``: numba-cuda's import hook takes every module whose name contains ``numba.cuda``, so
``import kernels_numba.cuda`` recurses without end once that package is installed (seen with numba-cuda 0.30.4).

Files, from the bottom: `records` (sizes), `segments` (tiles of equal bits), `lut_layout` and `mma_layout`
(PackedMatrix → arrays), `ptx` (instructions), `twins` (the same in Python, for the simulator), `primitives` (one of
the two), `kinds` (half-precision numbers), `lut_tables` and `lut` (look-up kernel), `mma_codes` and `mma` (tensor-core
kernel), `lut_run` and `mma_run` (one product: grids and launches), `product` (torch tensors).

State. No kernel here has run on a GPU yet, and there is no measured time.

* Layouts: read back bit by bit by slow oracles; any shape, group sizes that are multiples of 32, 1–8 bits.
* ``lut``: table widths 2, 4, 6 (6 + 2) and 8; 1–8 tokens a launch where the tables fit 48 KB (8 for widths 2 and 4, 4
  for 6, 1 for 8), more in several launches; float16, bfloat16, float32. Ran in Numba's simulator on small matrices of
  mixed bits with ragged edges and permutations, within the rounding of the result. Both permutations are inside the two
  kernels of a product; sums are float32 and in a fixed order.
* ``mma``: 1–32 tokens a launch, more in several; any mix of 1–8 bits; float16 and bfloat16. Ran in the simulator
  likewise. The input permutation is a small kernel before it, not part of it.
* Compiled without a device for compute capabilities 8.0, 8.6, 8.9, 9.0 and 12.0: 128-bit loads, no local memory, no
  spills, no atomics (tests/test_cuda_ptx.py; skips where libnvvm or libnvrtc is missing).
* `product.matmul`, the launch from torch tensors, is written and has never run. tests/test_cuda_device.py runs the grid
  of the simulator and larger matrices where there is a GPU.

Missing: launches through the driver with prepared arguments, a torch operator, tests inside CUDA graphs, a cache of
compiled code, dequantize-and-multiply for long inputs, a launch table, prefetching across units, the fused gather of
``mma``. Activations that are not finite give NaN where the exact product may be infinite. Until the kernels have run on
a device, `kernels_numba.matmul` does not offer them.

Importing this package loads neither torch nor numba.
"""

from __future__ import annotations


def available() -> str:
    """Return "yes: devices, modes" or "no: why" for `kernels_numba.available`."""
    from kernels_numba.gpu import devices

    why = devices.why_not()
    return f"no: {why}" if why else f"yes: {devices.offered()}; modes mma, lut"
