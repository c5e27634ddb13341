"""Python twins of `ptx_shared` for Numba's CUDA simulator; see `twins`."""

import numpy as np

from kernels_numba.gpu.twins import _shared


def load_shared_line(address):
    if int(address) % 16:
        raise IndexError(f"shared address {address}: expected a multiple of 16")
    return tuple(_shared(address, 4, np.uint32))


def store_shared_pair(address, low, high):
    if int(address) % 8:
        raise IndexError(f"shared address {address}: expected a multiple of 8")
    _shared(address, 2, np.uint32)[:] = low, high


def store_shared(address, value):
    _shared(address, 1, np.float32)[:] = value
