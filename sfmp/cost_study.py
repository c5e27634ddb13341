"""How the cost of choosing bits grows: every method's deciding stage, measured on random models of three sizes.

The models are random and small, so that all fits in a minute on one core; nothing but seconds and counts is read
off them. Two things are varied: the number of layers at a fixed width, and the number of blocks (column groups for
SliM-LLM) of one layer.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from sfmp import baselines
from sfmp.salience import linear_modules

LAYERS = (3, 6, 12)
GROUPS = (128, 64, 32)  # columns of a block on a model 512 wide: 4, 8, 16 column groups
WINDOWS, TOKENS = {"layers": 4, "blocks": 16}, 64  # more windows where they are what SliM-LLM's cost hangs on
CODE_BITS = 3  # a whole number, which every method can meet
STACK_BPW = 3.9  # of BitStack, which has no groups: three whole levels and a part of the fourth, which is sorted
#: method → (knobs, {stage: what it is called in the table}); few evaluations, each of the same price as always
STUDIED = {
    "sfmp": ({"method": "rtn"}, {"salience": "salience", "allocation": "allocation"}),
    "amq": ({"n_initial": 8, "iterations": 1, "per_iteration": 4, "population": 8, "generations": 2,
             "subset_population": 8, "subset_generations": 2},
            {"sensitivity": "sensitivity", "search": "search"}),
    "slim_llm": ({"sqc_steps": 1}, {"bit search (SBA)": "bit search"}),
    "bitstack": ({"rank": 1, "n_levels": 16}, {"sorting": "sorting"}),
}
_COLUMNS = [
    "axis", "size", "linears", "blocks", "method", "stage", "seconds", "evaluations", "unit", "units", "full_units",
    "full_seconds",
]


def random_model(layers: int, width: int, feed_forward: int, seed: int = 0):
    """Llama with random weights, float32, in evaluation mode; vocabulary 128.

    Parameters
    ----------
    layers, width, feed_forward : int
        Of the architecture; 4 heads.
    seed : int
        Of the weights; the global generator is left as it was.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=width, intermediate_size=feed_forward, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=4, vocab_size=128, max_position_embeddings=TOKENS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def cost_scaling(layers=LAYERS, groups=GROUPS, seed: int = 0, width: int = 128) -> pd.DataFrame:
    """Measure the deciding stages of SFMP, AMQ, SliM-LLM and BitStack at several sizes.

    Parameters
    ----------
    layers : sequence of int
        Numbers of layers of a model `width` wide, in blocks of 32 x 32.
    groups : sequence of int
        Columns of a group, and rows of a block, of one layer four times as wide; the number of blocks grows as
        they shrink.
    seed : int
        Of weights and windows.
    width : int

    Returns
    -------
    pandas.DataFrame
        Per axis (layers or blocks), size (layers; column groups of a matrix) and stage: `linears`, `blocks` (of
        all matrices; column groups for the rivals), `seconds` of CPU, `evaluations` and `units` done here,
        `full_units` that the publication's settings need on that model, and `full_seconds` for them.

    Notes
    -----
    CPU seconds, so that a busy machine does not bend the curves. The first model is run once without being
    recorded: what loads on first use is no cost of a method.

    Source: experiment C1 of METHOD §4.
    """
    sizes = [("layers", count, count, width, 32) for count in layers]
    sizes += [("blocks", 4 * width // group, 1, 4 * width, group) for group in groups]
    _measure(*sizes[0], seed)
    rows = [row for size in sizes for row in _measure(*size, seed)]
    return pd.DataFrame(rows, columns=_COLUMNS)


def _measure(axis, size, layers, width, group, seed):
    """Rows of one model: every method on a fresh copy of it."""
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randint(128, (WINDOWS[axis], TOKENS), generator=generator)
    rows = []
    for method, (knobs, stages) in STUDIED.items():
        model = random_model(layers, width, 2 * width if axis == "layers" else width, seed)
        shapes = [tuple(linear.weight.shape) for linear in linear_modules(model).values()]
        block_rows = {"block_rows": group} if method == "sfmp" else {}
        blocks = sum(-(-k // group) * (-(-n // group) if block_rows else 1) for n, k in shapes)
        quantize = baselines.methods()[method]  # a knob of SFMP is called `method` as well
        bpw = STACK_BPW if method == "bitstack" else CODE_BITS + 32 / group
        outcome = quantize(model, windows, bpw, seed=seed, group_size=group, **block_rows, **knobs)
        for row in outcome.cost.rows():
            if row["stage"] in stages:
                rows.append({**row, "axis": axis, "size": size, "linears": len(shapes), "blocks": blocks,
                             "method": method, "stage": stages[row["stage"]], "seconds": row["cpu_seconds"],
                             "full_seconds": row["cpu_seconds"] * row["full_seconds"] / row["wall_seconds"]})
    return rows


def growth(table: pd.DataFrame) -> pd.DataFrame:
    """Exponents of growth: the slope of log(cost) against log(size).

    Parameters
    ----------
    table : pandas.DataFrame
        :func:`cost_scaling`.

    Returns
    -------
    pandas.DataFrame
        `axis, method, stage`, exponents of `seconds`, of `needed` (units of the publication) and of
        `full_seconds`: 0 does not grow, 1 is proportional, 2 is quadratic. A stage that did nothing at some size
        is fitted over the others.

    Examples
    --------
    >>> rows = [("layers", n, "x", "s", n**2, 7 * n, n**3) for n in (2, 4, 8)]
    >>> names = ["axis", "size", "method", "stage", "seconds", "full_units", "full_seconds"]
    >>> growth(pd.DataFrame(rows, columns=names)).round(6).iloc[0, 3:].tolist()
    [2.0, 1.0, 3.0]
    """
    rows = []
    for key, part in table.groupby(["axis", "method", "stage"], sort=False):
        rows.append((*key, *(_slope(part["size"], part[c]) for c in ("seconds", "full_units", "full_seconds"))))
    return pd.DataFrame(rows, columns=["axis", "method", "stage", "seconds", "needed", "full_seconds"])


def with_growth(table: pd.DataFrame) -> pd.DataFrame:
    """The measurements with the exponents of their stage: ``seconds_exponent, needed_exponent,
    full_seconds_exponent`` (:func:`growth`).
    """
    named = growth(table).rename(columns={c: f"{c}_exponent" for c in ("seconds", "needed", "full_seconds")})
    return table.merge(named, on=["axis", "method", "stage"], how="left", validate="many_to_one")


def _slope(sizes, values):
    x, y = sizes.to_numpy(dtype=float), values.to_numpy(dtype=float)
    kept = y > 0
    return float(np.polyfit(np.log(x[kept]), np.log(y[kept]), 1)[0]) if kept.sum() > 1 else np.nan
