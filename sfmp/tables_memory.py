"""Tables of memory, from the one JSON file of ``python -m sfmp.bench memory``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from sfmp.checks import SfmpError

ALLOWED = 4e9  # bytes above the size of the model that the design allows on a machine with 24 GB


def read_memory(path: Path | str) -> dict:
    """Read a result of the memory bench.

    Raises
    ------
    SfmpError
        The file is no such result, or no model went the whole way in it.
    """
    try:
        bench = json.loads(Path(path).read_text())
        kind, whole, count = bench["kind"], bench["whole"], len(bench["sizes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SfmpError(f"{path}: expected a result of `python -m sfmp.bench memory`, found {error!r}; measure again: "
                        f"`python -m sfmp.bench memory --out {path}`") from error
    wanted = f"{path}: expected several sizes and one whole run of `python -m sfmp.bench memory`, found"
    if kind != "memory" or not whole:
        raise SfmpError(f"{wanted} the kind {kind!r}, {count} sizes and {'a' if whole else 'no'} whole run; measure "
                        f"again: `python -m sfmp.bench memory --out {path}`")
    if not count or "repeats" not in bench or "commit" not in whole:
        raise SfmpError(f"{wanted} {count} sizes, perhaps of an earlier form without repeats and commits; measure them "
                        f"again: `python -m sfmp.bench memory --out {path} --whole keep`")
    return bench


def conditions(bench: Mapping) -> pd.DataFrame:
    """Where and how it was measured: columns `what`, `value`."""
    machine, whole = bench["machine"], bench["whole"]
    named = {
        "processor": machine["cpu"], "memory": f"{machine['memory_bytes'] / 2**30:.0f} GB", "date": bench["date"],
        "commit": bench["commit"], "uncommitted changes": bench.get("dirty"),
        **{name: bench["versions"].get(name) for name in ("python", "torch", "transformers")},
        "method": bench["method"], "calibration": _calibration(bench),
        "sizes": f"medians of {bench['repeats']} processes",
        "whole run": f"{whole['size']}, vocabulary {whole['vocabulary']}, {whole['bpw']:g} bpw",
        "whole run method": whole["method"], "whole run calibration": _calibration(whole),
        "whole run date": whole["date"], "whole run commit": whole["commit"],
        "whole run uncommitted changes": whole.get("dirty"),
    }
    return pd.DataFrame({"what": list(named), "value": [str(value) for value in named.values()]})


def _calibration(run):
    return f"{run['windows']} windows of {run['seqlen']} tokens"


def sizes(bench: Mapping) -> pd.DataFrame:
    """One row per model that was quantized, in bytes.

    Columns `size`, `model`, `layer`, `imports`, `peak`, `lowest`, `highest`, `above_imports`.

    `peak` is the median of several processes, `lowest` and `highest` theirs. `imports` was resident before work began,
    so `above_imports` is what the work took.
    """
    table = pd.DataFrame(bench["sizes"])
    return table.drop(columns="peaks").assign(lowest=table.peaks.map(min), highest=table.peaks.map(max),
                                              above_imports=table.peak - table.imports)


def depth(bench: Mapping) -> pd.DataFrame:
    """One row: what more layers of one width added to the weights and to the peak, in bytes.

    A peak of "one layer and activations" would not grow. `allowed` is one layer in float32, `within` whether that
    holds of the medians. `added_lowest` and `added_highest` are the smallest and largest differences of two processes.
    """
    by_width = {}
    for row in bench["sizes"]:
        width, layers = row["size"].rsplit("x", 1)
        by_width.setdefault(width, []).append((int(layers), row))
    found = next((rows for rows in by_width.values() if len(rows) > 1), None)
    if found is None:
        raise SfmpError(f"sizes: expected two depths of one width, found {[row['size'] for row in bench['sizes']]}; "
                        "measure again without --sizes")
    found.sort(key=lambda pair: pair[0])
    (few, shallow), (many, deep) = found[0], found[-1]
    added, allowed = deep["peak"] - shallow["peak"], 2 * shallow["layer"]
    lowest, highest = min(deep["peaks"]) - max(shallow["peaks"]), max(deep["peaks"]) - min(shallow["peaks"])
    return pd.DataFrame([{"shallow": shallow["size"], "deep": deep["size"], "added_layers": many - few,
                          "added_weights": deep["model"] - shallow["model"], "added_peak": added,
                          "added_lowest": lowest, "added_highest": highest, "allowed": allowed,
                          "within": added <= allowed}])


def steps(bench: Mapping) -> pd.DataFrame:
    """One row per process of the whole run: `step`, `peak` (bytes), `limit` (model + `ALLOWED`), `within`."""
    whole = bench["whole"]
    table = pd.DataFrame(whole["steps"])[["step", "seconds", "peak"]]
    limit = int(whole["model"] + ALLOWED)
    return table.assign(model=whole["model"], limit=limit, within=table.peak <= limit)


def exact_bytes(bench: Mapping) -> pd.DataFrame:
    """One row: what the files of the whole run's checkpoint should hold, and do, in bytes; what resuming kept.

    `quantized_matrices` is `bpw_stored` × weights / 8; `expected` adds the tensors that were not quantized; `payload`
    was counted in the safetensors files, headers left out. `same` compares an unbroken run's files (empty if there was
    none).
    """
    whole = bench["whole"]
    matrices = round(whole["bpw_stored"] * whole["weights"] / 8)
    expected = matrices + whole["not_quantized"]
    return pd.DataFrame([{
        "weights": whole["weights"], "bpw_stored": whole["bpw_stored"], "quantized_matrices": matrices,
        "not_quantized": whole["not_quantized"], "expected": expected, "payload": whole["quantized"],
        "equal": expected == whole["quantized"], "layers_at_kill": whole["layers_at_kill"],
        "layers_kept": whole["layers_kept"], "same": whole["same"]}])
