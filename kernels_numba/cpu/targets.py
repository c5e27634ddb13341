"""Which kernels this processor can run: feature detection, and an environment variable to force a lower target.

SFMP_CPU_TARGET = avx512_vbmi | avx512f | avx2 | neon | generic chooses a target; NUMBA_CPU_FEATURES, if set, limits
what Numba may emit and so limits the targets too. Set them before the first product: a layer that has multiplied keeps
its kernels. A forced target uses its own kernels; around them the compiler still uses what the processor has.

avx512_vbmi  AVX-512 with VBMI and VNNI: Ice Lake, Sapphire Rapids, Zen 4 and later
avx512f      AVX-512F with BW: Skylake-X, Cascade Lake
avx2         AVX2 with FMA and F16C: Haswell, Zen and later
neon         aarch64 with dot products; untested on hardware: its code is compiled everywhere, and run against that of
             the others where an emulator (qemu) is installed
generic      whatever LLVM compiles for: no look-ups, every bit is the sign of an activation (`signs`)
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

VARIABLE = "SFMP_CPU_TARGET"
NEEDS = {  # best first; names as LLVM spells them
    "avx512_vbmi": ("avx512f", "avx512bw", "avx512vbmi", "avx512vnni", "f16c"),
    "avx512f": ("avx512f", "avx512bw", "f16c"),
    "avx2": ("avx2", "fma", "f16c"),
    "neon": ("neon", "dotprod"),
    "generic": (),
}
_ALL = ("lut16", "lut8", "exact")  # the default mode first
MODES = {"avx512_vbmi": _ALL, "avx512f": _ALL, "avx2": _ALL, "neon": _ALL, "generic": ("exact",)}
_NOTES = {"neon": "neon (untested on hardware)"}
_ARCHITECTURES = {"x86_64": "x86", "amd64": "x86", "i386": "x86", "i686": "x86", "aarch64": "aarch64",
                  "arm64": "aarch64"}


@functools.cache
def features() -> frozenset[str]:
    """Processor features that Numba may use, as LLVM names them."""
    from llvmlite import binding
    from numba import config

    found = {name for name, present in binding.get_host_cpu_features().items() if present}
    if architecture() == "aarch64":
        found |= _arm_features()
    if config.CPU_FEATURES is not None:
        allowed = (part.strip() for part in config.CPU_FEATURES.split(","))
        found &= {part[1:] for part in allowed if part.startswith("+")}
    return frozenset(found)


def _arm_features() -> set[str]:
    """What LLVM may not report; kernels name the features they need themselves, so the compiler need not know."""
    if platform.system() == "Darwin":
        return {"neon", "dotprod"}  # since the first such processor
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return set()
    return {name for name, word in (("neon", "asimd"), ("dotprod", "asimddp")) if word in words}


def architecture() -> str:
    """"x86", "aarch64" or "other"."""
    return _ARCHITECTURES.get(platform.machine().lower(), "other")


@functools.cache
def basics() -> frozenset[str]:
    """Which of "half" (float16 ↔ float32) and "fma" this processor has instructions for, whatever the target."""
    if architecture() == "aarch64":
        return frozenset({"half", "fma"})
    needs = {"half": {"f16c"}, "fma": {"fma", "avx512f"}}
    return frozenset(name for name, any_of in needs.items() if architecture() == "x86" and any_of & features())


def vectors(target: str):
    """Return the class of vector operations of a target."""
    from kernels_numba.cpu import neon, simd, x86

    return {"avx512_vbmi": x86.Vbmi, "avx512f": x86.Avx512, "avx2": x86.Avx2, "neon": neon.Neon,
            "generic": simd.Simd}[target]


def detect() -> tuple[str | None, str]:
    """Return (target or None, why): the forced target if it can run here, else the best one that can."""
    return _detect(os.environ.get(VARIABLE), features())


@functools.cache
def _detect(forced: str | None, features: frozenset[str]) -> tuple[str | None, str]:
    if not forced:
        name = next(name for name in NEEDS if not _missing(name, features))
        return name, f"{_NOTES.get(name, name)}, found on this processor"
    if forced not in NEEDS:
        return None, f"{VARIABLE}={forced} is none of {', '.join(NEEDS)}"
    if _missing(forced, features):
        return None, f"{VARIABLE}={forced}, but this processor lacks {', '.join(_missing(forced, features))}"
    return forced, f"{_NOTES.get(forced, forced)}, forced by {VARIABLE}"


def _missing(name: str, features: frozenset[str]) -> list[str]:
    return [feature for feature in NEEDS[name] if feature not in features]
