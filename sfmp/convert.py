"""Checkpoints published by SFMP's authors into our format, matrix by matrix.

Only safetensors are read, one matrix at a time, so memory stays near one output file whatever the size of the model.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch

from sfmp.authors_format import AXES, PARTS, CodeLayout, code_axes, is_quantized, packed_matrix
from sfmp.checkpoint import FORMAT_VERSION, describe, read_headers
from sfmp.checks import SfmpError
from sfmp.permissions import share_weights
from sfmp.push import COMPANIONS
from sfmp.spec import MatrixPlan, Plan, QuantSpec


def convert_checkpoint(source, folder, *, codes: str = "qweight", nibbles: str = "low-first", axes: str | None = None,
                       base: Mapping | None = None, max_shard_bytes: int = 5 * 10**9, overwrite: bool = False,
                       progress: bool = False) -> Path:
    """Convert a folder of int4-coded QuantLinear layers; other tensors and files are copied.

    Parameters
    ----------
    source : path
        Local folder with config.json and ``*.safetensors``.
    folder : path that does not exist, unless `overwrite`
        Appears complete or not at all.
    codes, nibbles, axes : str
        Name of the codes' tensors; ``low-first`` or ``high-first``; one of `sfmp.authors_format.AXES`, needed only
        where the shapes fit several (see `sfmp.authors_format.CodeLayout`).
    base : mapping with ``model`` and ``revision``, optional
        What was quantized, for config.json and the model card.
    max_shard_bytes : int
        Tensors of one output file.
    overwrite : bool
        Replace a checkpoint in `folder`.
    progress : bool
        Show a bar over matrices.

    Returns
    -------
    Path
        `folder`.

    Raises
    ------
    SfmpError
        There is no such checkpoint, a tensor is not what the published format says (named), or blocks of different
        shapes are mixed.

    Notes
    -----
    Codes, zeros and permutations are kept exactly, and so are float16 scales (of at least 2^-13: we store scale/2);
    beta is rounded to float16 as our format does. The specification in config.json is what the bit maps show (levels,
    bits per weight, block shape); objective, salience and seed of the authors' run are not in their checkpoint. Tensors
    of a quantized module that the format does not have are left out, with a warning. Source: METHOD.md 1.5, 1.9;
    DESIGN.md section 4.
    """
    from sfmp.card import save_model_card
    from sfmp.disk import writing_to
    from sfmp.model_source import check_new
    from sfmp.pipeline import check_apart

    source, folder = Path(source), Path(folder)
    check_apart(source, folder)
    check_new(folder, overwrite)
    if nibbles not in ("low-first", "high-first"):
        raise SfmpError(f"nibbles: expected low-first or high-first, found {nibbles!r}")
    if axes is not None and axes not in AXES:
        raise SfmpError(f"axes: expected one of {'; '.join(AXES)}, found {axes!r}")
    layout = CodeLayout(codes, nibbles == "low-first", axes)
    config = _config(source)
    where, headers = _tensor_files(source)
    modules = _modules(source, where, layout)
    layout = dataclasses.replace(layout, axes=axes or _common_axes(modules, headers, layout))
    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        with writing_to(folder, "choose a place where you may write, with room for the checkpoint"):
            new.mkdir(parents=True)
            entries, plan = _write_tensors(new, where, modules, layout, max_shard_bytes, progress)
            config["quantization_config"] = {
                "quant_method": "sfmp", "format_version": FORMAT_VERSION, "spec": plan.spec.to_dict(),
                "modules": entries, "plan_hash": plan.hash,
                "source": dict(base or {"model": None, "revision": None})}
            (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            _copy_other_files(source, new)
            save_model_card(None, new)
            share_weights(new)
            check_new(folder, overwrite)
            if folder.exists():
                os.replace(folder, old)
            os.replace(new, folder)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
    return folder


def _config(source):
    try:
        config = json.loads((source / "config.json").read_text("utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no JSON object")
        return config
    except (OSError, ValueError) as error:
        raise SfmpError(f"{source}: expected a checkpoint folder with config.json, found {error}; give the folder that "
                        "holds the downloaded files") from error


def _tensor_files(source) -> tuple[dict[str, Path], dict[str, tuple]]:
    """File, and (dtype, shape), of every tensor."""
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise SfmpError(f"{source}: expected *.safetensors, found none; pickles (.bin, .pt) are never read: save them "
                        "as safetensors where you trust them")
    where, headers = {}, {}
    for file in files:
        for name, header in read_headers([file]).items():
            if name in where:
                raise SfmpError(f"{source}: expected each tensor once, found {name} in {where[name].name} and "
                                f"{file.name}; remove the file that does not belong")
            where[name], headers[name] = file, header
    return where, headers


def _modules(source, where, layout) -> list[str]:
    """Names of the quantized modules, in the order of the files' tensors."""
    modules = [name.rpartition(".")[0] for name in where if name.endswith(f".{layout.name}")]
    if not modules:
        raise SfmpError(f"{source}: expected modules with {layout.name}, {', '.join(PARTS)}, found none among tensors "
                        f"such as {sorted(where)[:3]}; if the codes have another name, pass it with --codes")
    partial = next((name for name in modules if not is_quantized(name, where, layout)), None)
    if partial is not None:
        here = sorted(name.rpartition(".")[2] for name in where if name.rpartition(".")[0] == partial)
        raise SfmpError(f"{partial}: expected {layout.name}, {', '.join(PARTS)}, found {', '.join(here)}; download "
                        "it again")
    return modules


def _common_axes(modules, headers, layout) -> str | None:
    """The one order of axes that fits the codes of every matrix; None if none does; `packed_matrix` says why."""
    fitting = set(AXES)
    for name in modules:
        dtype, shape = headers[f"{name}.{layout.name}"]
        orders = [headers[f"{name}.{part}"][1] for part in ("out_reorder", "in_reorder")]
        if any(len(order) != 1 for order in orders):
            return None
        fitting &= code_axes(shape, dtype, *(order[0] for order in orders))
    if len(fitting) > 1:
        raise SfmpError(f"{layout.name}: expected shapes that only one order of axes explains, found that "
                        f"{' and '.join(sorted(fitting))} fit all {len(modules)} matrices; say which with --axes")
    return fitting.pop() if fitting else None


def _write_tensors(new, where, modules, layout, most, progress):
    """Write every tensor; return the entries of config.json and the plan that the bit maps and permutations show."""
    shards, entries, matrices, shapes = _Shards(new, most), {}, {}, set()
    parts = (layout.name, *PARTS, "bias")
    for name in _bar(modules, progress):
        tensors = {part: _read(where, f"{name}.{part}") for part in parts if f"{name}.{part}" in where}
        packed = packed_matrix(name, tensors, layout)
        shapes.add((packed.group_size, packed.block_rows))
        if len(shapes) > 1:
            raise SfmpError(f"{name}: expected blocks of one shape in the whole checkpoint, found group_size x "
                            f"block_rows of {sorted(shapes)}; such a checkpoint has no single specification")
        shards.add({f"{name}.{key}": tensor for key, tensor in packed.tensors().items()})
        entries[name] = describe(packed)
        matrices[name] = MatrixPlan(packed.row_perm.numpy().astype(np.int64), packed.col_perm.numpy().astype(np.int64),
                                    packed.block_bits.numpy().T)
    quantized, unknown = set(modules), set()
    for name in where:
        module, _, part = name.rpartition(".")
        if module not in quantized:
            shards.add({name: _read(where, name)})
        elif part not in parts:
            unknown.add(part)
    if unknown:
        warnings.warn(f"{', '.join(sorted(unknown))}: tensors of quantized modules that are not known to belong to the "
                      "format were left out", stacklevel=3)
    shards.finish()
    return entries, _plan(matrices, *shapes.pop())


def _plan(matrices, group_size, block_rows) -> Plan:
    """The plan, under the least specification that allows it."""
    levels = tuple(sorted({int(bits) for matrix in matrices.values() for bits in np.unique(matrix.bits)}))
    weights = [matrix.bits.size for matrix in matrices.values()]  # blocks are all whole, so they weigh the same
    mean = sum(int(matrix.bits.sum()) for matrix in matrices.values()) / sum(weights)
    sorted_rows, sorted_columns = (any((getattr(matrix, key) != np.arange(len(getattr(matrix, key)))).any()
                                       for matrix in matrices.values()) for key in ("row_perm", "col_perm"))
    reorder = {(True, True): "both", (True, False): "rows", (False, True): "cols", (False, False): "none"}
    spec = QuantSpec(bpw=round(mean + 32 / group_size, 6), group_size=group_size, block_rows=block_rows, levels=levels,
                     reorder=reorder[sorted_rows, sorted_columns], method="awq")
    return Plan(spec, matrices)


class _Shards:
    """Output files of at most `most` bytes of tensors (or one entry), named as transformers names them."""

    def __init__(self, folder, most):
        self.folder, self.most = folder, most
        self.held, self.bytes, self.total = {}, 0, 0
        self.written: list[list[str]] = []

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self.held and self.bytes + size > self.most:
            self._flush()
        self.held |= tensors
        self.bytes, self.total = self.bytes + size, self.total + size

    def finish(self) -> None:
        """Write what is held, give the files their names and write the index if there are several."""
        self._flush()
        count = len(self.written)
        if count == 1:
            os.replace(self.folder / "part0", self.folder / "model.safetensors")
            return
        index = {}
        for number, names in enumerate(self.written):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            os.replace(self.folder / f"part{number}", self.folder / file)
            index |= dict.fromkeys(names, file)
        record = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(index.items()))}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def _flush(self):
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in self.held.items()},
                  self.folder / f"part{len(self.written)}", metadata={"format": "pt"})
        self.written.append(list(self.held))
        self.held, self.bytes = {}, 0


def _read(where, name) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(where[name], framework="pt") as file:
        return file.get_tensor(name)


def _copy_other_files(source, new):
    """Tokenizer, generation settings, licence; no weights, no card, no program."""
    for path in sorted(source.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in COMPANIONS):
            shutil.copyfile(path, new / path.name)


def _bar(names, show):
    if not show:
        return names
    from tqdm.auto import tqdm

    return tqdm(names, desc="convert", unit="matrix")
