"""Which kernels this processor can run: feature detection, and an environment variable to force a lower target.

SFMP_CPU_TARGET = avx512_vbmi | avx512f | avx2 | generic chooses a target; NUMBA_CPU_FEATURES, if set, limits what
Numba may emit and so limits the targets too.
"""

from __future__ import annotations

import functools
import os

VARIABLE = "SFMP_CPU_TARGET"
NEEDS = {  # best first; names as LLVM spells them
    "avx512_vbmi": ("avx512f", "avx512bw", "avx512vbmi", "avx512vnni", "f16c"),
    "avx512f": ("avx512f", "f16c"),
    "avx2": ("avx2", "fma", "f16c"),
    "generic": (),
}
MODES = {"avx512_vbmi": ("lut16", "lut8", "exact"), "avx512f": ("exact",)}  # the default mode first


@functools.cache
def features() -> frozenset[str]:
    """Processor features that Numba may use, as LLVM names them."""
    from llvmlite import binding
    from numba import config

    found = {name for name, present in binding.get_host_cpu_features().items() if present}
    if config.CPU_FEATURES is not None:
        allowed = (part.strip() for part in config.CPU_FEATURES.split(","))
        found &= {part[1:] for part in allowed if part.startswith("+")}
    return frozenset(found)


def detect() -> tuple[str | None, str]:
    """Return (target or None, why): the forced target if it can run here, else the best one that can."""
    forced = os.environ.get(VARIABLE)
    if forced:
        return _forced(forced)
    for name in MODES:
        if _missing(name) == []:
            return name, f"{name}, found on this processor"
    least = list(MODES)[-1]
    return None, f"this processor lacks {', '.join(_missing(least))}, which {least} needs"


def _forced(name: str) -> tuple[str | None, str]:
    if name not in NEEDS:
        return None, f"{VARIABLE}={name} is none of {', '.join(NEEDS)}"
    if _missing(name):
        return None, f"{VARIABLE}={name}, but this processor lacks {', '.join(_missing(name))}"
    if name not in MODES:
        return None, f"{VARIABLE}={name}, but this version has kernels for {', '.join(MODES)} only"
    return name, f"{name}, forced by {VARIABLE}"


def _missing(name: str) -> list[str]:
    return [feature for feature in NEEDS[name] if feature not in features()]
