"""Python twins of `ptx_shared` for Numba's CUDA simulator; see `twins`.

Copies are made when a thread waits for them and not before, so that a kernel which does not wait reads something else.
"""

import threading

import numpy as np

from kernels_numba.gpu.twins import _shared, _together, _view


def load_shared_line(address):
    return tuple(_line(address, 16, 4))


def store_shared_pair(address, low, high):
    _line(address, 8, 2)[:] = low, high


def store_shared(address, value):
    _shared(address, 1, np.float32)[:] = value


def copy_chunks(address, pointer, offset, count):
    for chunk in range(min(int(count), 4)):
        _groups()[-1].append((_line(address + 512 * chunk, 16, 4), _view(pointer, offset + 512 * chunk, 4, np.uint32)))


def copy_word(address, pointer, offset, count):
    if count > 0:
        _groups()[-1].append((_shared(address, 1, np.uint32), _view(pointer, offset, 1, np.uint32)))


def copy_commit():
    _groups().append([])


def copy_wait_1():
    _wait(1)


def copy_wait_2():
    _wait(2)


def copy_wait_3():
    _wait(3)


def sync_warp():
    _together(None, tuple)


def _line(address, size, count):
    if int(address) % size:
        raise IndexError(f"shared address {address}: expected a multiple of {size}")
    return _shared(address, count, np.uint32)


def _groups():
    """Groups of copies of this thread that did not arrive, the last one open."""
    return threading.current_thread().__dict__.setdefault("sfmp_copies", [[]])


def _wait(left):
    groups = _groups()
    while len(groups) - 1 > left:
        for target, source in groups.pop(0):
            target[:] = source
