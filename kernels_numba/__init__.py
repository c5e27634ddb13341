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
    return {backend: _available(backend) for backend in BACKENDS}


def _available(backend: str) -> str:
    from kernels_numba import cpu, gpu

    if backend == "reference":
        return "yes: dequantize, then multiply with torch; any device"
    return {"cuda": gpu, "cpu": cpu}[backend].available()


def matmul(x, packed, backend: str = "auto", mode: str | None = None):
    """Return x Wᵀ + bias, in natural order on both sides.

    Parameters
    ----------
    x : torch.Tensor or numpy.ndarray, floating [..., K]
        On the device of `packed`.
    packed : PackedMatrix or SFMPLinear
    backend : {"auto", "reference", "cpu", "cuda"}
        "auto" takes the first of cuda, cpu, reference that can run here, has the mode and suits the tensors: cuda is
        for x and weight on one CUDA device, cpu for both on the CPU, in float32, bfloat16 and float16, and neither
        inside `sfmp.linear.keep_dequantized`, whose kept weights the reference multiplies without repacking. A device
        whose first products are wrong (`kernels_numba.gpu.check`) gets the reference, and one warning.
    mode : str or None
        reference: "exact" (default) or "lut" (the NumPy oracle of `kernels_numba.reference`, slow);
        cpu: "lut16", "lut8", "exact"; cuda: "mma" (default of float16 and bfloat16) or "lut" (of float32).

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
    can = _available(backend)
    if not can.startswith("yes"):
        raise SfmpError(f"backend: expected one that can run here, found {backend} ({can}); use backend='auto'")
    if backend == "cuda":
        return _on_device(x, packed, mode, requested)
    if backend == "cpu":
        from kernels_numba.cpu import product

        y = product.matmul(x, packed, mode)
        if isinstance(x, torch.Tensor):
            packed.derived()["ready"] = *requested, product.weight(packed), product.choose_mode(mode), *packed.source()
        return y
    from kernels_numba import reference

    return reference.matmul(x, packed, mode or "exact")


def _on_device(x, packed, mode, requested):
    """The product on a CUDA device, which prepares what later ones of a layer need."""
    import torch

    from kernels_numba.gpu import product
    from sfmp.checks import SfmpError

    if not isinstance(x, torch.Tensor):
        raise SfmpError("x: expected a tensor on a CUDA device for backend cuda, found an array; use torch.from_numpy")
    y = product.matmul(x, packed, mode)
    if x.dtype != torch.float64:
        used = product.weight(packed, x.device, mode, x.dtype)
        packed.derived()["ready"] = *requested, used, mode, *packed.source()
    return y


def _suits(backend: str, x, packed, mode: str | None) -> bool:
    """Whether "auto" may take a backend."""
    if mode is not None and mode not in MODES[backend]:
        return False
    if backend == "reference":
        return True
    kind, device = str(x.dtype).removeprefix("torch."), str(getattr(x, "device", "cpu"))
    if (device.partition(":")[0] != backend or device != str(packed.device) or "keep" in packed.cache
            or kind not in ("float16", "bfloat16", "float32") or (mode == "mma" and kind == "float32")
            or not _available(backend).startswith("yes")):
        return False
    if backend == "cpu":
        return True
    from kernels_numba.gpu import check

    return check.trusted(x.device.index, mode or ("lut" if kind == "float32" else "mma"))
