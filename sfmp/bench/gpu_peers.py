"""Peers on a device as candidates: torch in half precision, torch's int4, gemlite, plain Triton.

Every peer has its own best layout of a random weight, copies enough that none comes from the L2 cache, and an error
against float64 with the weight it dequantizes.

Source: CUDA.md section 6.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch

from sfmp.bench.gpu_model import predicted_us
from sfmp.bench.gpu_timing import Settings, checked
from sfmp.bench.timing import Candidate

GROUP_SIZE = 128
INNER_TILES = 8  # of torch's int4 layout: the largest, made for many columns
SCALE = 0.02

Make = Callable[[], Candidate]


def makers(rows: int, columns: int, x: torch.Tensor, settings: Settings, copy_gbps: float) -> dict[str, Make]:
    """Functions that make the candidates of all peers for float16 activations x [tokens, K], by name.

    torch's int4 takes bfloat16 only and is given that. A maker raises what its peer raises.
    """
    tokens = len(x)
    found = {name: functools.partial(_dense, rows, columns, x.to(dtype), settings, copy_gbps)
             for name, dtype in (("torch float16", torch.float16), ("torch bfloat16", torch.bfloat16))}
    found["torch int4pack"] = functools.partial(_int4, rows, columns, x.bfloat16(), settings)
    if tokens == 1:
        for bits in (4, 2):
            found[f"triton {bits}"] = functools.partial(_triton, rows, columns, x, bits, settings)
    for bits in (4, 2):  # 4 bits are what claims are about
        found[f"gemlite {bits}"] = functools.partial(_gemlite, rows, columns, x, bits, settings)
    return found


def missing(name: str, device: str) -> str | None:
    """Why a peer cannot be tried here, or None."""
    package = name.split()[0]
    if package == "torch":
        return None
    if importlib.util.find_spec(package) is None:
        return f"{package} not installed"
    return None if device == "cuda" else f"{package} needs a CUDA device"


def _dense(rows, columns, x, settings, copy_gbps):
    """``torch.nn.functional.linear``: cuBLAS on a device."""
    size = x.element_size() * rows * columns
    weights = [_uniform(x, rows, columns).sub_(0.5).mul_(2 * SCALE) for _ in range(settings.copies(size))]
    kind = str(x.dtype).removeprefix("torch.")
    products = [functools.partial(torch.nn.functional.linear, x, weight) for weight in weights]
    predicted = None
    if settings.device == "cuda" and len(x) == 1:
        predicted = round(predicted_us(size, copy_gbps, dense=True), 3)
    return _candidate(f"torch {kind}", "torch", products, size, x.double() @ weights[0].double().T, x, kind,
                      8 * x.element_size(), predicted)


def _int4(rows, columns, x, settings):
    """``_weight_int4pack_mm``: codes minus 8, times a scale, plus a zero, in groups of 128."""
    groups = columns // GROUP_SIZE
    size = rows * columns // 2 + 4 * rows * groups
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device=x.device)
    affine = _uniform(x, groups, rows, 2).mul_(SCALE)
    if x.device.type == "cpu":
        weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    else:
        weight = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], INNER_TILES)
        multiply = torch.ops.aten._weight_int4pack_mm
    products = [functools.partial(multiply, x, weight.clone(), GROUP_SIZE, affine.clone())
                for _ in range(settings.copies(size))]
    scale, zero = (part.double().T.repeat_interleave(GROUP_SIZE, 1) for part in affine.unbind(-1))
    expected = x.double() @ ((codes.double() - 8) * scale + zero).T
    return _candidate("torch int4pack", "torch", products, size, expected, x, "int4pack", 4)


def _codes(rows, columns, bits, x):
    """(codes uint8 [N, K], scales and zeros [N, groups] in the dtype of x, x times the weight in float64)."""
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, device=x.device)
    scales = _uniform(x, rows, columns // GROUP_SIZE).mul_(SCALE).add_(SCALE)
    zeros = torch.full_like(scales, (1 << bits) / 2)
    scale, zero = (part.double().repeat_interleave(GROUP_SIZE, 1) for part in (scales, zeros))
    return codes, scales, zeros, x.double() @ ((codes.double() - zero) * scale).T


def _triton(rows, columns, x, bits, settings):
    """`gpu_triton`, tuned over a few sizes of tiles."""
    from sfmp.bench import gpu_triton

    size = _quantized_bytes(rows, columns, bits)
    codes, scales, zeros, expected = _codes(rows, columns, bits, x)
    words = gpu_triton.pack(codes, bits, GROUP_SIZE)
    products = [functools.partial(gpu_triton.product, x, words.clone(), scales.clone(), zeros.clone(), bits,
                                  GROUP_SIZE) for _ in range(settings.copies(size))]
    return _candidate(f"triton {bits}", "triton", products, size, expected, x, "dequantize", bits)


@functools.cache
def _set_up_gemlite(autotune):
    """Give gemlite its choices for an H100 on devices like it: by name it knows no other."""
    import gemlite

    known = Path(gemlite.__file__).parent / "configs" / "h100.json"
    if known.is_file() and torch.cuda.get_device_capability()[0] == 9:
        gemlite.load_config(str(known))
    if autotune != "fast":  # its default; setting it loads all its kernels anew
        gemlite.set_autotune(autotune)


def _gemlite(rows, columns, x, bits, settings):
    """gemlite's linear layer; shapes it has no choice for are tuned at the first product."""
    from gemlite.core import DType, GemLiteLinear

    _set_up_gemlite(settings.autotune)
    size = _quantized_bytes(rows, columns, bits)
    codes, scales, zeros, expected = _codes(rows, columns, bits, x)
    layer = GemLiteLinear(bits, group_size=GROUP_SIZE, in_features=columns, out_features=rows, input_dtype=DType.FP16,
                          output_dtype=DType.FP16)
    layer.pack(codes, scales, zeros, None)
    products = [functools.partial(copy.deepcopy(layer), x) for _ in range(settings.copies(size))]
    return _candidate(f"gemlite {bits}", "gemlite", products, size, expected, x, f"A16W{bits}", bits)


def _candidate(name, family, products, size, expected, x, mode, bits, predicted=None):
    kind = str(x.dtype).removeprefix("torch.")
    name += f" {len(x)} tokens" if len(x) > 1 else ""
    return Candidate(name, family, products, size, error=checked(products[0], expected, x.dtype),
                     facts={"mode": mode, "bits": bits, "layout": "uniform", "natural": True, "gather": "none",
                            "tokens": len(x), "dtype": kind, "group_size": GROUP_SIZE if bits < 16 else None,
                            "predicted_us": predicted})


def _quantized_bytes(rows, columns, bits):
    """Codes, and a scale and a zero of 16 bits for each group."""
    return rows * columns * bits // 8 + 4 * rows * (columns // GROUP_SIZE)


def _uniform(x, *shape):
    """Random numbers of 0 … 1 beside x, in its dtype."""
    return torch.rand(*shape, dtype=torch.float32, device=x.device).to(x.dtype)
