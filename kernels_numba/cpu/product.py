"""Products on the CPU: from a PackedMatrix and activations to the kernels, and the torch operator.

``torch.ops.sfmp.cpu_linear(x, image, bias, rows, tile_columns, target, mode)`` is what a layer calls: no copy of
activations that are contiguous, bfloat16 and float16 read and written by the kernels themselves. float64 is computed in
float32.

Activations that are NaN, infinite or beyond 2^120 have no tables. All tokens of such a call are multiplied with the
dequantized weight by torch, so the result has its NaN and infinities where torch has them.
"""

from __future__ import annotations

import functools
import threading

import numpy as np
import torch
from torch import Tensor

from kernels_numba.cpu import arena, drive, launch, layout, panel, targets, threads
from kernels_numba.cpu.gradient import Product
from kernels_numba.cpu.native import BFLOAT16, FLOAT16, FLOAT32
from kernels_numba.cpu.plain import dispatch_modes, forward, function_modes, tracing, transform
from kernels_numba.cpu.records import MODES, TOKENS, table_bytes
from kernels_numba.linear_operator import describe, readable_bias
from sfmp.checks import SfmpError

KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
RUN_TOKENS = 64  # bounds the memory of the tables
_FIRST_JOB = 1 << 20
_STRIDED = torch.strided

_library = torch.library.Library("sfmp", "DEF")
_library.define("cpu_linear(Tensor x, Tensor image, Tensor? bias, SymInt rows, int tile_columns, str target, str mode) "
                "-> Tensor")
_local = threading.local()


def matmul(x, packed, mode: str | None = None):
    """Return x Wᵀ + bias; see `kernels_numba.matmul`.

    The first call with a matrix repacks its planes and keeps them in ``packed.cache``, beside the stored tensors.

    Raises
    ------
    SfmpError
        Wrong shape or dtype of x, wrong size of the bias, x, bias or weight not on the CPU, no kernels for this
        processor or mode.
    """
    if isinstance(x, np.ndarray):
        return matmul(torch.from_numpy(np.require(x, requirements="CW")), packed, mode).numpy()
    columns = packed.shape[1]
    if x.layout != torch.strided:
        raise SfmpError(f"x: expected a dense tensor, found {x.layout}; use x.to_dense()")
    if x.ndim == 0 or x.shape[-1] != columns or x.dtype not in (*KINDS, torch.float64):
        raise SfmpError(f"x: expected floating [..., {columns}], found {x.dtype} {list(x.shape)}; check in_features")
    for name, tensor in (("x", x), ("packed", packed)):
        if tensor.device.type != "cpu":
            raise SfmpError(f"{name}: expected device cpu for backend cpu, found {tensor.device}; move it or "
                            "choose another backend")
    if _needs_gradient(x, packed.bias) or forward._current_level >= 0:
        return Product.apply(x, packed.bias, packed, functools.partial(_without_gradient, mode=mode))
    return _without_gradient(x, packed.bias, packed, mode)


def _without_gradient(x, bias, packed, mode):
    wide = x.float() if x.dtype == torch.float64 else x
    used, mode = weight(packed), choose_mode(mode)
    multiply = used.dispatch if torch.compiler.is_compiling() else used.multiply
    return multiply(wide, bias, mode).to(x.dtype)


def _needs_gradient(x, bias) -> bool:
    return (x.requires_grad or (bias is not None and bias.requires_grad)) and torch.is_grad_enabled()


class Weight:
    """A repacked matrix, and its product with activations that need no checks and no gradient.

    Attributes
    ----------
    image : uint8 [bytes]
    rows, columns : N, K
    tile_columns : columns of a tile
    target : whose kernels multiply
    """

    def __init__(self, image: torch.Tensor, rows: int, columns: int, tile_columns: int, target: str):
        self.image, self.rows, self.columns, self.tile_columns = image, rows, columns, tile_columns
        self.target, self._address = target, image.data_ptr()
        self._ready: dict = {}  # mode → what a product of one token is called with
        self._shapes = {size: (1,) * (size - 1) + (rows,) for size in range(1, 5)}  # of y for one token
        self._bias = None, None, None, None  # see _check

    def __reduce__(self):
        return Weight, (self.image, self.rows, self.columns, self.tile_columns, self.target)  # addresses are not copied

    def takes(self, x, bias) -> bool:
        """Whether `multiply` may be called: a dense CPU tensor of a kind the kernels read, and no gradient."""
        return (isinstance(x, Tensor) and x.is_cpu and x.dtype in KINDS and x.layout is _STRIDED
                and x.dim() != 0 and x.shape[-1] == self.columns and forward._current_level < 0
                and not ((x.requires_grad or (bias is not None and bias.requires_grad)) and torch.is_grad_enabled()))

    def multiply(self, x, bias, mode: str):
        """Return x Wᵀ + bias; mode as `choose_mode` gives it.

        One token does without torch's dispatcher and without everything else that can be prepared: between two
        products that fill the caches with weights, each step of Python costs several times what it costs alone.
        """
        shape, job = self._shapes.get(x.dim()), getattr(_local, "address", None)
        if (shape and job and x.numel() == self.columns and type(x) is Tensor and x.is_contiguous()
                and not (x.is_neg() or dispatch_modes() or function_modes()) and transform() is None
                and tracing() is None):
            bias_at = bias_kind = 0
            if bias is not None:
                bias_at, known = bias.data_ptr(), self._bias
                if bias is not known[0] or bias_at != known[1] or bias.dtype is not known[2]:
                    known = self._check(bias)
                bias_kind = known[3]
            if bias_kind is not None:
                run, fixed = self._ready.get(mode) or self._prepare(mode)
                kind, y = KINDS[x.dtype], x.new_empty(*shape)  # a tuple would take torch longer to read
                if run(job, threads.count(), *fixed, x.data_ptr(), kind, y.data_ptr(), kind, bias_at, bias_kind,
                       1) == 0:
                    return y
        return self.dispatch(x, bias, mode)

    def dispatch(self, x, bias, mode: str):
        """`multiply` by torch's operator."""
        return _operator(x, self.image, bias, self.rows, self.tile_columns, self.target, mode)

    def _check(self, bias) -> tuple:
        """(bias, address, dtype, kind or None): None if it cannot be read at its address; kept for the next call."""
        data = bias.detach()  # of a parameter too
        fine = (data.is_cpu and data.layout is _STRIDED and data.numel() == self.rows and type(data) is Tensor
                and data.is_contiguous() and not data.is_neg())
        self._bias = bias, bias.data_ptr(), bias.dtype, KINDS.get(bias.dtype) if fine else None
        return self._bias

    def _prepare(self, mode):
        run, fixed = _kernels(self.target, mode, self.tile_columns, 1)
        self._ready[mode] = run, (*fixed, self._address)
        return self._ready[mode]


def weight(packed) -> Weight:
    """The repacked weight, kept in ``packed.cache`` from the first call on: as many bytes again as the planes take."""
    cache, target = packed.derived(), targets.detect()[0]
    found = cache.get("cpu")
    if found is None or found.target != target:
        if found is None:
            with torch.inference_mode(False):
                image = torch.from_numpy(layout.make_image(packed))
        else:
            image = found.image  # the same for all targets
        found = Weight(image, *packed.shape, int(np.gcd(packed.group_size, 128)), target)
        cache["cpu"] = found
    return found


def choose_mode(mode: str | None) -> str:
    """Return the mode, or the target's default for None."""
    target, why = targets.detect()
    modes = targets.MODES.get(target, ())
    if not modes:
        raise SfmpError(f"backend: expected a processor with kernels, but {why}; use backend='reference'")
    if mode is not None and mode not in modes:
        raise SfmpError(f"mode: expected one of {', '.join(modes)} on target {target}, found {mode!r}; leave it None")
    return mode or modes[0]


@functools.cache
def _kernels(target: str, mode: str, columns: int, together: int):
    """`run` and its arguments that target and mode fix: compiled, or from Numba's cache."""
    if mode not in targets.MODES.get(target, ()):
        choose_mode(mode)  # raises: the target was changed after the mode was chosen
    worker = drive.worker(target, mode, columns, together)
    kind = list(targets.MODES).index(target) * len(MODES) + MODES.index(mode)  # of the tables that are kept
    return threads.guarded(drive.runner()), (worker, kind, table_bytes(columns, mode), together)


def _job(size: int) -> int:
    """Address of this thread's job, of at least `size` bytes."""
    held = getattr(_local, "job", None)
    if held is None or len(held) < size:
        held = _local.job = arena.mapping(max(size, _FIRST_JOB))
        held[:8].view(np.int64)[drive.CAPACITY] = len(held)
        _local.address = held.ctypes.data
    return _local.address


def _panel_memory(size: int) -> np.ndarray:
    """This thread's memory for a panel, of at least `size` bytes."""
    held = getattr(_local, "panel", None)
    if held is None or len(held) < size:
        held = _local.panel = arena.mapping(size)
    return held


def through_tables(x, image, bias, rows: int, tile_columns: int, target: str, mode: str, together: int | None = None):
    """Return x Wᵀ + bias by look-ups; `together` tokens share a pass, by the launch table if None.

    x and bias are contiguous and of `KINDS`, the bias has `rows` elements.
    """
    shape, kind = x.shape, KINDS[x.dtype]
    y = x.new_empty(shape[:-1] + (rows,))
    bias_at = bias_kind = 0
    if bias is not None:
        bias_at, bias_kind = bias.data_ptr(), KINDS[bias.dtype]
    weight, x_at, y_at, count, job = image.data_ptr(), x.data_ptr(), y.data_ptr(), threads.count(), _job(0)
    left = x.numel() // shape[-1]
    while left:
        tokens, shared = _portion(left, target, mode) if together is None else (left, together)
        run, fixed = _kernels(target, mode, tile_columns, shared)
        found = run(job, count, *fixed, weight, x_at, kind, y_at, kind, bias_at, bias_kind, tokens)
        if found > 0:
            job = _job(found)
            continue
        if found < 0:
            return through_panels(x, image, bias, rounded=False)
        left -= tokens
        x_at += tokens * shape[-1] * x.element_size()
        y_at += tokens * rows * x.element_size()
    return y


def _portion(left: int, target: str, mode: str) -> tuple[int, int]:
    """(tokens of the next run, tokens that share a pass): whole passes first, then the rest."""
    together, left = TOKENS[mode], min(left, RUN_TOKENS)
    if left <= launch.singles(target, mode):
        return left, 1
    return max(left // together * together, min(left, together)), together


def through_panels(x, image, bias, rounded: bool):
    """Return x Wᵀ + bias by dequantizing panels; rounded to bfloat16 if that is asked for and fast here."""
    threads.prepare_torch()
    y = panel.multiply(x.reshape(-1, x.shape[-1]), image.numpy(), bias, threads.count(), rounded, _panel_memory)
    return y.view(*x.shape[:-1], -1)


def _cpu_linear(x, image, bias, rows, tile_columns, target, mode):
    x, bias = x.contiguous(), readable_bias(bias, rows, x.device, KINDS)
    tokens = x.numel() // x.shape[-1]
    if tokens >= launch.least_crossover(target, mode) and tokens >= launch.crossover(
            target, mode, layout.mean_bits(image.numpy())):
        return through_panels(x, image, bias, rounded=mode == "lut8")
    return through_tables(x, image, bias, rows, tile_columns, target, mode)


_library.impl("cpu_linear", _cpu_linear, "CPU")
_operator = torch.ops.sfmp.cpu_linear.default
describe(_library, "cpu_linear", KINDS)
