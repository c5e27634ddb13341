"""Allocation oracles: the exact optimum of the block objective, a plain greedy, and a genetic search.

All three choose one level per block so that the total loss is least within a budget of code bits, a
multiple-choice knapsack, like :func:`sfmp.allocate.allocate` does without search. They exist to check it: it must
reach the optimum, and neither greedy nor search may be below the optimum.

Source: METHOD.md section 1.3 (closed form) and experiment A4.
"""

from __future__ import annotations

import numpy as np

from sfmp.checks import SfmpError, integer

POPULATION, EVALUATIONS = 200, 10_250  # of the genetic search: those of AMQ, METHOD.md 2.4


def exact_allocation(losses, weights, levels, budget_bits: int, time_limit: float | None = None) -> np.ndarray:
    """Choose the optimum by integer linear programming (HiGHS, no relative gap allowed).

    Parameters
    ----------
    losses : float64 [blocks, levels]
        Loss of each block at each level.
    weights : int64 [blocks]
        Weights of each block; a level costs level * weights bits.
    levels : sequence of int, increasing
    budget_bits : int
        Total code bits allowed; bits may be left over.
    time_limit : float, optional
        Seconds after which the solver gives up with an error.

    Returns
    -------
    uint8 [blocks]

    Raises
    ------
    SfmpError
        If the shapes differ, a loss is not finite, the lowest level alone exceeds the budget, or the solver did
        not prove an optimum.

    Notes
    -----
    One binary variable per block and level. Loss and bits are counted from each block's lowest level, the loss in
    units of the largest one and the bits in units of their common divisor, so that the solver's absolute
    tolerances mean the same for every model. HiGHS stops at an absolute gap of 1e-6, which SciPy does not let us
    change: the loss is optimal to a millionth of the largest gain of a block, and where one block dwarfs all others
    theirs may be left unsolved. Source: METHOD.md section 4, A4.

    Examples
    --------
    >>> exact_allocation([[1.0, 0.2], [4.0, 1.0]], [8, 8], (2, 3), 40).tolist()
    [2, 3]
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    losses, weights, levels, room = _checked(losses, weights, levels, budget_bits)
    blocks, count = losses.shape
    if blocks == 0 or count == 1:
        return np.full(blocks, levels[0], dtype=np.uint8)
    costs = weights[:, None] * (levels - levels[0])
    unit = int(np.gcd.reduce(costs.ravel()))
    gains = losses - losses[:, :1]
    largest = np.abs(gains).max() or 1.0
    variables = np.arange(blocks * count)
    one_each = csr_array((np.ones(blocks * count), (variables // count, variables)))
    spent = csr_array((costs / unit).reshape(1, -1))
    found = milp(
        (gains / largest).ravel(), integrality=np.ones(blocks * count), bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(spent, 0, room // unit)],
        options={"mip_rel_gap": 0.0, **({} if time_limit is None else {"time_limit": float(time_limit)})},
    )
    if found.status != 0:
        raise SfmpError(f"integer program of {blocks} blocks: expected a proven optimum, found {found.message!r}; "
                        "raise time_limit or use fewer blocks")
    chosen = found.x.reshape(blocks, count).argmax(axis=1)
    used = int(costs[np.arange(blocks), chosen].sum())
    if used > room:
        raise SfmpError(f"integer program of {blocks} blocks: expected at most {room} bits above the lowest level, "
                        f"found {used}; the solver's tolerance is too coarse for this problem")
    return levels[chosen].astype(np.uint8)


def greedy_allocation(losses, weights, levels, budget_bits: int) -> np.ndarray:
    """Raise one block by one level at a time, always the one that removes most loss per bit and still fits.

    Arguments, result and errors as in :func:`exact_allocation`, without a time limit. It looks one level ahead and
    stops when no step that fits removes loss; ties go to the earlier block.
    """
    losses, weights, levels, room = _checked(losses, weights, levels, budget_bits)
    blocks, count = losses.shape
    at = np.zeros(blocks, dtype=np.int64)
    if blocks == 0 or count == 1:
        return levels[at].astype(np.uint8)
    costs = weights[:, None] * np.diff(levels)
    rates = -np.diff(losses, axis=1) / costs
    next_rate, next_cost = rates[:, 0].copy(), costs[:, 0].copy()
    while True:
        fits = np.where(next_cost <= room, next_rate, -np.inf)
        block = int(fits.argmax())
        if not fits[block] > 0:
            return levels[at].astype(np.uint8)
        room -= int(next_cost[block])
        at[block] += 1
        last = at[block] == count - 1
        next_rate[block] = -np.inf if last else rates[block, at[block]]
        next_cost[block] = 0 if last else costs[block, at[block]]


def search_allocation(losses, weights, levels, budget_bits: int, seed: int = 0,
                      evaluations: int = EVALUATIONS) -> np.ndarray:
    """Search by a genetic algorithm (pymoo: integer crossover and mutation), the way a rival without a formula must.

    Parameters
    ----------
    losses, weights, levels, budget_bits
        As in :func:`exact_allocation`.
    seed : int
    evaluations : int
        Allocations whose total loss is computed.

    Returns
    -------
    uint8 [blocks]
        The best allocation seen that is within the budget.

    Raises
    ------
    SfmpError
        As :func:`exact_allocation`, or if `seed` or `evaluations` is no such number.

    Notes
    -----
    An offspring above the budget is repaired: blocks are lowered where that costs least loss per bit until it
    fits. This helps the search, which is then a control that is hard to beat. Source: METHOD.md section 4, A4.
    """
    from pymoo.algorithms.soo.nonconvex.ga import GA
    from pymoo.core.problem import Problem
    from pymoo.core.repair import Repair
    from pymoo.operators.crossover.ux import UX
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.sampling.rnd import IntegerRandomSampling
    from pymoo.optimize import minimize

    losses, weights, levels, room = _checked(losses, weights, levels, budget_bits)
    seed, evaluations = integer("seed", seed, 0), integer("evaluations", evaluations, 1)
    blocks, count = losses.shape
    if blocks == 0 or count == 1:
        return np.full(blocks, levels[0], dtype=np.uint8)
    costs = weights[:, None] * (levels - levels[0])
    every = np.arange(blocks)

    class Fitting(Repair):
        def _do(self, problem, X, **kwargs):
            return np.array([_lowered(np.rint(x).astype(np.int64), losses, costs, room) for x in X])

    class Allocation(Problem):
        def __init__(self):
            super().__init__(n_var=blocks, n_obj=1, xl=0, xu=count - 1, vtype=int)

        def _evaluate(self, X, out, *args, **kwargs):
            out["F"] = losses[every, X.astype(np.int64)].sum(axis=1)[:, None]

    repair = Fitting()
    search = GA(pop_size=min(POPULATION, evaluations), sampling=IntegerRandomSampling(), crossover=UX(),
                mutation=PM(prob_var=1.0 / blocks, vtype=float, repair=repair), repair=repair,
                eliminate_duplicates=False)  # looking for duplicates takes most of the time, and finds no better result
    found = minimize(Allocation(), search, ("n_eval", evaluations), seed=seed)
    return levels[np.rint(found.X).astype(np.int64)].astype(np.uint8)


def _lowered(at, losses, costs, room):
    """Lower blocks, the cheapest loss per bit first, until the costs fit."""
    every = np.arange(len(at))
    over = int(costs[every, at].sum()) - room
    while over > 0:
        able = np.flatnonzero(at > 0)
        freed = costs[able, at[able]] - costs[able, at[able] - 1]
        harm = (losses[able, at[able] - 1] - losses[able, at[able]]) / freed
        order = np.argsort(harm, kind="stable")
        enough = np.searchsorted(np.cumsum(freed[order]), over) + 1
        lowered = order[:enough]
        at[able[lowered]] -= 1
        over -= int(freed[lowered].sum())
    return at


def _checked(losses, weights, levels, budget_bits):
    """Arrays of a problem, and the bits above every block's lowest level."""
    losses = np.asarray(losses, dtype=np.float64)
    weights, levels = np.asarray(weights, dtype=np.int64), np.asarray(levels, dtype=np.int64)
    if losses.shape != (len(weights), len(levels)):
        raise SfmpError(f"losses: expected shape {(len(weights), len(levels))} as in weights and levels, found "
                        f"{losses.shape}")
    if (weights < 1).any():
        raise SfmpError(f"weights: expected at least one weight in every block, found {weights.min()}")
    if not np.isfinite(losses).all():
        raise SfmpError(f"losses: expected finite numbers, found {losses[~np.isfinite(losses)][0]}")
    room = int(budget_bits) - int(levels[0] * weights.sum())
    if room < 0:
        raise SfmpError(f"budget: expected at least {int(levels[0] * weights.sum())} bits (every block at "
                        f"{levels[0]}), found {budget_bits}; raise bpw or add a lower level")
    return losses, weights, levels, room
