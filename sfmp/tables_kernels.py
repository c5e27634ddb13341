"""Tables of kernels on the CPU, from the one JSON file of ``python -m sfmp.bench cpu``.

A time is the median of the counted samples; a ratio of two candidates is the median over rounds of their ratio in the
same round, so that what disturbs a round cancels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from sfmp.bench.timing import median, ratio
from sfmp.checks import SfmpError

DENSE = ("torch bfloat16", "torch float32")
#: what the design asks of one token, 512 × 128 blocks, two threads, cold weights: mode, against whom, least by bits
TARGETS = (
    ("share of the roof", "lut8", "of_roof", {2: 0.85, 3: 0.85, 4: 0.85}),
    ("lut8 / torch bfloat16", "lut8", "times_bfloat16", {2: 8.5, 3: 6.0, 4: 4.8}),
    ("lut16 / torch bfloat16", "lut16", "times_bfloat16", {2: 7.8, 3: 5.5, 4: 4.1}),
    ("exact / torch bfloat16", "exact", "times_bfloat16", {2: 6.5, 3: 4.7, 4: 3.6}),
    ("lut8 / onnxruntime", "lut8", "times_onnxruntime", {2: 1.4, 4: 1.2}),
)
BATCH_TARGET = ("lut8 / torch bfloat16, 8 tokens", {2: 4.5, 3: 3.2, 4: 2.4})
LEAST_R2 = 0.99
LEAST_ROUNDS = 9


def read_bench(path: Path | str) -> dict:
    """Read a result of the CPU bench.

    Raises
    ------
    SfmpError
        The file is no such result, or a part of it failed.
    """
    try:
        bench = json.loads(Path(path).read_text())
        kind, parts = bench["kind"], bench["parts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SfmpError(f"{path}: expected a result of `python -m sfmp.bench cpu`, found {error!r}; measure again"
                        ) from error
    if kind != "cpu":
        raise SfmpError(f"{path}: expected the kind cpu, found {kind!r}; use the file of `python -m sfmp.bench cpu`")
    failed = [part["part"] for part in parts if "failed" in part]
    if failed:
        raise SfmpError(f"{path}: expected every part, but {', '.join(failed)} failed; measure again")
    return bench


def conditions(bench: Mapping) -> pd.DataFrame:
    """Where and how it was measured: columns `what`, `value`."""
    machine, versions = bench["machine"], bench["versions"]
    kept = ("python", "torch", "numba", "llvmlite", "numpy", "onnxruntime", "openvino", "transformers")
    named = {
        "processor": machine["cpu"], "memory": f"{machine['memory_bytes'] / 2**30:.0f} GB",
        "quick": "yes: not to be quoted" if bench["rounds"]["product"] < LEAST_ROUNDS else "no",
        "threads": bench["threads"], "kernels": bench["kernels"], "date": bench["date"],
        "commit": bench["commit"], "rounds": ", ".join(f"{k} {v}" for k, v in bench["rounds"].items()),
        **{name: versions.get(name) or "not installed" for name in kept},
    }
    return pd.DataFrame({"what": list(named), "value": [str(value) for value in named.values()]})


def _parts(bench, name):
    found = [part for part in bench["parts"] if part["part"] == name]
    if not found:
        raise SfmpError(f"bench: expected the part {name}, found {sorted({p['part'] for p in bench['parts']})}; "
                        "measure without --parts")
    return found


def _shape(part):
    return "×".join(map(str, part["shape"]))


def _described(row):
    """What a table says of a candidate beside its ratios."""
    cold, warm = median(row["cold"]), median(row["warm"])
    counted = [sample for sample in row["cold"] if sample is not None]
    spread = np.percentile(counted, [10, 90]) if counted else (np.nan, np.nan)
    return {
        "name": row["name"], "family": row["family"], "mode": row.get("mode"), "bits": row.get("bits"),
        "mixed": row.get("mixed", False), "natural": row.get("natural", False),
        "weight_bytes": row["weight_bytes"], "cold_us": cold, "cold_us_p10": spread[0], "cold_us_p90": spread[1],
        "warm_us": warm, "gigabytes_per_second": row["weight_bytes"] / cold / 1e3 if cold else None,
        "error": row["error"], "counted": len(counted),
    }


def _roofs(rows):
    """bits → samples of the faster way of reading the bytes of that many bits."""
    found = {}
    for row in rows:
        if row["family"] == "roof":
            bits, time = float(row["bits"]), median(row["cold"])
            if time is not None and (bits not in found or time < median(found[bits])):
                found[bits] = row["cold"]
    return found


def _best(rows, family, bits):
    """Samples of the fastest candidate of a family at a bit-width, or None."""
    candidates = [row["cold"] for row in rows if row["family"] == family and row.get("bits") == bits]
    return min((samples for samples in candidates if median(samples) is not None), key=median, default=None)


def products(bench: Mapping) -> pd.DataFrame:
    """One token: every candidate of every shape.

    Returns
    -------
    pandas.DataFrame
        `shape, name, family, mode, bits, mixed, natural, weight_bytes, cold_us` with its 10th and 90th percentile,
        `warm_us, gigabytes_per_second, error, counted`, and how many times as fast as others: `of_roof` (reading the
        bytes of our weights of the same bits, and no more), `times_bfloat16`, `times_float32` (torch),
        `times_onnxruntime` (its fastest at the
        same bits). Microseconds per product; "cold": weights come from memory; "warm": from cache.
    """
    found = []
    for part in _parts(bench, "product"):
        rows = part["rows"]
        roofs, by_name = _roofs(rows), {row["name"]: row for row in rows}
        for row in rows:
            against = {
                "of_roof": roofs.get(round(float(row["bits"]), 3)) if row["family"] != "roof" else None,
                **{f"times_{name.split()[1]}": by_name[name]["cold"] for name in DENSE},
                "times_onnxruntime": _best(rows, "onnxruntime", round(float(row["bits"]), 3)),
            }
            ratios = {column: None if other is None else ratio(other, row["cold"]) for column, other in against.items()}
            found.append({"shape": _shape(part), **_described(row), **ratios})
    return pd.DataFrame(found)


def absent_peers(bench: Mapping) -> pd.DataFrame:
    """Peers that could not be measured, and why: `name`, `why`."""
    found = {name: why for part in bench["parts"] for name, why in (part.get("absent") or {}).items()}
    return pd.DataFrame({"name": list(found), "why": list(found.values())})


def fits(table: pd.DataFrame) -> pd.DataFrame:
    """Straight lines through time against mean bits, of matrices with one or two neighbouring widths.

    Returns
    -------
    pandas.DataFrame
        `shape, mode, fixed_us, us_per_bit, r2`, and `mixed_speed`: fitted over measured time of the matrix of 2-, 3-
        and 4-bit blocks, which is not part of the fit.
    """
    ours, found = table[(table.family == "sfmp") & ~table.natural], []
    for (shape, mode), rows in ours.groupby(["shape", "mode"], sort=False):
        plain, mixed = rows[~rows.mixed], rows[rows.mixed]
        slope, fixed = np.polyfit(plain.bits.astype(float), plain.cold_us, 1)
        left = plain.cold_us - (fixed + slope * plain.bits)
        r2 = 1 - (left**2).sum() / ((plain.cold_us - plain.cold_us.mean()) ** 2).sum()
        expected = fixed + slope * mixed.bits
        found.append({"shape": shape, "mode": mode, "fixed_us": fixed, "us_per_bit": slope, "r2": r2,
                      "mixed_speed": float((expected / mixed.cold_us).mean())})
    return pd.DataFrame(found)


def reordering(bench: Mapping) -> pd.DataFrame:
    """What both permutations cost: `shape, mode, speed_kept`, time in natural order over time in permuted order."""
    found = []
    for part in _parts(bench, "product"):
        rows = {(row.get("mode"), row.get("natural")): row["cold"] for row in part["rows"]
                if row["family"] == "sfmp" and row["bits"] == 3 and not row["mixed"]}
        found += [{"shape": _shape(part), "mode": mode, "speed_kept": ratio(rows[mode, True], rows[mode, False])}
                  for mode in dict.fromkeys(mode for mode, _ in rows)]
    return pd.DataFrame(found)


def batches(bench: Mapping) -> pd.DataFrame:
    """Several tokens: as :func:`products`, with `tokens`, `way` (tables or panels), `us_per_token` and
    `times_bfloat16`.
    """
    found = []
    for part in sorted(_parts(bench, "batch"), key=lambda part: part["batch"]):
        dense = next(row["cold"] for row in part["rows"] if row["name"] == DENSE[0])
        for row in part["rows"]:
            described = _described(row)
            del described["mixed"], described["natural"]
            per_token = None if described["cold_us"] is None else described["cold_us"] / part["batch"]
            found.append({"shape": _shape(part), "tokens": part["batch"], **described, "way": row.get("way"),
                          "us_per_token": per_token, "times_bfloat16": ratio(dense, row["cold"])})
    return pd.DataFrame(found)


def crossovers(table: pd.DataFrame) -> pd.DataFrame:
    """Up to how many of the measured tokens our kernels are faster than torch bfloat16, and than their own panels.

    Returns
    -------
    pandas.DataFrame
        `mode, bits, faster_than_bfloat16, faster_than_panels, measured`: numbers of tokens, `measured` the largest
        batch of the bench; and `crossed`, whether torch bfloat16 is faster at some larger one of them.
    """
    ours, found = table[table.family == "sfmp"], []
    for (mode, bits), rows in ours.groupby(["mode", "bits"], sort=False):
        tables = rows[rows.way == "tables"].set_index("tokens")
        panels = rows[rows.way == "panels"].set_index("tokens")
        found.append({"mode": mode, "bits": bits, "faster_than_bfloat16": _up_to(tables.times_bfloat16 > 1),
                      "faster_than_panels": _up_to(tables.cold_us < panels.cold_us),
                      "measured": int(rows.tokens.max())})
    frame = pd.DataFrame(found)
    return frame.assign(crossed=frame.faster_than_bfloat16 < frame.measured)


def _up_to(faster: pd.Series) -> int:
    """The last of the tokens up to which all are true; 0 if the first is not."""
    kept = faster.sort_index().cummin()
    return int(kept.index[kept].max()) if kept.any() else 0


def widths(bench: Mapping) -> pd.DataFrame:
    """Tables over 2, 4 and 8 activations in plain Numba, and the product's exact mode: as :func:`products`, with
    `table_bytes` and `times_float32`.
    """
    found = []
    for part in _parts(bench, "width"):
        dense = next(row["cold"] for row in part["rows"] if row["name"] == DENSE[1])
        for row in part["rows"]:
            described = _described(row)
            del described["mixed"], described["natural"]
            found.append({"shape": _shape(part), **described, "table_bytes": row.get("table_bytes"),
                          "times_float32": ratio(dense, row["cold"])})
    return pd.DataFrame(found)


def accuracy(bench: Mapping) -> pd.DataFrame:
    """Errors of the modes: `mode, bits, activations, dtype, error`."""
    return pd.DataFrame([row for part in _parts(bench, "accuracy") for row in part["rows"]])


def decoding(bench: Mapping) -> pd.DataFrame:
    """Tokens per second of generate: the rows of :func:`sfmp.bench.decode.measure_decode`, with `times_bf16` and
    `times_fp32` from steps of the same round.
    """
    found = []
    for part in _parts(bench, "decode"):
        steps = {row["weights"]: row["steps"] for row in part["rows"]}
        for row in part["rows"]:
            kept = {key: value for key, value in row.items() if key != "steps"}
            times = {f"times_{name}": ratio(steps[f"torch {name}"], row["steps"]) for name in ("bf16", "fp32")}
            found.append({**kept, "bpw": row["bpw"], **times})
    return pd.DataFrame(found)


def targets(table: pd.DataFrame, batched: pd.DataFrame, lines: pd.DataFrame) -> pd.DataFrame:
    """What the design asks for, beside what was measured.

    Returns
    -------
    pandas.DataFrame
        `target, shape, bits, required, measured, margin` (measured / required, so at least 1 is kept).
    """
    found = []
    ours = table[(table.family == "sfmp") & ~table.mixed & ~table.natural]
    for name, mode, column, least in TARGETS:
        for row in ours[ours["mode"] == mode].itertuples():
            if row.bits in least:
                found.append((name, row.shape, f"{row.bits:g}", least[row.bits], getattr(row, column)))
    name, least = BATCH_TARGET
    rows = batched[(batched["mode"] == "lut8") & (batched.way == "tables") & (batched.tokens == 8)]
    found += [(name, row.shape, f"{row.bits:g}", least[row.bits], row.times_bfloat16) for row in rows.itertuples()]
    found += [(f"{row.mode} linear in bits (R²)", row.shape, "2 to 4", LEAST_R2, row.r2) for row in lines.itertuples()]
    frame = pd.DataFrame(found, columns=["target", "shape", "bits", "required", "measured"])
    return frame.assign(margin=frame.measured.astype(float) / frame.required)
