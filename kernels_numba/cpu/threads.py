"""How many threads a product uses, and Numba's threading layer.

The count is torch's (``torch.set_num_threads``), so one setting serves the whole program, at most Numba's pool
(NUMBA_NUM_THREADS), and one in a forked child, where OpenMP must not be entered again: there the first product that
torch computes (panels: many tokens, or activations that are not finite) sets torch's count to one, or it would hang.

Numba's workqueue aborts the process when two Python threads enter it: products then wait for each other.

Source: CPU.md section 6: a parallel region costs 1.4 µs with the OpenMP layer and 14–23 µs with Numba's own workqueue.
"""

from __future__ import annotations

import functools
import os
import threading

import torch
from numba import config

MAX_THREADS = 480  # whose counters a job has room for
SAFE_LAYERS = ("omp", "tbb", "safe", "threadsafe")  # any number of Python threads may enter them
_POOL = min(config.NUMBA_NUM_THREADS, MAX_THREADS)
_forked = False
_lock = threading.Lock()


def count() -> int:
    """Threads of the next product."""
    threads = torch.get_num_threads()
    return 1 if _forked else threads if threads <= _POOL else _POOL


def guarded(function):
    """The function, or one that waits for other Python threads where Numba's layer allows only one."""
    if choose_layer() in SAFE_LAYERS:
        return function

    def alone(*arguments):
        with _lock:
            return function(*arguments)

    return alone


def prepare_torch():
    """Call before torch multiplies: in a forked child OpenMP would wait for threads that only the parent has."""
    if _forked and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


@functools.cache
def choose_layer() -> str:
    """Ask Numba for OpenMP unless the user chose a layer or no OpenMP runtime is found; return what is asked for."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_mark_forked)
    if config.THREADING_LAYER == "default":
        try:
            from numba.np.ufunc import omppool  # noqa: F401 - loads the runtime
        except ImportError:
            return "default"
        config.THREADING_LAYER = "omp"
    return config.THREADING_LAYER


def _mark_forked():
    global _forked, _lock
    _forked, _lock = True, threading.Lock()  # another thread of the parent may have held the lock
