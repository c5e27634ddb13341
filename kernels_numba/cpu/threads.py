"""How many threads a product uses, and Numba's threading layer.

The count is torch's (``torch.set_num_threads``), so one setting serves the whole program, at most Numba's pool
(NUMBA_NUM_THREADS), and one in a forked child, where OpenMP must not be entered again.

Source: CPU.md section 6: a parallel region costs 1.4 µs with the OpenMP layer and 14–23 µs with Numba's own workqueue.
"""

from __future__ import annotations

import functools
import os

import torch
from numba import config

MAX_THREADS = 480  # whose counters a job has room for
_forked = False


def count() -> int:
    """Threads of the next product."""
    return 1 if _forked else min(torch.get_num_threads(), config.NUMBA_NUM_THREADS, MAX_THREADS)


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
    global _forked
    _forked = True
