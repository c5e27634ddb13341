"""Tables of kernels on a GPU, from what `gpu_evidence` reads.

Without a file its tables have their columns and no rows: nothing stands in for a measurement. A time is the median of
its samples, microseconds of one product in a replayed graph; a ratio of two candidates is the median over rounds of
their ratio in the same round.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from sfmp.bench.timing import median, ratio
from sfmp.gpu_evidence import rows_of, shape_of

DENSE_BITS = 16
OWN_GATHERS = ("fused", "own kernel")  # not torch around the product; where a matrix was measured with both, the first
WORDS = {"shape", "name", "family", "mode", "layout", "gather", "dtype", "way", "activations", "model", "weights"}
FLAGS = {"natural", "fused", "graph", "compiled", "random"}
SHOWN = ["shape", "tokens", "name", "family", "mode", "bits", "layout", "natural", "gather", "dtype", "us", "us_p10",
         "us_p90", "eager_us", "host_us", "packed_bytes", "gigabytes_per_second", "of_copy", "times_fp16", "times_int4",
         "predicted_us", "of_predicted", "error", "samples"]
FITS = ["shape", "mode", "dtype", "fixed_us", "us_per_bit", "r2", "mixed_speed"]
LAYOUTS = ["shape", "mode", "dtype", "bits", "blocks_us", "columns_us", "columns_over_blocks"]
REORDERING = ["shape", "mode", "dtype", "bits", "gather", "natural_us", "us", "speed_kept", "used"]
CROSSOVERS = ["shape", "way", "bits", "faster_than_fp16", "fastest_way", "measured", "crossed"]
WIDTHS = [*SHOWN, "table_width", "group_size", "table_bytes"]
ACCURACY = ["shape", "mode", "bits", "dtype", "activations", "error"]
DECODING = ["model", "weights", "bpw", "fused", "graph", "compiled", "random", "layers", "full_layers",
            "tokens_per_second", "times_fp16", "gigabytes_per_second", "weight_bytes", "peak_bytes", "samples"]


def _described(evidence, part, row, rows):
    """What a table says of a candidate; `rows` are those of the same shape and tokens."""
    samples = row["samples_us"]
    time = median(samples)
    spread = np.percentile(samples, [10, 90]) if samples else (np.nan, np.nan)
    copy = (evidence["kernels"].get("ceilings") or {}).get("copy_gbps")
    speed = row["packed_bytes"] / time / 1e3 if time and row.get("packed_bytes") else None
    predicted = row.get("predicted_us")
    kept = ("name", "family", "mode", "bits", "layout", "gather", "dtype", "eager_us", "host_us", "packed_bytes",
            "error")
    return {
        "shape": shape_of(part), "tokens": row.get("tokens", part.get("tokens")),
        **{column: row.get(column) for column in kept}, "natural": bool(row.get("natural", False)),
        "us": time, "us_p10": spread[0], "us_p90": spread[1], "gigabytes_per_second": speed,
        "of_copy": speed / copy if speed and copy else None,
        "times_fp16": _over(_dense(rows), samples), "times_int4": _over(_int4(rows), samples),
        "predicted_us": predicted, "of_predicted": time / predicted if time and predicted else None,
        "samples": len(samples),
    }


def _over(slow, fast):
    return None if slow is None or len(slow) != len(fast) else ratio(slow, fast)


def _dense(rows):
    """Samples of torch with float16 weights, or None."""
    return next((row["samples_us"] for row in rows if row["family"] == "torch" and row.get("dtype") == "float16"
                 and row.get("bits") == DENSE_BITS), None)


def _int4(rows):
    """Samples of the fastest peer with 4-bit weights, or None."""
    peers = [row["samples_us"] for row in rows if row["family"] != "sfmp" and row.get("bits") == 4]
    return min((samples for samples in peers if samples), key=median, default=None)


def _frame(rows, columns):
    """A frame with these columns; numbers stay numbers where there are no rows."""
    frame = pd.DataFrame(rows).reindex(columns=columns)
    return frame.astype({column: float for column in columns if column not in WORDS and column not in FLAGS})


def _table(evidence, name, columns):
    found = []
    for part, rows in rows_of(evidence, name):
        for row in rows:
            tokens = row.get("tokens", part.get("tokens"))
            beside = [other for other in rows if other.get("tokens", part.get("tokens")) == tokens]
            extra = {column: row.get(column) for column in columns if column not in SHOWN}
            found.append({**_described(evidence, part, row, beside), **extra})
    return _frame(found, columns)


def products(evidence: Mapping[str, dict]) -> pd.DataFrame:
    """One token: every candidate of every shape.

    Returns
    -------
    pandas.DataFrame
        `shape, tokens, name, family, mode, bits` (mean of the codes), `layout` (uniform, blocks, column groups),
        `natural` (nothing permuted), `gather` (of activations: fused into the product, own kernel before it, unfused:
        both permutations by torch around it, none), `dtype`, `us` with its 10th and 90th percentile,
        `eager_us` and `host_us` (called one by one: until done, until enqueued), `packed_bytes`,
        `gigabytes_per_second`, `of_copy` (share of a device copy's), `times_fp16` and `times_int4` (how many times as
        fast as torch with float16 weights, and as the fastest peer with 4 bits), `predicted_us`, `of_predicted`
        (measured over predicted), `error`, `samples`.
    """
    return _table(evidence, "product", SHOWN)


def batches(evidence: Mapping[str, dict]) -> pd.DataFrame:
    """Several tokens: as :func:`products`, with `way` (lut, mma, dequantize) and `us_per_token`."""
    frame = _table(evidence, "batch", [*SHOWN, "way"]).sort_values("tokens", kind="stable", ignore_index=True)
    return frame.assign(us_per_token=frame.us / frame.tokens)


def widths(evidence: Mapping[str, dict]) -> pd.DataFrame:
    """Tables of the look-up kernel over 2 to 8 activations: as :func:`products`, with `table_width, group_size,
    table_bytes` (of shared memory).
    """
    return _table(evidence, "width", WIDTHS)


def accuracy(evidence: Mapping[str, dict]) -> pd.DataFrame:
    """Errors against float64: `shape, mode, bits, dtype, activations, error`."""
    found = [{"shape": shape_of(part), **row} for part, rows in rows_of(evidence, "accuracy") for row in rows]
    return _frame(found, ACCURACY)


def host(evidence: Mapping[str, dict]) -> pd.DataFrame:
    """Host time of one call, without waiting for its result: `call, host_us, samples`."""
    found = ((evidence.get("kernels") or {}).get("host") or {}).items()
    rows = [(call, value["median_us"], len(value["samples_us"])) for call, value in found]
    return pd.DataFrame(rows, columns=["call", "host_us", "samples"])


def ours(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of this project as it is used: blocks of several widths, permuted, both permutations done by our kernels."""
    rows = table[(table.family == "sfmp") & (table["layout"] == "blocks") & table.gather.isin(OWN_GATHERS)]
    if rows.empty:
        return rows
    gathers = rows.groupby(["shape", "mode", "dtype"]).gather
    return rows[rows.gather == gathers.transform(lambda found: min(found, key=OWN_GATHERS.index))]


def fits(table: pd.DataFrame) -> pd.DataFrame:
    """Straight lines through time against mean bits, of permuted matrices of blocks.

    Returns
    -------
    pandas.DataFrame
        `shape, mode, dtype, fixed_us, us_per_bit, r2`, and `mixed_speed`: of the matrices between the fewest and the
        most bits, which alone have blocks of several widths, the least time on the line through those two over the
        measured time.
    """
    found, rows = [], ours(table).dropna(subset=["us"])
    for (shape, mode, dtype), part in rows.groupby(["shape", "mode", "dtype"], sort=False):
        if part.bits.nunique() < 3:
            continue
        bits, time = part.bits.astype(float), part.us.astype(float)
        slope, fixed = np.polyfit(bits, time, 1)
        spread = ((time - time.mean()) ** 2).sum()
        r2 = 1 - ((time - fixed - slope * bits) ** 2).sum() / spread if spread else np.nan
        ends = bits.isin([bits.min(), bits.max()])
        line = np.poly1d(np.polyfit(bits[ends], time[ends], 1))
        found.append((shape, mode, dtype, fixed, slope, r2, (line(bits[~ends]) / time[~ends]).min()))
    return pd.DataFrame(found, columns=FITS)


def layouts(table: pd.DataFrame) -> pd.DataFrame:
    """Blocks against column groups (as SliM-LLM) at equal bits in our own kernels.

    Returns
    -------
    pandas.DataFrame
        `shape, mode, dtype, bits, blocks_us, columns_us, columns_over_blocks`: 1.3 means that blocks are 30 % faster.
    """
    found = []
    keys = ["shape", "mode", "dtype", "bits"]
    columns = table[(table.family == "sfmp") & (table["layout"] == "column groups")]
    blocks = ours(table).groupby(keys).us.min()
    for key, time in columns.groupby(keys, sort=False).us.min().items():
        if key in blocks.index:
            found.append((*key, blocks[key], time, time / blocks[key]))
    return pd.DataFrame(found, columns=LAYOUTS)


def reordering(table: pd.DataFrame) -> pd.DataFrame:
    """What both permutations cost.

    Returns
    -------
    pandas.DataFrame
        `shape, mode, dtype, bits, gather, natural_us, us, speed_kept` (natural over permuted time), `used` (this is
        the gather of :func:`ours`; the others were measured for comparison).
    """
    found = []
    keys = ["shape", "mode", "dtype", "bits", "layout"]
    rows, used = table[table.family == "sfmp"], ours(table).index
    natural = rows[rows.natural.astype(bool)].groupby(keys).us.min()
    for row in rows[~rows.natural.astype(bool)].itertuples():
        key = (row.shape, row.mode, row.dtype, row.bits, row.layout)
        if key in natural.index:
            found.append((*key[:4], row.gather, natural[key], row.us, natural[key] / row.us, row.Index in used))
    return pd.DataFrame(found, columns=REORDERING)


def crossovers(table: pd.DataFrame) -> pd.DataFrame:
    """Up to how many of the measured tokens each way is faster than torch with float16 weights.

    Returns
    -------
    pandas.DataFrame
        `shape, way, bits, faster_than_fp16` (0: at none), `fastest_way` (tokens at which it is the fastest of ours),
        `measured` (largest number of tokens), `crossed` (a lead at few tokens is lost at some larger number).
    """
    found, rows = [], table[(table.family == "sfmp") & table.way.notna()]
    fastest = rows.groupby(["shape", "bits", "tokens"]).us.transform("min")
    rows = rows.assign(fastest=rows.us == fastest)
    for (shape, way, bits), part in rows.groupby(["shape", "way", "bits"], sort=False):
        part = part.sort_values("tokens")
        ahead = (part.times_fp16 > 1).cummin()
        last, most = int(part.tokens[ahead].max()) if ahead.any() else 0, int(part.tokens.max())
        won = " ".join(f"{count:g}" for count in part.tokens[part.fastest])
        found.append((shape, way, bits, last, won, most, 0 < last < most))
    return pd.DataFrame(found, columns=CROSSOVERS)


def decoding(evidence: Mapping[str, dict]) -> pd.DataFrame:
    """Tokens per second: the rows of ``python -m sfmp.bench decode``, with `times_fp16` against torch in float16 of the
    same model, both under CUDA graphs.
    """
    found = []
    for part, rows in rows_of(evidence, "decode", "decode"):
        controls = [row["tokens_per_second"] for row in rows if row["weights"] == "torch fp16" and row.get("graph")]
        for row in rows:
            times = row["tokens_per_second"] / max(controls) if controls and row.get("graph") else None
            found.append({**row, "model": part.get("model"), "times_fp16": times,
                          "samples": len(row.get("seconds_per_token") or ())})
    return _frame(found, DECODING)

