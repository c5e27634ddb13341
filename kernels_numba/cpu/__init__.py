"""LUT-GEMM on the CPU, in Numba: bit-plane tiles, tables of activations in vector registers.

Files, from the bottom: `simd` and `native` (instructions by name), `records` (sizes), `tables` (activations → tables),
`lut` (tiles × tables), `arena` and `layout` (PackedMatrix → tiles), `drive` (threads), `product` (torch operator),
`targets` and `threads` (what this machine can do). Importing this package loads neither torch nor numba.
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
