"""A product with known result, once per device and mode, before anything else is multiplied there.

The kernels are tested where there is no GPU, by simulation. A compiler, a driver or a device that makes something else
of them must not go unnoticed: a wrong result raises SfmpError, and backend "auto" takes the reference instead, with one
warning that names the numbers. The first check on a machine compiles several kernels, each in seconds; they are kept on
disk (`cubins`), and serve matrices of the same bits.
"""

from __future__ import annotations

import functools
import warnings

import numpy as np
import torch

from kernels_numba.gpu import devices, panels
from kernels_numba.gpu.weight import make_weight
from sfmp.checks import SfmpError
from sfmp.pack import pack

SHAPE, GROUP, BLOCK_ROWS, LEVELS = (75, 300), 128, 40, (2, 3, 4)  # ragged at every edge
TOKENS = 1, 3
LIMIT = 2.0**-10  # of ‖error‖/‖result‖: float16 rounds to 2^-11


def small_matrix():
    """A matrix of random codes and permutations with a bias."""
    rng = np.random.default_rng(0)
    rows, columns = SHAPE
    bits = rng.choice(LEVELS, (-(-rows // BLOCK_ROWS), -(-columns // GROUP)))
    top = ((1 << bits) - 1).repeat(BLOCK_ROWS, axis=0)[:rows].repeat(GROUP, axis=1)[:, :columns]
    scales = rng.uniform(0.01, 0.1, (rows, bits.shape[1]))
    return pack(rng.integers(0, top + 1).astype(np.uint8), scales, np.full_like(scales, 2), bits, group_size=GROUP,
                block_rows=BLOCK_ROWS, row_perm=rng.permutation(rows), col_perm=rng.permutation(columns),
                bias=rng.normal(size=rows).astype(np.float32))


def relative_errors(index: int, mode: str) -> dict[str, float]:
    """‖error‖/‖result‖ of products of the small matrix on a device, against float64 on the CPU."""
    packed, errors = small_matrix(), {}
    dense = packed.dequantize().double()
    weight = make_weight(packed, mode, torch.device("cuda", index))
    for tokens in TOKENS:
        x = torch.from_numpy(np.random.default_rng(tokens).normal(size=(tokens, SHAPE[1]))).half()
        expected = x.double() @ dense.T + packed.bias.double()
        there, bias = x.to(weight.device), packed.bias.to(weight.device)
        found = {f"{tokens} tokens": weight.enqueue(there, bias)}
        if mode == "mma":
            y = torch.full_like(found[f"{tokens} tokens"], torch.nan)
            panels.multiply(weight, there, y, bias)
            found[f"{tokens} tokens, dequantized"] = y
        for name, y in found.items():
            errors[name] = float((y.cpu().double() - expected).norm() / expected.norm())
    return errors


@functools.cache
def verdict(index: int, mode: str) -> str | None:
    """Return what is wrong with the products of a mode on a device, or None.

    Raises
    ------
    SfmpError
        A graph is being captured.
    """
    device = devices.get(index)
    with device.guard():
        device.kernels.forbid_capture(f"mode {mode} was not checked on device {index}")
    with device.guard(), torch.inference_mode(False), torch.no_grad():
        try:
            errors = relative_errors(index, mode)
        except SfmpError as error:
            devices.wrong.add((index, mode))
            return str(error)
    if all(error <= LIMIT for error in errors.values()):
        return None
    devices.wrong.add((index, mode))
    told = ", ".join(f"{name}: {error:.2g}" for name, error in errors.items())
    return (f"{device.name}, mode {mode}: expected relative errors of at most {LIMIT:.2g} from a matrix of "
            f"{SHAPE[0]} × {SHAPE[1]}, found {told}")


def demand(index: int, mode: str) -> None:
    """Raise SfmpError unless a mode gives right results on a device."""
    wrong = verdict(index, mode)
    if wrong:
        raise SfmpError(f"backend cuda: {wrong}; use backend='reference' and report it")


@functools.cache
def trusted(index: int, mode: str) -> bool:
    """Whether "auto" may take a mode on a device; warns the first time if not."""
    wrong = verdict(index, mode)
    if wrong:
        warnings.warn(f"backend cuda is not used: {wrong}. The reference is used instead, which is slow.",
                      RuntimeWarning, stacklevel=4)
    return not wrong
