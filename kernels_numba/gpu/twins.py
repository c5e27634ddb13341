"""Python twins of `ptx` for Numba's CUDA simulator, where every CUDA thread is a Python thread.

Instructions of a warp wait for its 32 threads. A shared address is a handle: the number of the array above 2²⁰, the
byte within it below.
"""

from __future__ import annotations

import threading

import numpy as np

_WAIT = 300  # seconds; a thread that waits longer for its warp shows a divergent barrier
_HANDLE = 20
_lock = threading.Lock()


class _Warp:
    def __init__(self):
        self.barrier, self.values, self.found = threading.Barrier(32), [None] * 32, None


def _together(value, function):
    """(function of the values of all lanes, number of the lane of this thread); one thread of the warp calls it."""
    thread = threading.current_thread()
    number, lane = divmod(thread.thread_id, 32)
    with _lock:
        warp = thread._manager.__dict__.setdefault("sfmp_warps", {}).setdefault(number, _Warp())
    warp.values[lane] = value
    if warp.barrier.wait(_WAIT) == 0:
        warp.found = function(warp.values)
    warp.barrier.wait(_WAIT)
    return warp.found, lane


def _view(pointer, offset, count, dtype):
    data = np.asarray(getattr(pointer, "_ary", pointer)).reshape(-1).view(np.uint8)
    size = count * np.dtype(dtype).itemsize
    if not 0 <= offset <= len(data) - size or offset % size:
        raise IndexError(f"offset {offset}: expected a multiple of {size} within {len(data)} bytes")
    return data[int(offset) :][:size].view(dtype)


def load_line(pointer, offset):
    return tuple(_view(pointer, offset, 4, np.uint32))


load_line_kept = load_line


def load_word(pointer, offset):
    return _view(pointer, offset, 1, np.uint32)[0]


def store_line(pointer, offset, a, b, c, d):
    _view(pointer, offset, 4, np.uint32)[:] = a, b, c, d


def shared_address(array):
    data = np.asarray(getattr(array, "_ary", array)).reshape(-1)
    manager = threading.current_thread()._manager
    with _lock:
        arrays = manager.__dict__.setdefault("sfmp_shared", [])
        for number, known in enumerate(arrays):
            if known.ctypes.data == data.ctypes.data:
                return np.uint32(number << _HANDLE)
        arrays.append(data)
        return np.uint32(len(arrays) - 1 << _HANDLE)


def _shared(address, count, dtype):
    number, offset = divmod(int(address), 1 << _HANDLE)
    return _view(threading.current_thread()._manager.sfmp_shared[number], offset, count, dtype)


def load_shared(address):
    return _shared(address, 1, np.float32)[0]


def load_entry_0(address, word):
    return _entry(address, word, 0)


def load_entry_1(address, word):
    return _entry(address, word, 1)


def load_entry_2(address, word):
    return _entry(address, word, 2)


def load_entry_3(address, word):
    return _entry(address, word, 3)


def _entry(address, word, number):
    return load_shared(int(address) + 128 * (int(word) >> 8 * number & 255))


def shuffle_xor(value, mask):
    values, lane = _together(np.float32(value), tuple)
    return values[lane ^ mask]


def half_low(word):
    return np.float32(np.uint16(int(word) & 0xFFFF).view(np.float16))


def half_high(word):
    return np.float32(np.uint16(int(word) >> 16).view(np.float16))


def half_bits(value):
    with np.errstate(over="ignore"):
        return np.float16(value).view(np.uint16)


def bfloat_bits(value):
    word = int(np.float32(value).view(np.uint32))
    if np.isnan(value):
        return np.uint16(0x7FFF)
    return np.uint16(word + 0x7FFF + (word >> 16 & 1) >> 16)


def bfloat_value(bits):
    return np.uint32(int(bits) << 16).view(np.float32)


def multiply_halves(left, right):
    pairs = [np.array([word], np.uint32).view(np.float16) for word in (left, right)]
    return (pairs[0] * pairs[1]).view(np.uint32)[0]


def multiply_tiles(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    products, lane = _together((a0, a1, a2, a3, b0, b1), _tile_product)
    group, place = lane // 4, lane % 4 * 2
    rows = products[group, place : place + 2], products[group + 8, place : place + 2]
    return tuple(np.float32(c + product) for c, product in zip((c0, c1, c2, c3), np.concatenate(rows), strict=True))


def _tile_product(registers):
    """A·B of the registers of 32 lanes, float64 [16, 8]."""
    halves = np.array(registers, np.uint32).view(np.float16).reshape(8, 4, 6, 2).astype(np.float64)  # [g, t, register]
    a = halves[:, :, [[0, 2], [1, 3]]]  # [g, t, upper half of the rows, upper half of the columns, 2]
    left = a.transpose(2, 0, 3, 1, 4).reshape(16, 16)
    right = halves[:, :, 4:].transpose(2, 1, 3, 0).reshape(16, 8)
    return left @ right


def float_bits(value):
    return np.float32(value).view(np.uint32)


def float_value(bits):
    return np.uint32(bits).view(np.float32)
