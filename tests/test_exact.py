"""The integer program is the optimum, the closed form equals it, and neither greedy nor search is below it."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfmp.allocate import allocate
from sfmp.baselines.exact import exact_allocation, greedy_allocation, search_allocation
from sfmp.checks import SfmpError


@st.composite
def problems(draw, most_blocks=6, equal=None, convex=None):
    """(losses, weights, levels, budget): losses fall with the level, as those of a quantizer do."""
    levels = tuple(sorted(draw(st.sets(st.integers(1, 8), min_size=2, max_size=4))))
    blocks = draw(st.integers(1, most_blocks))
    equal = draw(st.booleans()) if equal is None else equal
    convex = draw(st.booleans()) if convex is None else convex
    sizes = st.just(64) if equal else st.sampled_from([64, 40, 24, 6])
    weights = np.array(draw(st.lists(sizes, min_size=blocks, max_size=blocks)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    salience = draw(st.sampled_from([rng.lognormal(0, 2, blocks), rng.integers(0, 3, blocks).astype(float)]))
    losses = salience[:, None] / (2.0 ** np.array(levels) - 1) ** 2
    if not convex:
        losses = -np.sort(-losses * rng.lognormal(0, 1, losses.shape), axis=1)
    low, high = levels[0] * weights.sum(), levels[-1] * weights.sum()
    return losses, weights, levels, int(low + draw(st.floats(0, 1)) * (high - low))


def total(losses, levels, bits):
    return float(losses[np.arange(len(bits)), np.searchsorted(levels, bits)].sum())


def enumerated(losses, weights, levels, budget):
    """Least loss over all assignments within the budget."""
    best = np.inf
    for choice in itertools.product(range(len(levels)), repeat=len(weights)):
        if sum(levels[c] * w for c, w in zip(choice, weights, strict=True)) <= budget:
            best = min(best, sum(losses[i, c] for i, c in enumerate(choice)))
    return best


@given(problems(most_blocks=5))
@settings(max_examples=60)
def test_integer_program_is_the_enumerated_optimum(problem):
    losses, weights, levels, budget = problem
    bits = exact_allocation(*problem)
    assert bits.dtype == np.uint8 and int((bits * weights).sum()) <= budget
    assert total(losses, levels, bits) == pytest.approx(enumerated(*problem), rel=1e-7, abs=1e-9 * losses.max())


@given(problems(most_blocks=25))
@settings(max_examples=100)
def test_closed_form_is_optimal_for_its_bits_and_within_one_step_of_the_budget(problem):
    """At the budget it used the closed form is the optimum (it minimises loss + price * bits for one price); at the
    nominal one it is above the optimum by at most price * bits left over, which is less than one step of a block."""
    losses, weights, levels, budget = problem
    bits = allocate(*problem, np.zeros(len(weights)))
    used, found = int((bits * weights).sum()), total(losses, levels, bits)
    tolerance = 1e-6 * losses.max()
    assert found == pytest.approx(total(losses, levels, exact_allocation(losses, weights, levels, used)),
                                  rel=1e-7, abs=tolerance)
    price, step = 0.0, 0.0  # the steepest step not taken, from where each block stands
    for i, at in enumerate(np.searchsorted(levels, bits)):
        for higher in range(at + 1, len(levels)):
            fall, cost = losses[i, at] - losses[i, higher], (levels[higher] - levels[at]) * weights[i]
            price, step = max(price, fall / cost), max(step, fall)
    gap = found - total(losses, levels, exact_allocation(*problem))
    assert -tolerance <= gap <= price * (budget - used) + tolerance
    assert gap <= step + tolerance


@given(problems(most_blocks=25, equal=True, convex=True))
@settings(max_examples=60)
def test_equal_blocks_and_convex_losses_leave_no_gap(problem):
    """With steps of equal cost nothing is left over that the optimum could use."""
    losses, weights, _, budget = problem
    levels = (2, 3, 4)
    losses = losses[:, :1] / (2.0 ** np.array(levels) - 1) ** 2
    budget = int(np.clip(budget, 2 * weights.sum(), 4 * weights.sum()))
    closed = total(losses, levels, allocate(losses, weights, levels, budget, np.zeros(len(weights))))
    best = total(losses, levels, exact_allocation(losses, weights, levels, budget))
    assert closed == pytest.approx(best, rel=1e-7, abs=1e-7 * losses.max())
    greedy = total(losses, levels, greedy_allocation(losses, weights, levels, budget))
    assert greedy == pytest.approx(best, rel=1e-7, abs=1e-7 * losses.max())


@given(problems(most_blocks=12))
@settings(max_examples=25)
def test_greedy_and_search_are_feasible_and_never_below_the_optimum(problem):
    losses, weights, levels, budget = problem
    best = total(losses, levels, exact_allocation(*problem))
    for bits in (greedy_allocation(*problem), search_allocation(*problem, seed=0, evaluations=100)):
        assert bits.dtype == np.uint8 and set(bits.tolist()) <= set(levels)
        assert int((bits * weights).sum()) <= budget
        assert total(losses, levels, bits) >= best - 1e-6 * losses.max()


@given(problems(most_blocks=8))
def test_greedy_takes_the_best_next_step_each_time(problem):
    losses, weights, levels, budget = problem
    at = [0] * len(weights)
    while True:
        best, chosen = 0.0, None
        left = budget - sum(levels[c] * w for c, w in zip(at, weights, strict=True))
        for i, c in enumerate(at):
            if c + 1 < len(levels) and (cost := (levels[c + 1] - levels[c]) * weights[i]) <= left:
                rate = (losses[i, c] - losses[i, c + 1]) / cost
                if rate > best:
                    best, chosen = rate, i
        if chosen is None:
            break
        at[chosen] += 1
    assert greedy_allocation(*problem).tolist() == [levels[c] for c in at]


def test_greedy_can_be_beaten():
    """A block that pays only after two steps is invisible to it: the control can lose."""
    losses = np.array([[10.0, 9.9, 0.0], [2.0, 1.0, 0.5]])
    assert greedy_allocation(losses, [8, 8], (2, 3, 4), 48).tolist() == [2, 4]
    assert exact_allocation(losses, [8, 8], (2, 3, 4), 48).tolist() == [4, 2]


def test_search_improves_with_evaluations_and_repeats():
    rng = np.random.default_rng(0)
    losses = rng.lognormal(0, 2, 40)[:, None] / (2.0 ** np.array((2, 3, 4)) - 1) ** 2
    problem = losses, np.full(40, 64), (2, 3, 4), 100 * 64
    first = search_allocation(*problem, seed=1, evaluations=100)
    more = search_allocation(*problem, seed=1, evaluations=4000)
    assert (more == search_allocation(*problem, seed=1, evaluations=4000)).all()
    assert (first != search_allocation(*problem, seed=2, evaluations=100)).any()
    assert total(losses, (2, 3, 4), more) < total(losses, (2, 3, 4), first)
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    search_allocation(*problem, seed=1, evaluations=100)
    assert np.random.random() == expected  # the global generator is not touched


@pytest.mark.parametrize("method", [exact_allocation, greedy_allocation, search_allocation])
def test_bad_input_is_refused_and_one_level_is_no_choice(method):
    losses = np.array([[2.0, 1.0]])
    with pytest.raises(SfmpError, match="losses: expected shape"):
        method(losses, [8, 8], (2, 3), 40)
    with pytest.raises(SfmpError, match="budget: expected at least 16 bits"):
        method(losses, [8], (2, 3), 15)
    with pytest.raises(SfmpError, match="finite"):
        method(losses * np.nan, [8], (2, 3), 40)
    with pytest.raises(SfmpError, match="at least one weight"):
        method(losses, [0], (2, 3), 40)
    assert method(losses[:, :1], [8], (2,), 40).tolist() == [2]


def test_no_proof_in_time_is_an_error():
    rng = np.random.default_rng(0)
    losses = -np.sort(-rng.random((400, 3)), axis=1)
    weights = rng.integers(1000, 100_000, 400)
    with pytest.raises(SfmpError, match="expected a proven optimum"):
        exact_allocation(losses, weights, (2, 3, 4), int(3 * weights.sum()), time_limit=0)
