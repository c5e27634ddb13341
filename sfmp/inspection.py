"""What a saved checkpoint is made of, read from its files: bits by layer and projection, bytes, plan hash.

Nothing here needs torch: bit maps and permutations are small, planes are never read.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np

from sfmp.checks import SfmpError
from sfmp.grid import BlockGrid

_SMALL = ("block_bits", "row_perm", "col_perm")


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
        The folder or its config.json is missing, it was not quantized by sfmp, or a tensor is missing or has
        another size than config.json says.

    Notes
    -----
    Source: DESIGN.md section 4.
    """
    from sfmp.accounting import tensor_sizes

    folder = Path(folder)
    config = _quantization_config(folder)
    sizes = tensor_sizes(folder).set_index("tensor")
    small = _small_tensors(folder, sizes, config["modules"])
    parts = ("planes", "alpha", "beta", *_SMALL)
    matrices = {}
    for name, entry in config["modules"].items():
        grid = BlockGrid(*entry["shape"], entry["block_rows"], entry["group_size"])
        expected = {"block_bits": (grid.groups, grid.row_blocks), "row_perm": (grid.out_features,),
                    "col_perm": (grid.in_features,)}
        for part in parts:
            if f"{name}.{part}" not in sizes.index:
                raise SfmpError(f"{folder}: expected the tensor {name}.{part} as config.json says, found none; "
                                "download or quantize it again")
            shape = sizes["shape"][f"{name}.{part}"]
            if part in expected and shape != expected[part]:
                raise SfmpError(f"{folder}: {name}.{part}: expected shape {expected[part]} as config.json says, found "
                                f"{shape}; download or quantize it again")
        nbytes = int(sum(sizes["bytes"][f"{name}.{part}"] for part in parts))
        matrices[name] = StoredMatrix(tuple(entry["shape"]), entry["group_size"], entry["block_rows"],
                                      *(small[f"{name}.{part}"] for part in _SMALL), nbytes)
    return StoredCheckpoint(folder, config, matrices, int(sizes["bytes"].sum()))


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
    needed = {"shape", "group_size", "block_rows"}
    for name, entry in config["modules"].items():
        if not isinstance(entry, dict) or not needed <= set(entry):
            raise SfmpError(f"{path}: expected {', '.join(sorted(needed))} of {name}, found {entry!r}; download or "
                            "quantize it again")
    return config


def _small_tensors(folder, sizes, modules) -> dict[str, np.ndarray]:
    """Bit maps and permutations by tensor name."""
    from safetensors import SafetensorError, safe_open

    found = {}
    for file, rows in sizes.groupby("file"):
        parts = {name: name.rpartition(".") for name in rows.index}
        wanted = [name for name, (module, _, part) in parts.items() if module in modules and part in _SMALL]
        try:
            with safe_open(folder / file, framework="np") as opened:
                found |= {name: opened.get_tensor(name) for name in wanted}
        except SafetensorError as error:
            raise SfmpError(f"{folder / file}: expected a complete safetensors file, found a damaged one ({error}); "
                            "download or quantize it again") from error
    return found


def bits_frame(matrices: Mapping):
    """Mean code bits of every matrix.

    Parameters
    ----------
    matrices : mapping of name to StoredMatrix or PackedMatrix

    Returns
    -------
    pandas.DataFrame
        `name, layer` (first number in the name, or –), `projection` (last component without ``_proj``), `weights`,
        `bits`; in reading order, as `sfmp.plots_pipeline.bits_by_layer` draws it.
    """
    import pandas as pd

    rows = []
    for name in sorted(matrices, key=lambda n: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", n)]):
        layer = next((part for part in name.split(".") if part.isdigit()), "–")
        rows.append((name, layer, name.rsplit(".", 1)[-1].removesuffix("_proj"),
                     matrices[name].shape[0] * matrices[name].shape[1], matrices[name].wbits))
    return pd.DataFrame(rows, columns=["name", "layer", "projection", "weights", "bits"])


def bits_by_layer_table(frame):
    """Mean code bits, one row per layer and one column per projection, with an ``all`` of each.

    Parameters
    ----------
    frame : pandas.DataFrame
        `bits_frame`.

    Returns
    -------
    pandas.DataFrame
        Means are weighted by real weights; NaN where a layer has no such projection.
    """
    import pandas as pd

    everything = [frame, frame.assign(projection="all"), frame.assign(layer="all"),
                  frame.assign(layer="all", projection="all")]
    long = pd.concat(everything, ignore_index=True)
    long["total"] = long.bits * long.weights
    sums = long.groupby(["layer", "projection"], sort=False)[["total", "weights"]].sum()
    table = (sums.total / sums.weights).unstack()
    layers, projections = ([*dict.fromkeys(frame[key]), "all"] for key in ("layer", "projection"))
    return table.loc[layers, projections]


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


def save_picture(checkpoint: StoredCheckpoint, path) -> None:
    """Draw mean bits by layer and projection into an image file (its suffix names the format), atomically."""
    from matplotlib import pyplot as plt

    from sfmp.checks import write_atomically
    from sfmp.plots_pipeline import bits_by_layer

    kind = Path(path).suffix.removeprefix(".").lower()
    figure = bits_by_layer(bits_frame(checkpoint.matrices))
    try:
        if kind not in figure.canvas.get_supported_filetypes():
            raise SfmpError(f"{path}: expected a picture such as FILE.png, .pdf or .svg, found suffix {kind!r}")
        write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=200, bbox_inches="tight"))
    finally:
        plt.close(figure)
