"""What a saved checkpoint is made of, read from its files: bit maps, permutations, bytes, plan hash.

Nothing here needs torch: bit maps and permutations are small, planes are never read.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np

from sfmp.checks import SfmpError, check_permutation, integer
from sfmp.grid import BlockGrid

_SMALL = ("block_bits", "row_perm", "col_perm")
_PARTS = ("planes", "alpha", "beta", *_SMALL)
_AGAIN = "download or quantize it again"


@dataclasses.dataclass(frozen=True, eq=False)
class StoredMatrix:
    """One quantized matrix on disk.

    Attributes
    ----------
    shape : (N, K)
    group_size, block_rows : int
    block_bits : uint8 [groups, row_blocks]
    row_perm, col_perm : integers [N], [K]
    nbytes : bytes of its six tensors; a bias is not counted
    """

    shape: tuple[int, int]
    group_size: int
    block_rows: int
    block_bits: np.ndarray
    row_perm: np.ndarray
    col_perm: np.ndarray
    nbytes: int

    @property
    def grid(self) -> BlockGrid:
        return BlockGrid(*self.shape, self.block_rows, self.group_size)

    @cached_property
    def wbits(self) -> float:
        """Mean code bits over the real weights."""
        return float((self.grid.weights * self.block_bits.T).sum() / (self.shape[0] * self.shape[1]))

    @property
    def bpw(self) -> float:
        """``wbits`` + 32/group_size."""
        return self.wbits + 32 / self.group_size

    @property
    def bpw_stored(self) -> float:
        """Bits per weight from every stored byte."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])


@dataclasses.dataclass(frozen=True, eq=False)
class StoredCheckpoint:
    """A checkpoint folder: its ``quantization_config``, its matrices by name, the bytes of all its tensors."""

    folder: Path
    config: Mapping
    matrices: Mapping[str, StoredMatrix]
    model_bytes: int

    def recomputed_hash(self) -> str | None:
        """Plan hash of the stored bit maps and permutations; None where the specification allows no such bits.

        A solver may return other bits than planned, and then the recorded hash is all there is.
        """
        from sfmp.spec import MatrixPlan, Plan, QuantSpec

        try:
            return Plan(QuantSpec.from_dict(self.config["spec"]), {
                name: MatrixPlan(matrix.row_perm, matrix.col_perm, matrix.block_bits.T)
                for name, matrix in self.matrices.items()}).hash
        except SfmpError:
            return None


def read_checkpoint(folder) -> StoredCheckpoint:
    """Read what a checkpoint of this package says about itself and the small tensors that say how it was made.

    Raises
    ------
    SfmpError
        The folder or its config.json is missing, it was not quantized by sfmp, a file is damaged, or a tensor is
        missing, stored twice, of another size than config.json and the bit map say, or no such map or permutation.

    Notes
    -----
    Source: DESIGN.md section 4.
    """
    from sfmp.accounting import tensor_sizes

    folder = Path(folder)
    config = _quantization_config(folder)
    small = _small_tensors(folder, config["modules"])
    sizes = tensor_sizes(folder).set_index("tensor")
    matrices = {}
    for name, entry in config["modules"].items():
        grid = BlockGrid(*entry["shape"], entry["block_rows"], entry["group_size"])
        _check_shapes(folder, name, grid, sizes["shape"], small)
        nbytes = int(sum(sizes["bytes"][f"{name}.{part}"] for part in _PARTS))
        matrices[name] = StoredMatrix(tuple(entry["shape"]), entry["group_size"], entry["block_rows"],
                                      *(small[f"{name}.{part}"] for part in _SMALL), nbytes)
    return StoredCheckpoint(folder, config, matrices, int(sizes["bytes"].sum()))


def _check_shapes(folder, name, grid, shapes, small):
    """Raise SfmpError unless a matrix has its tensors, each as large as config.json and the bit map say."""
    expected = {"block_bits": (grid.groups, grid.row_blocks), "row_perm": (grid.out_features,),
                "col_perm": (grid.in_features,), "alpha": (grid.groups, grid.out_features),
                "beta": (grid.groups, grid.out_features)}
    for part in _PARTS:
        if f"{name}.{part}" not in shapes.index:
            raise SfmpError(f"{folder}: expected the tensor {name}.{part} as config.json says, found none; {_AGAIN}")
        shape = shapes[f"{name}.{part}"]
        if part in expected and shape != expected[part]:
            raise SfmpError(f"{folder}: {name}.{part}: expected shape {expected[part]} as config.json says, found "
                            f"{shape}; {_AGAIN}")
    bits = small[f"{name}.block_bits"].astype(np.int64)
    if bits.min() < 1 or bits.max() > 8:
        raise SfmpError(f"{folder}: {name}.block_bits: expected 1..8, found {bits.min()}..{bits.max()}; {_AGAIN}")
    words = int(bits.sum()) * grid.group_size // 32 * grid.block_rows
    if shapes[f"{name}.planes"] != (words,):
        raise SfmpError(f"{folder}: {name}.planes: expected {words} words as block_bits says, found "
                        f"{shapes[f'{name}.planes']}; {_AGAIN}")
    for part in ("row_perm", "col_perm"):
        check_permutation(f"{folder}: {name}.{part}", small[f"{name}.{part}"])


def _quantization_config(folder: Path) -> dict:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))["quantization_config"]
        known = config["quant_method"] == "sfmp" and isinstance(config["modules"], dict) and config["modules"]
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise SfmpError(f"{folder}: expected a checkpoint quantized by sfmp (config.json with quant_method sfmp), "
                        f"found {'another model' if path.is_file() else 'no config.json'}; give a folder that "
                        "`sfmp quantize` wrote")
    for key, kind in (("spec", dict), ("plan_hash", str), ("source", dict)):
        if not isinstance(config.get(key), kind):
            raise SfmpError(f"{path}: expected quantization_config.{key} ({kind.__name__}), found {config.get(key)!r}; "
                            f"{_AGAIN}")
    for name, entry in config["modules"].items():
        needed = {"shape", "group_size", "block_rows"}
        if not isinstance(entry, dict) or not needed <= set(entry):
            raise SfmpError(f"{path}: expected {', '.join(sorted(needed))} of {name}, found {entry!r}; {_AGAIN}")
        shape, group_size = entry["shape"], entry["group_size"]
        if not isinstance(shape, list) or len(shape) != 2:
            raise SfmpError(f"{path}: {name}.shape: expected [rows, columns], found {shape!r}; {_AGAIN}")
        for key, value in (("shape", shape[0]), ("shape", shape[1]), ("block_rows", entry["block_rows"]),
                           ("group_size", group_size)):
            integer(f"{path}: {name}.{key}", value, 1)
        if group_size % 32:
            raise SfmpError(f"{path}: {name}.group_size: expected a multiple of 32, found {group_size}; {_AGAIN}")
    return config


def _small_tensors(folder, modules) -> dict[str, np.ndarray]:
    """Bit maps and permutations by tensor name, from files that are whole and hold each tensor once."""
    from safetensors import SafetensorError, safe_open

    found, places = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np") as opened:
                for name in opened.keys():
                    if name in places:
                        raise SfmpError(f"{folder}: expected each tensor once, found {name} in {places[name]} and "
                                        f"{path.name}; remove the file that does not belong")
                    places[name] = path.name
                    module, _, part = name.rpartition(".")
                    if module in modules and part in _SMALL:
                        found[name] = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise SfmpError(f"{path}: expected a complete safetensors file, found a damaged one ({error}); "
                            f"{_AGAIN}") from error
    return found


def byte_table(checkpoint: StoredCheckpoint):
    """Exact bytes of the tensors on disk: pandas Series by part, counted from the files' headers.

    ``planes``, ``scales`` (alpha and beta), ``overhead`` (permutations and bit maps), their sum ``quantized
    matrices``, ``other tensors`` (embeddings, norms, biases, what was skipped) and ``all tensors``.
    """
    import pandas as pd

    from sfmp.accounting import checkpoint_table

    table = checkpoint_table(checkpoint.folder)[["planes", "scales", "overhead"]].sum()
    quantized = int(table.sum())
    return pd.Series({**table.astype(int).to_dict(), "quantized matrices": quantized,
                      "other tensors": checkpoint.model_bytes - quantized, "all tensors": checkpoint.model_bytes})


def summary(checkpoint: StoredCheckpoint) -> dict:
    """Everything `sfmp inspect` prints, as JSON types."""
    from sfmp.layer_bits import bits_frame

    matrices = checkpoint.matrices.values()
    weights = [m.shape[0] * m.shape[1] for m in matrices]
    total = sum(weights)
    mean = {key: sum(getattr(m, key) * count for m, count in zip(matrices, weights, strict=True)) / total
            for key in ("wbits", "bpw", "bpw_stored")}
    recomputed = checkpoint.recomputed_hash()
    recorded = checkpoint.config.get("plan_hash")
    return {"folder": str(checkpoint.folder), "source": checkpoint.config.get("source"),
            "spec": checkpoint.config.get("spec"), "matrices": len(weights), "weights": total, **mean,
            "bytes": {key: int(value) for key, value in byte_table(checkpoint).items()},
            "plan_hash": recorded, "plan_hash_confirmed": None if recomputed is None else recomputed == recorded,
            "bits": bits_frame(checkpoint.matrices).to_dict("records")}
