"""How many threads a product uses, and Numba's threading layer.

The count is torch's (``torch.set_num_threads``), so one setting serves the whole program, at most Numba's pool
(NUMBA_NUM_THREADS), and one in a forked child, where OpenMP must not be entered again.

Source: CPU.md section 6: a parallel region costs 1.4 µs with the OpenMP layer and 14–23 µs with Numba's own workqueue.
"""

from __future__ import annotations

import functools
import os

_owner = os.getpid()
_forked = False


def _mark_forked():
    global _forked
    _forked = True


@functools.cache
def layer() -> str:
    """Choose OpenMP unless the user chose a layer or libgomp is missing; return what Numba will be asked for."""
    from numba import config

    if config.THREADING_LAYER == "default":
        try:
            from numba.np.ufunc import omppool  # noqa: F401 - loads libgomp
        except ImportError:
            return "default (no OpenMP runtime found)"
        config.THREADING_LAYER = "omp"
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_mark_forked)
    return config.THREADING_LAYER


def count() -> int:
    """Threads of the next product."""
    import torch
    from numba import config

    layer()
    return 1 if _forked else min(torch.get_num_threads(), config.NUMBA_NUM_THREADS)
