"""The error every module raises for bad input, and the small checks that several of them share."""

import numbers
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np


class SfmpError(ValueError):
    """Invalid input. The message names the thing, what was expected, what was found and what to do."""


def is_skipped(name: str, skip: Iterable[str]) -> bool:
    """Return whether a dotted module name is excluded, by its full name or by its last component."""
    return name in skip or name.rsplit(".", 1)[-1] in skip


def write_atomically(path, write: Callable[[Path], None]) -> None:
    """Call ``write(temporary)`` beside `path`, then rename: readers see the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def integer(name: str, value, low: int, high: int | None = None) -> int:
    """Return `value` as int if it is a whole number within low..high, else raise SfmpError naming it."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise SfmpError(f"{name}: expected an integer, found {value!r}")
    if value < low or (high is not None and value > high):
        wanted = f">= {low}" if high is None else f"in {low}..{high}"
        raise SfmpError(f"{name}: expected an integer {wanted}, found {value}")
    return int(value)


def numbers_of(name: str, values):
    """Return `values` (tensor, array, nested list, or a list of equal tensors) as a tensor, else raise SfmpError."""
    import torch

    try:
        if isinstance(values, list | tuple) and any(isinstance(value, torch.Tensor) for value in values):
            return torch.stack([torch.as_tensor(value) for value in values])
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SfmpError(f"{name}: expected a tensor, an array or windows of equal length, found "
                        f"{type(values).__name__} ({error}); make one integer tensor [n, seqlen]") from error


def token_ids(name: str, tokens, model=None):
    """Return token ids, in any form `numbers_of` takes, as an int64 tensor of the same shape.

    Raises SfmpError if they are no integers, or lie outside the vocabulary of `model`.
    """
    import torch

    tokens = numbers_of(name, tokens)
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise SfmpError(f"{name}: expected integer token ids, found {tokens.dtype}; pass what the tokenizer "
                        "returns")
    tokens = tokens.to(torch.int64)
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(embedding, "num_embeddings", None)
    if size is not None and tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= size):
        raise SfmpError(f"{name}: expected token ids within 0..{size - 1}, found {int(tokens.min())}.."
                        f"{int(tokens.max())}; were they made with another tokenizer?")
    return tokens


def check_permutation(name: str, perm, size: int | None = None) -> np.ndarray:
    """Return `perm` as int64 [size] if it is a permutation of 0..size-1, else raise SfmpError naming it."""
    perm = np.asarray(perm)
    if perm.ndim != 1 or perm.dtype.kind not in "iu":
        raise SfmpError(f"{name}: expected 1-D integer indices, found {perm.dtype} of shape {perm.shape}")
    size = len(perm) if size is None else size
    if len(perm) != size or not np.array_equal(np.sort(perm), np.arange(size)):
        raise SfmpError(f"{name}: expected a permutation of 0..{size - 1}, found repeated or missing "
                        f"indices among {len(perm)} entries; recompute the plan")
    return perm.astype(np.int64)
