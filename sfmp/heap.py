"""Memory that was freed goes back to the system.

Between small blocks that stay, glibc keeps the pages of large ones that are gone; a large matrix that does not fit in
such a hole takes new pages. A peak then grows by chance with the number of matrices, though no more is in use.
"""

from __future__ import annotations

import ctypes
import functools
import sys


@functools.cache
def _trim():
    """The function of glibc that returns freed pages to the system, None elsewhere."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def give_back() -> None:
    """Return the free pages of the heap: before work that takes much at once, or after what is large is gone."""
    if _trim() is not None:
        _trim()(0)
