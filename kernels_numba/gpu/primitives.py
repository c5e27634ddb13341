"""The instructions kernels use: PTX on a device, Python twins in Numba's CUDA simulator.

Importing this module loads Numba; NUMBA_ENABLE_CUDASIM decides, as it does for Numba, when Numba is first imported.
"""

from __future__ import annotations

import numpy as np

if not hasattr(np, "row_stack"):  # NumPy 2.5 removed it; numba-cuda 0.30.4 registers an overload of it all the same
    np.row_stack = np.vstack

from numba import cuda
from numba.core import config

if config.ENABLE_CUDASIM:
    from kernels_numba.gpu.twins import *  # noqa: F403
    from kernels_numba.gpu.twins_shared import *  # noqa: F403

    def device(function):
        """A function that kernels call, as it is."""
        return function

    def kernel(threads, blocks):
        """Decorator of a kernel; the simulator has no registers to bound."""
        return cuda.jit

else:
    from kernels_numba.gpu.ptx import *  # noqa: F403
    from kernels_numba.gpu.ptx_shared import *  # noqa: F403

    def device(function):
        """A function that kernels call, compiled into each of them."""
        return cuda.jit(device=True, forceinline=True)(function)

    def kernel(threads, blocks):
        """Decorator of a kernel that takes as many registers as let so many blocks of a processor run together."""
        return cuda.jit(launch_bounds=(threads, blocks))
