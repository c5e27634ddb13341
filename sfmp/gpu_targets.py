"""What is asked of the GPU kernels, beside what was measured; and what a model of the memory predicts.

A prediction is never a result: it is the time of the bytes at the bandwidth that an H200 is assumed to have, and a
launch. The targets are those of issue 5.

Source: CUDA.md sections 3.3 and 6.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from sfmp.bench.gpu_model import packed_bytes, predicted_us
from sfmp.tables_gpu import ours

ASSUMED_COPY_GBPS = 4300  # of an H200, from CUDA.md; a bench measures its own
BITS = (2.0, 2.5, 3.0, 3.5, 4.0)
SHAPES = {  # out × in → for 3 bits and one token: mma share of a copy, mma and lut times torch float16
    (4096, 4096): (0.40, 2.8, 1.5),
    (14336, 4096): (0.66, 3.9, 2.5),
    (4096, 14336): (0.66, 3.9, 2.5),
    (28672, 8192): (0.83, 4.6, 3.0),
}
SHARE, MMA, LUT = ("mma at 3 bits: share of a copy's bandwidth", "mma at 3 bits: times torch float16",
                   "lut at 3 bits: times torch float16")
DECODE, DECODE_LEAST = "decode at 3 bits: times torch float16, both under CUDA graphs", 2.5
DECODE_MODEL = "llama-3.1-8b"
DECODE_BPW = (3.0, 3.25)  # 3 bits with their scales, or without
INT4 = {4: ("mma at 4 bits: times the fastest peer with 4 bits", 1.0),
        3: ("mma at 3 bits: times the fastest peer with 4 bits", 1.2),
        2: ("mma at 2 bits: times the fastest peer with 4 bits", 1.2)}
ERROR, ERROR_MOST = "relative error of float16 results", 1e-3
HOST, HOST_MOST = "host time of a call, µs", 5.0
CALL = "kernels_numba.matmul"
COLUMNS = ["target", "of", "device", "required", "measured", "margin"]


def predictions(shapes=tuple(SHAPES), bits=BITS, copy_gbps: float = ASSUMED_COPY_GBPS) -> pd.DataFrame:
    """Times of one token that the memory of an H200 allows, as the bench predicts them; nothing here is measured.

    Returns
    -------
    pandas.DataFrame
        `shape, bits, packed_bytes, predicted_us, predicted_float16_us, predicted_times_fp16, predicted_of_copy,
        assumed_copy_gbps`.
    """
    found = []
    for rows, columns in shapes:
        dense = predicted_us(2 * rows * columns, copy_gbps, dense=True)
        for mean in bits:
            size = packed_bytes(rows, columns, mean)
            time = predicted_us(size, copy_gbps)
            found.append({"shape": f"{rows}×{columns}", "bits": mean, "packed_bytes": int(size), "predicted_us": time,
                          "predicted_float16_us": dense, "predicted_times_fp16": dense / time,
                          "predicted_of_copy": size / time / 1e3 / copy_gbps, "assumed_copy_gbps": copy_gbps})
    return pd.DataFrame(found)


def targets(products: pd.DataFrame, errors: pd.DataFrame, decoded: pd.DataFrame, host: pd.DataFrame,
            conditions: pd.DataFrame) -> pd.DataFrame:
    """What was asked for; `device`, `measured` and `margin` are empty where nothing was measured.

    Parameters
    ----------
    products, errors, decoded, host : pandas.DataFrame
        Of :mod:`sfmp.tables_gpu`: `products`, `accuracy`, `decoding`, `host`.
    conditions : pandas.DataFrame
        :func:`sfmp.gpu_evidence.conditions`: names the device.

    Returns
    -------
    pandas.DataFrame
        `target, of, device, required, measured, margin`: a margin of at least 1 is a target that is kept. Times are of
        permuted matrices of blocks in float16; of several rows the worst counts.
    """
    rows = ours(products)
    rows = rows[rows.dtype == "float16"]
    found = []
    for (out_features, in_features), (share, mma, lut) in SHAPES.items():
        shape = f"{out_features}×{in_features}"
        for name, mode, column, least in ((SHARE, "mma", "of_copy", share), (MMA, "mma", "times_fp16", mma),
                                          (LUT, "lut", "times_fp16", lut)):
            found.append((name, shape, least, _worst(rows, shape, mode, 3, column)))
        found += [(name, shape, least, _worst(rows, shape, "mma", bits, "times_int4"))
                  for bits, (name, least) in INT4.items()]
    found.append((DECODE, "Llama-3.1-8B", DECODE_LEAST, _decoded(decoded)))
    least = pd.DataFrame(found, columns=["target", "of", "required", "measured"]).astype({"measured": float})
    most = []
    for mode in ("mma", "lut"):
        # A result that is no finite number has no error: it counts as wrong without bound.
        wrong = [frame.error[(frame["mode"] == mode) & (frame.dtype == "float16") & own].fillna(np.inf).astype(float)
                 for frame, own in ((errors, True), (products, products.family == "sfmp"))]
        called = host.host_us[host.call == f"{CALL} {mode}"].astype(float)
        most += [(ERROR, mode, ERROR_MOST, pd.concat(wrong).max()), (HOST, mode, HOST_MOST, called.max())]
    limits = pd.DataFrame(most, columns=["target", "of", "required", "measured"]).astype({"measured": float})
    least["margin"], limits["margin"] = least.measured / least.required, limits.required / limits.measured
    result = pd.concat([least, limits], ignore_index=True)
    devices = conditions[conditions.what == "device"].set_index("file").value
    files = result.target.map({DECODE: "decode"}).fillna("kernels")
    result["device"] = files.map(devices.get)
    return result[COLUMNS]


def _worst(rows, shape, mode, bits, column):
    near = rows.bits.astype(float).round(2) == bits
    found = rows[(rows["shape"] == shape) & (rows["mode"] == mode) & near][column].dropna()
    return float(found.min()) if len(found) else None


def _decoded(decoded):
    """Best of our rows of the whole 8B model at 3 bits under a graph: fused or not, compiled by torch or not."""
    mine = decoded[decoded.weights.astype(str).str.startswith("sfmp") & decoded.bpw.isin(DECODE_BPW)
                   & (decoded.layers == decoded.full_layers)
                   & decoded.model.astype(str).str.lower().str.contains(DECODE_MODEL, regex=False)]
    found = mine.times_fp16.dropna().astype(float)
    return float(found.max()) if len(found) else None
