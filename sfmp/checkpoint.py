"""Distrust of stored tensors: every size, range, permutation and digest is checked before a matrix is used.

Each check raises one SfmpError that names the tensor, what was expected, what was found and what to do. Only
safetensors are read; pickles never are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch

from sfmp.checks import SfmpError, check_permutation, integer
from sfmp.packed import TENSORS, PackedMatrix, permutation_dtype
from sfmp.planes import MAX_BITS, WORD
from sfmp.spec import BlockGrid

FORMAT_VERSION = 1
_REQUANTIZE = "the checkpoint is damaged or was written for another model: download or quantize it again"
SIZES = ("shape", "group_size", "block_rows", "plane_words")
_ENTRY = (*SIZES, "bias", "sha256")


def describe(packed: PackedMatrix, with_digest: bool = True) -> dict:
    """Return what config.json says about one matrix: its sizes and, by default, the sha256 of its tensors."""
    entry = {"shape": list(packed.shape), "group_size": packed.group_size, "block_rows": packed.block_rows,
             "plane_words": packed.planes.numel(), "bias": packed.bias is not None}
    return {**entry, "sha256": digest(packed.tensors())} if with_digest else entry


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 of the stored bytes in the order of `TENSORS`; the bias follows the model's dtype and
    is out."""
    found = hashlib.sha256()
    for key in TENSORS:
        found.update(tensors[key].detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def check_entry(name: str, entry) -> dict:
    """Return the config entry of one matrix after checking its fields; the digest may be absent."""
    if not isinstance(entry, Mapping) or not set(_ENTRY[:-1]) <= set(entry) <= set(_ENTRY):
        found = sorted(entry) if isinstance(entry, Mapping) else type(entry).__name__
        raise SfmpError(f"quantization_config.modules[{name}]: expected the fields {', '.join(_ENTRY)}, "
                        f"found {found}; "
                        + _REQUANTIZE)
    label = f"quantization_config.modules[{name}]"
    shape = entry["shape"]
    if not isinstance(shape, list | tuple) or len(shape) != 2:
        raise SfmpError(f"{label}.shape: expected [out_features, in_features], found {shape!r}; "
                        f"{_REQUANTIZE}")
    checked = {"shape": tuple(integer(f"{label}.shape", size, 1) for size in shape)}
    for key, low in (("group_size", WORD), ("block_rows", 1), ("plane_words", 1)):
        checked[key] = integer(f"{label}.{key}", entry[key], low)
    if checked["group_size"] % WORD:
        raise SfmpError(f"{label}.group_size: expected a multiple of {WORD}, found {entry['group_size']}; "
                        f"{_REQUANTIZE}")
    if not isinstance(entry["bias"], bool):
        raise SfmpError(f"{label}.bias: expected true or false, found {entry['bias']!r}; {_REQUANTIZE}")
    return {**checked, "bias": entry["bias"], "sha256": entry.get("sha256")}


def layout(shape, group_size, block_rows, plane_words=None, bias=False) -> dict[str, tuple]:
    """Return the expected (dtype, shape) of each stored tensor; None where anything goes."""
    grid = BlockGrid(*shape, block_rows, group_size)
    rows, columns = grid.out_features, grid.in_features
    floats = (torch.float16, (grid.groups, rows))
    expected = {"planes": (torch.int32, None if plane_words is None else (plane_words,)), "alpha": floats,
                "beta": floats,
                "block_bits": (torch.uint8, (grid.groups, grid.row_blocks)),
                "row_perm": (_torch_dtype(rows), (rows,)), "col_perm": (_torch_dtype(columns), (columns,))}
    return {**expected, "bias": (None, (rows,))} if bias else expected


def check_tensors(name, tensors, shape, group_size, block_rows, plane_words=None, sha256=None) -> None:
    """Check the stored tensors of one matrix; see `PackedMatrix.from_tensors`.

    Raises
    ------
    SfmpError
        Missing or unexpected tensor, wrong dtype or shape, NaN or infinity, bits outside 1..8, planes of
        another length than the bit map demands, no permutation, or another digest than `sha256`.
    """
    check_headers(name, {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()},
                  layout(shape, group_size, block_rows, plane_words, bias="bias" in tensors))
    for key in ("alpha", "beta", *(("bias",) if "bias" in tensors else ())):
        wrong = int((~tensors[key].isfinite()).sum())
        if wrong:
            raise SfmpError(f"{name}.{key}: expected finite values, found {wrong} NaN or infinite; "
                            f"{_REQUANTIZE}")
    bits = tensors["block_bits"].cpu().numpy()
    if bits.min() < 1 or bits.max() > MAX_BITS:
        raise SfmpError(f"{name}.block_bits: expected 1..{MAX_BITS}, found {bits.min()}..{bits.max()}; "
                        f"{_REQUANTIZE}")
    words = int(bits.sum(dtype=np.int64)) * (group_size // WORD) * block_rows
    if tensors["planes"].numel() != words:
        raise SfmpError(f"{name}.planes: expected {words} words for the bit-widths in block_bits, found "
                        f"{tensors['planes'].numel()}; {_REQUANTIZE}")
    for key in ("row_perm", "col_perm"):
        check_permutation(f"{name}.{key}", tensors[key].cpu().numpy())
    if sha256 is not None and digest(tensors) != sha256:
        raise SfmpError(f"{name}.planes: expected the sha256 {sha256[:12]}… over its tensors, found "
                        f"{digest(tensors)[:12]}…: values were altered; {_REQUANTIZE}")


def check_headers(name, found: Mapping[str, tuple], expected: Mapping[str, tuple]) -> None:
    """Compare (dtype, shape) of each tensor with what is expected: presence, dtype, shape."""
    for key, (dtype, shape) in expected.items():
        if key not in found:
            raise SfmpError(f"{name}.{key}: expected a tensor{_text(dtype, shape)}, found none; "
                            f"{_REQUANTIZE}")
        real_dtype, real_shape = found[key]
        if shape is None:
            right = len(real_shape) == 1
        else:
            right = tuple(real_shape) == tuple(shape)
        if not right or (real_dtype != dtype if dtype is not None else not real_dtype.is_floating_point):
            raise SfmpError(f"{name}.{key}: expected{_text(dtype, shape)}, "
                            f"found{_text(real_dtype, real_shape)}; "
                            + _REQUANTIZE)
    for key in found:
        if key not in expected:
            raise SfmpError(f"{name}.{key}: expected no such tensor, found{_text(*found[key])}; "
                            f"{_REQUANTIZE}")


def read_headers(files) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return (dtype, shape) of every tensor in the safetensors files; no tensor data is read.

    Raises
    ------
    SfmpError
        A file is no safetensors (pickles are refused), is truncated, or is damaged.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import _TYPES

    found = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise SfmpError(f"{file}: expected a .safetensors file, found another kind; pickles are never "
                            "read: save the checkpoint with save_pretrained")
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():
                    tensor = opened.get_slice(key)
                    found[key] = _TYPES.get(tensor.get_dtype()), tuple(tensor.get_shape())
        except (SafetensorError, OSError) as error:
            raise SfmpError(f"{file}: expected a complete safetensors file, found a damaged one ({error}); "
                            "download or save it again") from error
    return found


def _torch_dtype(size):
    return torch.uint16 if permutation_dtype(size) is np.uint16 else torch.int32


def _text(dtype, shape):
    kind = "floating" if dtype is None else str(dtype).removeprefix("torch.")
    return f" {kind}" + ("" if shape is None else f" {list(shape)}")
