"""Products on a CUDA device: from a PackedMatrix and activations to the kernels, and the torch operator.

``torch.ops.sfmp.cuda_linear(x, image, bias, rows, structure)`` is what a compiled layer calls. Nothing is kept between
calls but weights and what is prepared for them on the host; scratch memory is torch's, on the stream of the call.

Activations that are not finite give NaN where the exact product may be infinite.
"""

from __future__ import annotations

import functools

import torch

from kernels_numba.cpu.gradient import Product
from kernels_numba.cpu.plain import forward
from kernels_numba.gpu import devices
from kernels_numba.gpu.weight import KINDS, LAYOUTS, Weight, find, make_weight
from kernels_numba.linear_operator import describe, readable_bias
from sfmp.checks import SfmpError

_WIDE = KINDS["lut"]
_ONLY_FLOAT = (torch.float32,)

_library = torch.library.Library("sfmp", "FRAGMENT")
_library.define("cuda_linear(Tensor x, Tensor image, Tensor? bias, SymInt rows, str structure) -> Tensor")


def matmul(x: torch.Tensor, packed, mode: str | None = None) -> torch.Tensor:
    """Return x Wᵀ + bias; see `kernels_numba.matmul`.

    The first call with a matrix lays it out on the device of x and keeps that in ``packed.cache``; the first on a
    device multiplies a small matrix and compares (`check`).

    Parameters
    ----------
    x : floating [..., K] on a CUDA device
        float64 is computed in float32.
    packed : PackedMatrix, on any device
    mode : {"mma", "lut"} or None
        "mma" takes float16 and bfloat16; None is "mma" for those and "lut" for float32.

    Raises
    ------
    SfmpError
        Wrong shape, dtype or device, unknown mode, a device whose results are wrong, or the first call is made while a
        graph is captured.
    """
    columns = packed.shape[1]
    if mode not in (None, *LAYOUTS):
        raise SfmpError(f"mode: expected one of {', '.join(LAYOUTS)}, found {mode!r}; leave it None")
    if x.layout != torch.strided:
        raise SfmpError(f"x: expected a dense tensor, found {x.layout}; use x.to_dense()")
    if x.ndim == 0 or x.shape[-1] != columns or x.dtype not in (*_WIDE, torch.float64):
        raise SfmpError(f"x: expected floating [..., {columns}], found {x.dtype} {list(x.shape)}; check in_features")
    if mode == "mma" and x.dtype not in KINDS["mma"]:
        raise SfmpError(f"x: expected float16 or bfloat16 for mode mma, found {x.dtype}; use mode='lut' or None")
    if x.device.type != "cuda":
        raise SfmpError(f"x: expected a CUDA device for backend cuda, found {x.device}; move it or choose another "
                        "backend")
    needs = x.requires_grad or (packed.bias is not None and packed.bias.requires_grad)
    if (needs and torch.is_grad_enabled()) or forward._current_level >= 0:
        return Product.apply(x, packed.bias, packed, functools.partial(without_gradient, mode=mode))
    return without_gradient(x, packed.bias, packed, mode)


def without_gradient(x, bias, packed, mode):
    """`matmul` for checked x."""
    wide = x.float() if x.dtype == torch.float64 else x
    used = weight(packed, x.device, mode, wide.dtype)
    multiply = used.dispatch if torch.compiler.is_compiling() else used.multiply
    return multiply(wide, bias).to(x.dtype)


def weight(packed, device: torch.device, mode: str | None, kind: torch.dtype) -> Weight:
    """The weight on a device, kept in ``packed.cache`` from the first call on.

    It takes only kinds of activations for which `mode`, which may be None, means the same kernel.

    Raises
    ------
    SfmpError
        It has to be made and a graph is being captured, or results on the device are wrong.
    """
    index = device.index or 0
    used = mode or ("lut" if kind == torch.float32 else "mma")
    cache, key = packed.derived(), ("cuda", index, mode, used)
    found = cache.get(key)
    if found is None:
        with devices.get(index).guard():
            devices.get(index).kernels.forbid_capture("the weight is not on the device yet")
            from kernels_numba.gpu import check

            check.demand(index, used)
            same = cache.get(("cuda", index, None if mode else used, used))
            kinds = _ONLY_FLOAT if mode is None and used == "lut" else KINDS[used]
            if same is not None:
                found = Weight(same.image, same.structure, kinds)
            else:
                found = make_weight(packed, used, torch.device("cuda", index), kinds)
        cache[key] = found
    return found


def _cuda_linear(x, image, bias, rows, structure):
    x = x.contiguous()
    return find(image, structure).enqueue(x, readable_bias(bias, rows, x.device, _WIDE))


_library.impl("cuda_linear", _cuda_linear, "CUDA")
describe(_library, "cuda_linear", _WIDE)
