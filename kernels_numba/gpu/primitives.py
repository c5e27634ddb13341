"""The instructions kernels use: PTX on a device, Python twins in Numba's CUDA simulator.

Importing this module loads Numba; NUMBA_ENABLE_CUDASIM decides, as it does for Numba, when Numba is first imported.
"""

from __future__ import annotations

import numpy as np

if not hasattr(np, "row_stack"):  # NumPy 2.5 removed it; numba-cuda 0.30.4 registers an overload of it all the same
    np.row_stack = np.vstack

from numba.core import config

if config.ENABLE_CUDASIM:
    from kernels_numba.gpu.twins import *  # noqa: F403
else:
    from kernels_numba.gpu.ptx import *  # noqa: F403
