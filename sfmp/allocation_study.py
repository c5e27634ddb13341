"""Closed form against the exact optimum, greedy and genetic search, on the block objective of a real model."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

import numpy as np
import pandas as pd

from sfmp.allocate import allocate, block_problem
from sfmp.baselines.exact import EVALUATIONS, exact_allocation, greedy_allocation, search_allocation
from sfmp.checks import SfmpError
from sfmp.spec import QuantSpec

METHODS = ("closed form", "ILP optimum", "greedy", "genetic search")


def allocation_table(salience: Mapping, spec: QuantSpec, model=None, seed: int = 0, *, budgets=(2.5, 3.0, 3.5),
                     evaluations: int = EVALUATIONS) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Solve the same allocation by every method.

    Parameters
    ----------
    salience : mapping name -> array or tensor [N, K]
    spec : QuantSpec
        Its `bpw`, `objective` and `scope` are replaced: `budgets`, both objectives, all blocks together.
    model : torch.nn.Module, optional
        Without it the measured objective is left out.
    seed : int
        Of the genetic search.
    budgets : sequence of float
        Bits per weight.
    evaluations : int
        Allocations the genetic search may try.

    Returns
    -------
    (table, seconds) : pandas.DataFrame
        `table`: one row per objective, budget and method with `objective` (paper or measured), `bpw`, `method`,
        `blocks`, `loss` (total over the blocks), `loss_ratio` (to the optimum), `bits_used`, `budget_bits`,
        `evaluations` (allocations tried: 1 where the answer is computed, steps of the greedy, candidates of the
        search). The same on every run. `seconds`: `objective`, `bpw`, `method`, `seconds` of wall time.

    Raises
    ------
    SfmpError
        If the spec has one level only (nothing to allocate), or as `make_plan` does.

    Notes
    -----
    Source: METHOD.md section 4, A4.
    """
    spec = dataclasses.replace(spec, scope="global")
    if spec.levels == "auto" or len(spec.levels) < 2:
        raise SfmpError(f"levels: expected at least two bit-widths to choose from, found {spec.levels!r}")
    for method in METHODS:  # one block: what a solver imports at its first call is no part of its time
        _solve(method, np.array([[1.0, 0.0]]), np.ones(1, np.int64), (2, 3), 3, np.ones(1), seed, 1)
    rows, seconds = [], []
    for objective in ("paper",) if model is None else ("paper", "measured"):
        # Losses do not depend on the budget: the blocks are measured once per objective.
        problem = block_problem(salience, dataclasses.replace(spec, objective=objective), model)
        losses, weights, sums = problem.arrays()
        for bpw in budgets:
            budget = dataclasses.replace(spec, bpw=bpw).budget_bits(int(weights.sum()))
            solved = {}
            for method in METHODS:
                start = time.perf_counter()
                solved[method] = _solve(method, losses, weights, spec.levels, budget, sums, seed, evaluations)
                seconds.append((objective, bpw, method, time.perf_counter() - start))
            best = _loss(losses, spec.levels, solved["ILP optimum"])
            for method, bits in solved.items():
                tried = {"greedy": int(np.searchsorted(spec.levels, bits).sum()), "genetic search": evaluations}
                loss = _loss(losses, spec.levels, bits)
                rows.append((objective, bpw, method, len(weights), loss, loss / best if best else 1.0,
                             int((bits * weights).sum()), budget, tried.get(method, 1)))
    columns = ["objective", "bpw", "method", "blocks", "loss", "loss_ratio", "bits_used", "budget_bits", "evaluations"]
    return (pd.DataFrame(rows, columns=columns),
            pd.DataFrame(seconds, columns=["objective", "bpw", "method", "seconds"]))


def _solve(method, losses, weights, levels, budget, sums, seed, evaluations):
    if method == "closed form":
        return allocate(losses, weights, levels, budget, sums)
    if method == "ILP optimum":
        return exact_allocation(losses, weights, levels, budget)
    if method == "greedy":
        return greedy_allocation(losses, weights, levels, budget)
    return search_allocation(losses, weights, levels, budget, seed, evaluations)


def _loss(losses, levels, bits) -> float:
    return float(losses[np.arange(len(bits)), np.searchsorted(levels, bits)].sum())
