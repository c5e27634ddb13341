"""SFMPLinear: a linear layer whose buffers are the stored tensors of one PackedMatrix; and what any layer with
such buffers needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.compiler import is_compiling

from sfmp.checks import SfmpError
from sfmp.packed import TENSORS, PackedMatrix


@torch.compiler.disable(reason="the first product of an SFMPLinear repacks its weight; call the model once before it "
                        "is compiled")
def _first_product(x, layer):
    """The product with all checks, which prepares what later ones need."""
    from kernels_numba import matmul

    return matmul(x, layer, backend=layer.backend, mode=layer.mode)


class StoredLinear(nn.Module):
    """Base of the layers whose weight is a few stored tensors: buffers that keep their dtypes.

    ``.to(dtype)`` casts only ``bias``; what was derived from the tensors lives in ``_cache`` and is dropped
    when they move.

    Attributes
    ----------
    stored : names of the buffers, ``bias`` excluded
    """

    stored: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        # .to(dtype), .half(), .type() must move the stored tensors but never change their numbers. Shown to
        # fn as bytes, they are no floating tensors; if fn changes even those, only its device is taken.
        stored = {key: self._buffers.pop(key) for key in self.stored}
        try:
            super()._apply(fn, recurse)
        finally:
            bias = {"bias": self._buffers.pop("bias")} if "bias" in self._buffers else {}  # or it is a parameter
            self._buffers.update({**stored, **bias})
        for key, tensor in stored.items():
            moved = fn(tensor.view(torch.uint8))
            kept = moved.dtype == torch.uint8
            self._buffers[key] = moved.view(tensor.dtype) if kept else tensor.to(moved.device)
        self._cache = {}
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        self._cache.clear()  # not replaced: who shares it shares the tensors that are filled now
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self):
        return {**super().__getstate__(), "_cache": {}}  # copies and pickles rebuild what backends derived


class SFMPLinear(StoredLinear):
    """Drop-in for ``nn.Linear`` on packed weights: y = x Wᵀ + bias, x and y in natural order.

    x is [..., in_features] in float32, bfloat16, float16 or float64; y has the dtype of x. The buffers
    (`TENSORS` and ``bias``) keep their stored dtypes whatever ``.to(dtype)`` asks, because alpha and beta are
    float16 by format; only ``bias`` follows the model's dtype.

    The CPU and CUDA kernels repack the planes at the first call and keep both, so a model takes twice the memory of its
    packed weights from then on; before a CUDA graph is captured, every layer must have been called once. A stored
    tensor that is replaced or changed in place is repacked at the next call, except inside a compiled model (compile it
    again), inside a captured graph (capture it again) and for inference tensors (see `PackedMatrix.derived`).

    Attributes
    ----------
    backend, mode : what ``kernels_numba.matmul`` is asked for; "auto" and None by default
    """

    stored = TENSORS

    def __init__(self, packed: PackedMatrix):
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.group_size, self.block_rows = packed.group_size, packed.block_rows
        self.backend, self.mode = "auto", None
        for key in TENSORS:
            self.register_buffer(key, getattr(packed, key))
        self.register_buffer("bias", packed.bias)
        self._cache = packed.cache

    @classmethod
    def from_packed(cls, packed: PackedMatrix) -> SFMPLinear:
        """Return a layer that shares the tensors of `packed`."""
        return cls(packed)

    @classmethod
    def empty(cls, out_features, in_features, *, group_size, block_rows, plane_words, bias=False, device=None,
              dtype=None) -> SFMPLinear:
        """Return a layer with unset buffers of the right dtypes and sizes, to be filled by a checkpoint
        loader.

        Parameters
        ----------
        plane_words : int
            Length of ``planes``, from the configuration.
        device : "meta" allocates nothing
        dtype : dtype of the bias; torch's default if None
        """
        from sfmp.checkpoint import layout

        shapes = layout((out_features, in_features), group_size, block_rows, plane_words, bias)
        empty = {key: torch.empty(shape, dtype=kind or dtype, device=device)
                 for key, (kind, shape) in shapes.items()}
        stored = (empty[key] for key in TENSORS)
        shape = (out_features, in_features)
        return cls(PackedMatrix(*stored, empty.get("bias"), shape, group_size, block_rows))

    @property
    def packed(self) -> PackedMatrix:
        """The matrix, sharing the buffers and the cache of this layer."""
        stored = (getattr(self, key) for key in TENSORS)
        shape = (self.out_features, self.in_features)
        packed = PackedMatrix(*stored, self.bias, shape, self.group_size, self.block_rows)
        packed.cache = self._cache
        self._cache = packed.derived()
        return packed

    def dequantize(self) -> torch.Tensor:
        """Return the weight in natural order, float32 [N, K]."""
        return self.packed.dequantize()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ready = self._cache.get("ready")
        if ready is None:
            return _first_product(x, self)
        backend, asked, weight, mode, (planes, alpha, beta, bits, rows, columns), versions = ready
        held = self._buffers
        bias = held["bias"] if "bias" in held else self.bias  # a parameter since
        # Written out, because this is what a layer costs beyond its product.
        if backend == self.backend and asked == self.mode and weight.takes(x, bias):
            if is_compiling():
                return weight.dispatch(x, bias, mode)
            if (held["planes"] is planes and held["alpha"] is alpha and held["beta"] is beta
                    and held["block_bits"] is bits and held["row_perm"] is rows and held["col_perm"] is columns
                    and (versions is None or versions == planes._version + alpha._version + beta._version
                         + bits._version + rows._version + columns._version)):
                return weight.multiply(x, bias, mode)
        return _first_product(x, self)

    def extra_repr(self) -> str:
        bpw = "" if self.planes.is_meta else f", bpw={self.packed.bpw:.3f}"
        return (f"in_features={self.in_features}, out_features={self.out_features}, "
                f"bias={self.bias is not None}, "
                f"group_size={self.group_size}, block_rows={self.block_rows}{bpw}")


@contextmanager
def keep_dequantized(model: nn.Module) -> Iterator[nn.Module]:
    """Keep the dequantized float32 weight of every `StoredLinear` in memory while inside; results of the reference
    backend do not change, and "auto" is the reference.

    The reference then dequantizes each matrix once instead of at every call: for evaluation, where memory for
    one float32 copy of the model is at hand, and batches are so large that a plain product is fastest.

    Raises
    ------
    SfmpError
        The model has no SFMPLinear or other `StoredLinear`.
    """
    layers = [module for module in model.modules() if isinstance(module, StoredLinear)]
    if not layers:
        raise SfmpError("model: expected at least one SFMPLinear, found none; quantize the model first")
    try:
        for layer in layers:
            layer._cache["keep"] = True
            layer._cache.pop("ready", None)
        yield model
    finally:
        for layer in layers:
            for key in ("keep", "weight"):
                layer._cache.pop(key, None)
