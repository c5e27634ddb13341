"""Propose designs worth evaluating: a predictor of the loss, NSGA-II on it, and a well-spread subset.

A design gives each of a number of linears one of the levels; it has a loss (measured, dear) and a size in mean
bits (known, free).

Source: METHOD.md section 2.4 (3) and (4).
"""

from __future__ import annotations

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.algorithms.soo.nonconvex.ga import GA
from pymoo.core.problem import Problem
from pymoo.core.repair import Repair
from pymoo.operators.crossover.binx import BinomialCrossover
from pymoo.operators.mutation.bitflip import BitflipMutation
from pymoo.operators.mutation.pm import PolynomialMutation
from pymoo.operators.repair.rounding import RoundingRepair
from pymoo.optimize import minimize
from scipy.interpolate import RBFInterpolator

CROSSOVER, MUTATION = 0.9, 0.1
# Distribution index of the mutation. METHOD gives none; at pymoo's 20 a rounded level would hardly ever change.
MUTATION_ETA = 1.0


class Predictor:
    """Cubic radial basis functions with a linear tail through measured losses.

    Parameters
    ----------
    designs : ndarray int [n, linears]
        All different.
    losses : ndarray float64 [n]

    Notes
    -----
    The linear tail is determined only if the designs span the whole space. They are therefore expressed in an
    orthonormal basis of what they do span: distances do not change, so with designs that span everything this
    is the ordinary interpolant, and with fewer it is the interpolant of their span.
    Source: METHOD.md section 2.4 (3).
    """

    def __init__(self, designs, losses):
        designs = np.asarray(designs, dtype=np.float64)
        self._centre, self._mean = designs.mean(axis=0), float(np.mean(losses))
        _, singular, basis = np.linalg.svd(designs - self._centre, full_matrices=False)
        self._basis = basis[singular > 1e-9 * max(singular.max(initial=0.0), 1.0)].T
        self._spline = None
        if self._basis.shape[1]:
            self._spline = RBFInterpolator(self._inside(designs), losses, kernel="cubic", degree=1)

    def _inside(self, designs):
        return (np.asarray(designs, dtype=np.float64) - self._centre) @ self._basis

    def __call__(self, designs) -> np.ndarray:
        """Predicted losses float64 [n] of designs [n, linears]."""
        if self._spline is None:  # a single measured design says nothing about others
            return np.full(len(designs), self._mean)
        return self._spline(self._inside(designs))


def random_designs(count, columns, levels, rng):
    """Random designs int64 [count, columns] whose expected mean bits run evenly over the whole range.

    Independent uniform levels would all have nearly the same size, and no small or large budget a first design.
    The first design has the lowest level everywhere, the last the highest.
    """
    share = np.linspace(0.0, 1.0, count)[:, None, None]
    steps = (rng.random((count, columns, len(levels) - 1)) < share).sum(axis=2)
    return np.asarray(levels, dtype=np.int64)[steps]


def non_dominated(losses, sizes) -> np.ndarray:
    """Indices of the designs that no other beats in both loss and size, by increasing size."""
    order = np.lexsort((losses, sizes))
    best, front = np.inf, []
    for index in order:
        if losses[index] < best:
            best = losses[index]
            front.append(index)
    return np.array(front, dtype=np.int64)


def evolve(start, predict, size, levels, *, population, generations, seed) -> np.ndarray:
    """Last population of NSGA-II on (predicted loss, size).

    Parameters
    ----------
    start : ndarray int64 [n, linears]
        First population.
    predict, size : callable
        Designs int64 [n, linears] → float64 [n].
    levels : sequence of int
        Consecutive bit-widths.
    population, generations, seed : int

    Returns
    -------
    ndarray int64 [<= population, linears]
    """
    class Designs(Problem):
        def __init__(self):
            super().__init__(n_var=start.shape[1], n_obj=2, xl=levels[0], xu=levels[-1], vtype=int)

        def _evaluate(self, x, out, *args, **kwargs):
            x = x.astype(np.int64)
            out["F"] = np.column_stack([predict(x), size(x)])

    algorithm = NSGA2(
        pop_size=population, sampling=start, crossover=BinomialCrossover(prob=CROSSOVER),
        mutation=PolynomialMutation(prob=1.0, prob_var=MUTATION, eta=MUTATION_ETA, vtype=float,
                                    repair=RoundingRepair()),
    )
    result = minimize(Designs(), algorithm, ("n_gen", generations), seed=seed, verbose=False)
    return result.pop.get("X").astype(np.int64)


def spread_subset(sizes, taken, count, *, population, generations, seed) -> np.ndarray:
    """Choose `count` candidates so that, with those taken, the sizes are as evenly spaced as possible.

    Parameters
    ----------
    sizes : ndarray float64 [candidates]
    taken : ndarray float64 [n]
        Sizes that are there already.
    count, population, generations, seed : int
        Genetic algorithm on the choice, minimising the standard deviation of the gaps.

    Returns
    -------
    ndarray int64
        Indices of the chosen candidates, increasing; all of them if there are no more than `count`.
    """
    if len(sizes) <= count:
        return np.arange(len(sizes))

    def unevenness(chosen):
        picked = np.broadcast_to(sizes, chosen.shape)[chosen].reshape(len(chosen), count)
        present = np.concatenate([picked, np.broadcast_to(taken, (len(chosen), len(taken)))], axis=1)
        return np.diff(np.sort(present, axis=1), axis=1).std(axis=1) if present.shape[1] > 1 else np.zeros(len(chosen))

    class Choice(Problem):
        def __init__(self):
            super().__init__(n_var=len(sizes), n_obj=1, xl=0, xu=1, vtype=bool)

        def _evaluate(self, x, out, *args, **kwargs):
            out["F"] = unevenness(x.astype(bool))[:, None]

    rng = np.random.default_rng(seed)
    repair = _Exactly(count, rng)
    start = repair.exactly(np.zeros((population, len(sizes)), dtype=bool))
    # Every choice has few members: one change in, one out, on average.
    algorithm = GA(pop_size=population, sampling=start, crossover=BinomialCrossover(prob=CROSSOVER),
                   mutation=BitflipMutation(prob=1.0, prob_var=1.0 / len(sizes)), repair=repair,
                   eliminate_duplicates=True)
    result = minimize(Choice(), algorithm, ("n_gen", generations), seed=seed, copy_algorithm=False, verbose=False)
    return np.flatnonzero(np.asarray(result.X).reshape(-1).astype(bool))


class _Exactly(Repair):
    """Make exactly `count` entries of every row true: drop or add at random."""

    def __init__(self, count, rng):
        super().__init__()
        self.count, self.rng = count, rng

    def exactly(self, chosen):
        keys = chosen + self.rng.random(chosen.shape)  # true entries come before false ones, at random among equals
        kept = np.argpartition(-keys, self.count - 1, axis=1)[:, : self.count]
        result = np.zeros(chosen.shape, dtype=bool)
        np.put_along_axis(result, kept, True, axis=1)
        return result

    def _do(self, problem, X, **kwargs):
        return self.exactly(X.astype(bool))
