"""Do diagonal Fisher salience and the guided Hessians, with their cross terms, rank the blocks of a model alike?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch

from sfmp.allocate import block_problem
from sfmp.baselines.guided import block_losses, guided_hessians, guided_salience
from sfmp.checks import SfmpError, integer
from sfmp.grid import BlockGrid
from sfmp.reorder import block_sums
from sfmp.salience import load_salience
from sfmp.spec import QuantSpec

HELD_BYTES = 2**31  # Hessians held at once; the rest waits for another pass over the windows
GROUPS = 4  # of output rows, as published


def agreement_table(model, windows, fisher: Mapping, guided: Mapping, spec: QuantSpec,
                    n_windows: int = 8) -> pd.DataFrame:
    """Rank correlation, over all blocks of a model, of what two models of the loss say about them.

    Parameters
    ----------
    model : torch.nn.Module
        Of both saliences; left as found.
    windows : int64 Tensor [n, seqlen]
        Of the Hessians.
    fisher, guided : mapping name -> array or tensor [N, K]
        Salience of the same matrices. The guided one is the diagonal of the guided Hessians.
    spec : QuantSpec
        Blocks, levels and `skip`. Its `reorder` and `objective` are replaced, as the comparisons say.
    n_windows : int
        Windows for the Hessians, evenly spaced; all where there are fewer.

    Returns
    -------
    pandas.DataFrame
        `comparison, bits` (NaN for salience), `blocks, spearman`, one row each for the salience of the blocks
        (`guided` against `fisher`) in natural and in Fisher order, and, in Fisher order and at each level, for the
        losses of rounded blocks: diagonal Fisher against guided Hessians, and guided Hessians with against without
        their cross terms. All matrices are ranked together, as a budget for the whole model does. The same on
        every run.

    Raises
    ------
    SfmpError
        If the two saliences are of different matrices, a side of a comparison is the same for all blocks, or as
        `make_plan` and `guided_hessians` do.

    Notes
    -----
    Source: METHOD.md section 4, S3.
    """
    if set(fisher) != set(guided):
        raise SfmpError("guided: expected the matrices of the Fisher salience, found in one of the two only: "
                        f"{', '.join(sorted(set(fisher) ^ set(guided)))}; compute both from the same model")
    natural = block_problem(fisher, dataclasses.replace(spec, reorder="none", objective="paper"))
    ordered = block_problem(fisher, dataclasses.replace(spec, reorder="both", objective="measured"), model)
    rows = [
        _row("block salience, natural order", np.nan, _joined(natural.sums), _joined(_sums(guided, natural))),
        _row("block salience, Fisher order", np.nan, _joined(ordered.sums), _joined(_sums(guided, ordered))),
    ]
    whole, diagonal = _losses(model, _chosen(windows, n_windows), ordered)
    pairs = {
        "block losses, diagonal Fisher against guided Hessians": (_joined(ordered.losses), whole),
        "block losses, guided Hessians with against without cross terms": (whole, diagonal),
    }
    for title, (left, right) in pairs.items():
        rows += [_row(title, bits, left[:, at], right[:, at]) for at, bits in enumerate(spec.candidate_levels)]
    return pd.DataFrame(rows, columns=["comparison", "bits", "blocks", "spearman"]).astype({"bits": "Int64"})


def guided_input(run, model, windows, n_windows: int = 8) -> Mapping:
    """Guided salience by matrix, float32 [N, K]: the declared input ``guided`` of a notebook's
    :class:`sfmp.provenance.Run`, or that of a few windows.
    """
    if "guided" in run.inputs:
        return load_salience(run.inputs["guided"])
    return guided_salience(model, _chosen(windows, n_windows), groups=GROUPS)


def _chosen(windows, n_windows):
    """Evenly spaced windows."""
    count = min(integer("n_windows", n_windows, 1), len(windows))
    return windows[torch.arange(count) * len(windows) // max(1, count)]


def _joined(by_name):
    return np.concatenate(list(by_name.values()))


def _sums(salience, problem):
    """Sums of another salience over the blocks of a problem, by matrix in its order."""
    return {name: block_sums(salience[name], *problem.permuted[name], grid).ravel()
            for name, grid in problem.grids.items()}


def _losses(model, windows, problem):
    """Guided losses of all blocks with and without the cross terms, each float64 [blocks, levels]."""
    whole, diagonal = {}, {}
    for names in _portions(problem.grids, HELD_BYTES):
        hessians = guided_hessians(model, windows, groups=GROUPS, skip=problem.spec.skip, names=names)
        for name in names:
            hessian, weight = hessians.pop(name), model.get_submodule(name).weight
            where = *problem.permuted[name], problem.grids[name], problem.spec.candidate_levels
            whole[name] = block_losses(weight, hessian, *where)
            kept = torch.diag_embed(torch.diagonal(hessian, dim1=1, dim2=2))
            diagonal[name] = block_losses(weight, kept, *where)
    return _joined(whole), _joined(diagonal)


def _portions(grids: Mapping[str, BlockGrid], limit: int) -> list[list[str]]:
    """Cut the names into runs whose Hessians, float32, fit `limit` bytes, or that are one matrix."""
    portions, held = [[]], 0
    for name, grid in grids.items():
        size = 4 * min(GROUPS, grid.out_features) * grid.in_features**2
        if portions[-1] and held + size > limit:
            portions, held = [*portions, []], 0
        portions[-1].append(name)
        held += size
    return portions


def _row(comparison, bits, left, right):
    from scipy.stats import spearmanr

    for side in (left, right):
        if np.ptp(side) == 0:
            raise SfmpError(f"{comparison}: expected blocks that differ, found {side[0]} for all {len(side)}; choose "
                            "smaller blocks, or a salience that is not constant")
    return comparison, bits, len(left), float(spearmanr(left, right).statistic)
