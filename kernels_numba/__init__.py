"""Matrix products with packed weights: one entry point, explicit backends, never a silent fallback.

    y = matmul(x, packed)                      # the best backend that can run here
    available()                                # backend → "yes: …" or "no: why"

Importing this package loads neither torch nor numba.
"""

from __future__ import annotations

__all__ = ["available", "matmul"]

BACKENDS = ("cuda", "cpu", "reference")  # best first
MODES = {"reference": ("exact", "lut"), "cpu": ("lut16", "lut8", "exact"), "cuda": ("lut", "mma")}


def available() -> dict[str, str]:
    """Return backend → "yes: what it is" or "no: why it cannot run here".

    Examples
    --------
    >>> available()["reference"].startswith("yes")
    True
    """
    from kernels_numba import cpu, gpu

    reference = "yes: dequantize, then multiply with torch; any device"
    return {"cuda": gpu.available(), "cpu": cpu.available(), "reference": reference}


def matmul(x, packed, backend: str = "auto", mode: str | None = None):
    """Return x Wᵀ + bias, in natural order on both sides.

    Parameters
    ----------
    x : torch.Tensor or numpy.ndarray, floating [..., K]
        On the device of `packed`.
    packed : PackedMatrix or SFMPLinear
    backend : {"auto", "reference", "cpu", "cuda"}
        "auto" takes the first of cuda, cpu, reference that can run here, has the mode and suits the tensors: cpu is
        for float32, bfloat16 and float16 on the CPU, and not inside `sfmp.linear.keep_dequantized`, whose kept
        weights the reference multiplies without repacking.
    mode : str or None
        reference: "exact" (default) or "lut" (the NumPy oracle of `kernels_numba.reference`, slow);
        cpu: "lut16", "lut8", "exact"; cuda: "lut", "mma".

    Returns
    -------
    Same kind and dtype as x, [..., N].

    Raises
    ------
    SfmpError
        Unknown or unavailable backend or mode, wrong kind, shape, dtype or device of x, no packed matrix.
    """
    import numpy as np
    import torch

    from sfmp.checks import SfmpError
    from sfmp.packed import PackedMatrix

    requested, packed = (backend, mode), getattr(packed, "packed", packed)
    if not isinstance(packed, PackedMatrix):
        raise SfmpError(f"packed: expected a PackedMatrix or an SFMPLinear, found {type(packed).__name__}; "
                        "see sfmp.pack.pack")
    if not isinstance(x, np.ndarray | torch.Tensor):
        raise SfmpError(f"x: expected a tensor or an array, found {type(x).__name__}; convert it")
    if isinstance(x, np.ndarray):
        if x.dtype.kind != "f" or x.dtype.itemsize > 8:
            raise SfmpError(f"x: expected floating [..., {packed.shape[1]}] of at most 64 bits, found {x.dtype} "
                            f"{list(x.shape)}; convert it")
        if not x.dtype.isnative:
            native = x.astype(x.dtype.newbyteorder("="))
            return matmul(native, packed, backend, mode).astype(x.dtype)
    if backend == "auto":
        backend = next((name for name in BACKENDS if _suits(name, x, packed, mode)), "reference")
    if backend not in BACKENDS:
        raise SfmpError(f"backend: expected auto, {', '.join(BACKENDS)}, found {backend!r}; see available()")
    if mode is not None and mode not in MODES[backend]:
        raise SfmpError(f"mode: expected one of {', '.join(MODES[backend])} for backend {backend}, found "
                        f"{mode!r}; leave it None for the default")
    if not available()[backend].startswith("yes"):
        raise SfmpError(f"backend: expected one that can run here, found {backend} ({available()[backend]}); "
                        "use backend='auto'")
    if backend == "cpu":
        from kernels_numba.cpu import product

        y = product.matmul(x, packed, mode)
        if isinstance(x, torch.Tensor):
            packed.derived()["ready"] = *requested, product.weight(packed), product.choose_mode(mode), *packed.source()
        return y
    from kernels_numba import reference

    return reference.matmul(x, packed, mode or "exact")


def _suits(backend: str, x, packed, mode: str | None) -> bool:
    """Whether "auto" may take a backend."""
    if not available()[backend].startswith("yes") or (mode is not None and mode not in MODES[backend]):
        return False
    if backend != "cpu":
        return True
    kind = str(x.dtype).removeprefix("torch.")
    on_cpu = str(getattr(x, "device", "cpu")) == str(packed.device) == "cpu"
    return on_cpu and kind in ("float32", "bfloat16", "float16") and "keep" not in packed.cache
