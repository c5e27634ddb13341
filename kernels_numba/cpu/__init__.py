"""LUT-GEMM on the CPU, in Numba: bit-plane tiles, tables of activations in vector registers.

Files, from the bottom: `records` (sizes), `targets` (what this machine can do), `simd`, `halves`, `x86`, `neon` and
`native` (instructions by name), `tables` (activations → tables), `lut`, `lut_lanes` and `signs` (tiles × tables, by
what look-ups there are), `block` (one of them for Numba), `arena` and `layout` (PackedMatrix → tiles), `drive` and
`threads` (threads), `panel` (many tokens), `launch` and `tune` (what was measured), `product` and
`gradient` (torch operator), `plain` (when it can be left out).
Importing this package loads neither torch nor numba.
"""

from __future__ import annotations


def available() -> str:
    """Return "yes: target, modes, threads" or "no: why" for `kernels_numba.available`."""
    from importlib.util import find_spec

    missing = [name for name in ("torch", "numba") if find_spec(name) is None]
    if missing:
        return f"no: {' and '.join(missing)} cannot be imported"
    from kernels_numba.cpu import targets

    target, why = targets.detect()
    return f"no: {why}" if target is None else f"yes: {why}; modes {', '.join(targets.MODES[target])}"
