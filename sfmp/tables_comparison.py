"""Tables of the full comparison: every method at equal bytes, on each quantizer, and by the unit that shares a
bit-width.

Bits per weight by the paper's account are codes and scales. Equal bytes counts whatever a method has to store
beside them: permutations, bit maps, factors, channel scales.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from sfmp.checks import SfmpError
from sfmp.records import FP
from sfmp.tables import select

LARGEST_BLOCK = 512  # rows; the paper's largest block, so more can only mean all rows of a matrix
COARSE = {"all rows": 1e15, "matrix": 1e16, "model": 1e17}  # sorts after every block that has a size
MIXED = ("element", "sfmp-rtn", "sfmp-awq", "sfmp-gptq", "layer_wise")
LLAMA_8B = {  # (out_features, in_features) of one layer of Llama-3.1-8B, and how many matrices have it
    (4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1,
}

_BYTES = [
    "run", "model", "method", "method_order", "budget", "bpw", "bpw_achieved", "bpw_bytes", "stored_bytes",
    "budget_bytes", "within_budget", "reached", "perplexity", "perplexity_ratio", "acc", "acc_stderr", "acc_norm",
    "acc_norm_stderr", "retention", "knobs", "manifest",
]


def bytes_table(results: pd.DataFrame) -> pd.DataFrame:
    """Every method at the budgets that were also met in bytes.

    Parameters
    ----------
    results : pandas.DataFrame
        From :func:`sfmp.records.load_results`.

    Returns
    -------
    pandas.DataFrame
        The control, every run of the main comparison at a budget where some run has ``budget = stored``, and
        those runs. `bpw_bytes` counts every byte the method itself must store; `within_budget` says whether
        they fit `budget_bytes` = bpw x weights / 8, with one byte to spare per matrix for its bit-width.

    Source: experiment E5 of METHOD §4.
    """
    if "budget" not in results:
        return pd.DataFrame(columns=_BYTES)
    stored = results[results.budget == "stored"]
    main = select(results, "main")
    main = main[(main.method == FP) | (main.objective != "measured") & main.bpw.isin(stored.bpw.unique())]
    rows = pd.concat([main, stored]).drop_duplicates("run").copy()
    rows["budget_bytes"] = rows.bpw * rows.quantized_weights / 8
    spare = rows.matrices.fillna(0)
    rows["within_budget"] = (rows.stored_bytes <= rows.budget_bytes + spare).astype(object)
    rows.loc[rows.stored_bytes.isna(), "within_budget"] = None
    keys = ["model", "bpw", "method_order", "method", "budget", "run"]
    return rows.reindex(columns=_BYTES).sort_values(keys, kind="stable", na_position="first", ignore_index=True)


def permutation_bits(shapes=None, index_bytes: int = 2) -> float:
    """Bits per weight that one row and one column permutation per matrix cost.

    Parameters
    ----------
    shapes : mapping of (int, int) to int
        How many matrices there are of each [N, K]; those of Llama-3.1-8B by default.
    index_bytes : int
        Bytes of one index: 2 in our checkpoints, 4 in the authors'.

    Examples
    --------
    >>> round(permutation_bits(), 4), round(permutation_bits(index_bytes=4), 4)
    (0.006, 0.012)

    Source: METHOD §1.5.
    """
    shapes = LLAMA_8B if shapes is None else shapes
    indices = sum(count * (n + k) for (n, k), count in shapes.items())
    return 8 * index_bytes * indices / sum(count * n * k for (n, k), count in shapes.items())


def side_bits(table: pd.DataFrame) -> pd.DataFrame:
    """Bits per weight that each method stores beside codes and scales.

    Parameters
    ----------
    table : pandas.DataFrame
        :func:`bytes_table`.

    Returns
    -------
    pandas.DataFrame
        `method, least, most`: bpw_bytes - bpw_achieved over the runs of a method, in the order of methods.
    """
    extra = (table.bpw_bytes - table.bpw_achieved).rename("extra")
    groups = pd.concat([table[["method_order", "method"]], extra], axis=1).dropna().groupby(["method_order", "method"])
    return groups.extra.agg(least="min", most="max").reset_index("method").reset_index(drop=True)


def quantizer_table(results: pd.DataFrame) -> pd.DataFrame:
    """Mixed against one bit-width on the same quantizer.

    Returns
    -------
    pandas.DataFrame
        `run, model, method, quantizer` (rtn, awq, gptq, efficient_qat), `allocation` (uniform or mixed),
        `bpw, bpw_achieved, bpw_stored, perplexity, perplexity_ratio, fp_perplexity, manifest`.

    Source: experiment E3 of METHOD §4.
    """
    rows = _measured(results, "quantizer")
    rows["quantizer"] = rows.method.str.removeprefix("sfmp-")
    rows["allocation"] = np.where(rows.method.str.startswith("sfmp-"), "mixed", "uniform")
    return _ordered(rows, ["quantizer", "allocation"], ["method_order", "bpw", "run"])


def granularity_table(results: pd.DataFrame) -> pd.DataFrame:
    """Quality by the unit that shares one bit-width, from the single weight to the whole matrix.

    Returns
    -------
    pandas.DataFrame
        `run, model, method, bpw, block_rows, group_size, reorder`, `unit` (element, "64×128",
        "all rows×128", matrix, and model: one width for all), `place` (rank from fine to coarse), and quality.
        The oracle of single weights pays nothing for saying which weight has which width; no format could
        store that for free.

    Source: ablation A5 of METHOD §4.
    """
    rows = _measured(results, "granularity")
    whole = rows.block_rows > LARGEST_BLOCK
    height = rows.block_rows.map("{:g}".format).where(~whole, "all rows")
    rows["unit"] = height + "×" + rows.group_size.map("{:g}".format)
    rows.loc[rows.method == "element", "unit"] = "element"
    rows.loc[rows.method == "layer_wise", "unit"] = "matrix"
    rows.loc[~rows.method.isin(MIXED), "unit"] = "model"
    size = (rows.block_rows * rows.group_size).mask(whole, COARSE["all rows"]).mask(rows.method == "element", 1)
    size = size.mask(rows.unit == "matrix", COARSE["matrix"]).mask(rows.unit == "model", COARSE["model"])
    rows["place"] = size.rank(method="dense").astype(int)
    columns = ["block_rows", "group_size", "reorder", "unit", "place"]
    return _ordered(rows, columns, ["bpw", "place", "reorder", "run"])


def _measured(results, experiment):
    rows = select(results, experiment)
    rows = rows[rows.method != FP].copy()
    if rows.empty:
        raise SfmpError(
            f"experiment {experiment!r}: expected evaluated runs with that word in `experiments`, found none; "
            "run them first"
        )
    rows["fp_perplexity"] = rows.perplexity / rows.perplexity_ratio
    return rows


def _ordered(rows, factors, keys):
    columns = ["run", "model", "method", "bpw", *factors, "bpw_achieved", "bpw_stored", "perplexity",
               "perplexity_ratio", "fp_perplexity", "rtn_perplexity", "manifest"]
    return rows.sort_values(["model", *keys], kind="stable", ignore_index=True).reindex(columns=columns)
