"""Bytes of a finished checkpoint, counted on the files themselves: an independent check of every bpw that
is reported.

Nothing is imported from the packer and no tensor is loaded except the small ones: sizes come from the
safetensors headers.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd

from sfmp.checks import SfmpError

_OVERHEAD = ("row_perm", "col_perm", "block_bits")


def tensor_sizes(folder) -> pd.DataFrame:
    """List every tensor of a checkpoint folder.

    Parameters
    ----------
    folder : path-like
        A Hugging Face folder with one or more ``*.safetensors`` files.

    Returns
    -------
    pandas.DataFrame
        Columns `tensor`, `module`, `part` (last component of the name), `dtype`, `shape`, `bytes`, `file`;
        sorted by name.

    Raises
    ------
    SfmpError
        If the folder holds no safetensors file.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise SfmpError(
            f"{folder}: expected a checkpoint with *.safetensors, found none; run the quantization rule "
            f"first."
        )
    rows = []
    for path in files:
        with open(path, "rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            module, _, part = name.rpartition(".")
            rows.append((name, module, part, entry["dtype"], tuple(entry["shape"]), end - begin, path.name))
    columns = ["tensor", "module", "part", "dtype", "shape", "bytes", "file"]
    return pd.DataFrame(rows, columns=columns).sort_values("tensor", ignore_index=True)


def checkpoint_table(folder) -> pd.DataFrame:
    """Account for every stored byte of the quantized matrices.

    Returns
    -------
    pandas.DataFrame
        One row per quantized matrix: `module, out_features, in_features, weights`, bytes of `planes`,
        `scales` (alpha and beta) and `overhead` (permutations and bit map), and `bpw_stored` = 8 x all
        three / weights. A bias is not a quantized weight and is counted in the model's bytes only.

    Source: DESIGN §2 and §4.
    """
    tensors = tensor_sizes(folder)
    rows = []
    for module, part in tensors[tensors.module.isin(tensors.module[tensors.part == "planes"])].groupby(
        "module"
    ):
        size, shape = part.set_index("part").bytes, part.set_index("part")["shape"]
        out_features, in_features = shape["row_perm"][0], shape["col_perm"][0]
        planes, scales = size["planes"], size["alpha"] + size["beta"]
        overhead = size[size.index.isin(_OVERHEAD)].sum()
        weights = out_features * in_features
        total = planes + scales + overhead
        rows.append(
            (module, out_features, in_features, weights, planes, scales, overhead, 8 * total / weights)
        )
    columns = [
        "module",
        "out_features",
        "in_features",
        "weights",
        "planes",
        "scales",
        "overhead",
        "bpw_stored",
    ]
    return pd.DataFrame(rows, columns=columns)


def quantization_record(folder, plan, run: str) -> dict:
    """Describe one quantized checkpoint; everything in it is deterministic (clocks live elsewhere).

    Parameters
    ----------
    folder : path-like
        The saved checkpoint.
    plan : sfmp.spec.Plan
        The plan it was made from.
    run : str
        Name of the run.

    Returns
    -------
    dict
        `run, bpw` (achieved), `wbits, bpw_tolerance` (one block's largest increment, in bpw), `bpw_stored,
        model_bytes, quantized_weights, plan_hash`, `levels_used` as text.
    """
    table = checkpoint_table(folder)
    weights = int(table.weights.sum())
    levels = plan.spec.candidate_levels
    # the paper's error model is convex, so a step is one level; a measured error can make a block jump
    # several
    jumps = np.diff(levels) if plan.spec.objective == "paper" else np.subtract(levels[-1:], levels[:1])
    step = int(max(jumps, default=0))
    block = plan.spec.block_rows * plan.spec.group_size
    used = sorted({int(b) for matrix in plan.values() for b in np.unique(matrix.bits)})
    stored = table[["planes", "scales", "overhead"]].to_numpy().sum()
    return {
        "run": run,
        "bpw": float(plan.bpw),
        "wbits": float(plan.wbits),
        "bpw_tolerance": step * block / weights + 1e-9,
        "bpw_stored": float(8 * stored / weights),
        "model_bytes": int(tensor_sizes(folder).bytes.sum()),
        "quantized_weights": weights,
        "plan_hash": plan.hash,
        "levels_used": " ".join(map(str, used)),
    }
