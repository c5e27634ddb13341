"""AMQ: search for the bits of every linear with proxy models, a predictor and NSGA-II, then AWQ.

The paper's layer-wise rival. Every linear gets 2, 3 or 4 bits. What the search evaluates is a proxy: the model
with half-quadratic weights in place, judged by the Jensen-Shannon divergence of its logits from full precision.
One search serves every budget.

Source: METHOD.md section 2.4.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from sfmp.apply import quantize_model
from sfmp.baselines.design_search import Predictor, evolve, non_dominated, random_designs, spread_subset
from sfmp.baselines.outcome import Outcome, stored_bytes
from sfmp.baselines.proxy_model import ProxyModel
from sfmp.baselines.search_archive import LEVELS, Search
from sfmp.checks import SfmpError, integer
from sfmp.cost import CostRecord
from sfmp.salience import linear_modules
from sfmp.spec import BlockGrid, MatrixPlan, Plan, QuantSpec

FULL_TOKENS = 128 * 2048  # of one evaluation
FULL_EVALUATIONS, FULL_ITERATIONS = 250 + 200 * 50, 200
FULL_INDIVIDUALS = 200 * 20 + 100 * 60  # judged in one iteration: NSGA-II and the choice of a subset
FROZEN_ABOVE = 2.0  # times the median sensitivity
RANDOM_ROUNDS, RANDOM_DRAWS = 10, 64  # attempts to find random designs that are not in the archive, and their size


def search(model, windows, *, seed=0, group_size=128, n_windows=128, n_tokens=2048, n_initial=250, iterations=200,
           per_iteration=50, population=200, generations=20, subset_population=100, subset_generations=60,
           cost=None) -> Search:
    """Search the designs of a model; the model is left as it was.

    Parameters
    ----------
    model : nn.Module
        Causal language model of any architecture.
    windows : Tensor int64 [n, seqlen]
    seed, group_size : int
    n_windows, n_tokens : int
        Windows (evenly spaced) and first tokens of each that one evaluation runs over.
    n_initial : int
        Random designs evaluated first, evenly spread over the range of mean bits.
    iterations, per_iteration : int
        Rounds of prediction, and designs evaluated in each.
    population, generations : int
        Of NSGA-II on (predicted divergence, mean bits).
    subset_population, subset_generations : int
        Of the genetic algorithm that chooses which new designs to evaluate.
    cost : CostRecord, optional
        Receives the stages ``proxy quantization``, ``sensitivity``, ``prediction`` and ``search``.

    Returns
    -------
    Search

    Raises
    ------
    SfmpError
        If windows or knobs are unusable, or the model has no linear layer.

    Notes
    -----
    Source: METHOD.md section 2.4 (1) to (4). Where METHOD is silent: the designs of the sensitivity stage
    (one linear at 2 bits, the others at 4) are in the archive, since they have been paid for and make the linear
    tail of the predictor well determined; and a round without enough new designs is topped up at random.
    """
    sizes = {"n_initial": (n_initial, 1), "iterations": (iterations, 0), "per_iteration": (per_iteration, 1),
             "population": (population, 2), "generations": (generations, 1),
             "subset_population": (subset_population, 2), "subset_generations": (subset_generations, 1)}
    for name, (value, low) in sizes.items():
        integer(name, value, low)
    knobs = {name: value for name, (value, _) in sizes.items()}
    cost, rng = cost or CostRecord(), np.random.default_rng(seed)
    with ProxyModel(model, windows, LEVELS, group_size, n_windows, n_tokens) as proxy:
        scale = FULL_TOKENS / proxy.windows.numel()
        with cost.stage("proxy quantization", unit="matrix") as stage:
            proxy.quantize()
            stage.units = stage.full_units = len(proxy.names)
        with cost.stage("sensitivity", unit="model evaluation") as stage:
            proxy.remember()
            designs = np.where(np.eye(len(proxy.names), dtype=bool), LEVELS[0], LEVELS[-1])
            sensitivities = np.array([proxy.divergence(design) for design in designs])
            stage.units = stage.full_units = len(designs) + 1  # the full-precision logits are one more
            stage.evaluations, stage.unit_scale = stage.units * len(proxy.windows), scale
        used = dict(zip(("n_windows", "n_tokens"), proxy.windows.shape, strict=True))  # there may be fewer than asked
        used = {**used, **knobs, "seed": seed}
        found = Search(proxy.names, proxy.weights, sensitivities,
                       sensitivities > FROZEN_ABOVE * np.median(sensitivities), int(group_size), used)
        found.add(designs[~found.frozen], sensitivities[~found.frozen])

        def evaluate(proposals):
            with cost.stage("search", unit="model evaluation") as stage:
                found.add(proposals, [proxy.divergence(design) for design in proposals])
                stage.units += len(proposals)
                stage.evaluations = stage.units * len(proxy.windows)
                stage.full_units, stage.unit_scale = FULL_EVALUATIONS, scale

        evaluate(_random_new(found, n_initial, rng))
        for _ in range(iterations):
            with cost.stage("prediction", unit="iteration") as stage:
                proposals = _propose(found, per_iteration, population, generations, subset_population,
                                     subset_generations, rng)
                stage.units, stage.full_units = stage.units + 1, FULL_ITERATIONS
                stage.unit_scale = FULL_INDIVIDUALS / (
                    population * generations + subset_population * subset_generations)
            if not len(proposals):
                break  # every design of a small space has been evaluated
            evaluate(proposals)
    return found


def _propose(found, count, population, generations, subset_population, subset_generations, rng):
    """Up to `count` designs that are not in the archive: NSGA-II on the predictor, then an even subset."""
    free, sizes = ~found.frozen, found.mean_bits
    archive = found.bits[:, free].astype(np.int64)
    front = non_dominated(found.divergences, sizes)
    start = np.concatenate([archive[front], random_designs(population, int(free.sum()), LEVELS, rng)])[:population]
    seeds = rng.integers(2**31, size=2).tolist()
    last = evolve(np.unique(start, axis=0), Predictor(archive, found.divergences),
                  lambda designs: found.size(found.full(designs)), LEVELS,
                  population=population, generations=generations, seed=seeds[0])
    candidates = found.unknown(found.full(last))
    chosen = spread_subset(found.size(candidates), sizes[front], count, population=subset_population,
                           generations=subset_generations, seed=seeds[1])
    candidates = candidates[chosen]
    missing = count - len(candidates)
    if missing:
        extra = _random_new(found, missing, rng, apart_from=candidates)
        candidates = np.concatenate([candidates, extra])
    return candidates


def _random_new(found, count, rng, apart_from=()):
    """Up to `count` different random designs, int64 [n, linears], in neither the archive nor `apart_from`."""
    seen, new = {bytes(d) for d in np.asarray(apart_from, dtype=np.uint8)}, []
    for round_ in range(RANDOM_ROUNDS):
        # The first draw covers the range evenly; later ones replace what it had twice, from anywhere in the range.
        drawn = random_designs(max(count, RANDOM_DRAWS) if round_ else count, int((~found.frozen).sum()), LEVELS, rng)
        if round_:
            rng.shuffle(drawn)
        for design in found.unknown(found.full(drawn)):
            key = bytes(design.astype(np.uint8))
            if key not in seen and len(new) < count:
                seen.add(key)
                new.append(design)
        if len(new) == count:
            break
    return np.array(new, dtype=np.int64).reshape(len(new), len(found.names))


def quantize(model, windows, bpw, *, seed=0, group_size=128, n_windows=128, n_tokens=2048, n_initial=250,
             iterations=200, per_iteration=50, population=200, generations=20, subset_population=100,
             subset_generations=60, tolerance=0.005, found=None) -> Outcome:
    """Quantize `model` in place by AMQ.

    Parameters
    ----------
    model, windows, bpw, seed
        As in :func:`sfmp.baselines.quantize`.
    group_size, n_windows, n_tokens, n_initial, iterations, per_iteration, population, generations, \
subset_population, subset_generations
        As in :func:`search`; the defaults are those of the publication.
    tolerance : float
        Bits below the budget within which a design counts as hitting it (:meth:`Search.best`).
    found : Search or path-like, optional
        Result of an earlier :func:`search` of this model, or the file it was saved to, instead of a search now.

    Returns
    -------
    Outcome
        Stages of :func:`search` and ``quantization``; `bpw` is what the chosen design reached.

    Raises
    ------
    SfmpError
        If the budget is outside what the search can reach, or `found` is of another model, group size
        or seed.
    """
    spec = QuantSpec(bpw=bpw, group_size=group_size, levels=LEVELS, reorder="none", method="awq", seed=seed,
                     block_rows=max(m.out_features for m in linear_modules(model).values()))
    cost, shared = CostRecord(), found is not None
    if not shared:
        found = search(model, windows, seed=seed, group_size=group_size, n_windows=n_windows, n_tokens=n_tokens,
                       n_initial=n_initial, iterations=iterations, per_iteration=per_iteration,
                       population=population, generations=generations, subset_population=subset_population,
                       subset_generations=subset_generations, cost=cost)
    elif not isinstance(found, Search):
        found = Search.load(found)
    _check_found(found, model, group_size, seed)
    index, within = found.best(Fraction(repr(spec.bpw)) - Fraction(32, group_size), tolerance)
    plan = plan_of(spec, model, dict(zip(found.names, found.bits[index].tolist(), strict=True)))
    with cost.stage("quantization", unit="matrix") as stage:
        quantize_model(model, plan, windows)
        stage.units = stage.full_units = len(plan)
    notes = {
        "knobs": {**found.knobs, "group_size": group_size, "tolerance": tolerance},
        "search_shared": shared, "archive": len(found.bits),
        "frozen": [name for name, frozen in zip(found.names, found.frozen, strict=True) if frozen],
        "sensitivities": dict(zip(found.names, found.sensitivities.tolist(), strict=True)),
        "wbits": plan.wbits, "divergence": float(found.divergences[index]), "within_tolerance": within,
    }
    return Outcome(model, plan.bpw, sum(stored_bytes(model).values()), cost, plan, notes)


def plan_of(spec, model, bits) -> Plan:
    """Plan without reordering that gives each matrix one bit-width, by name.

    Parameters
    ----------
    spec : QuantSpec
        With `block_rows` at least the rows of every matrix.
    model : nn.Module
    bits : dict of str to int

    Returns
    -------
    Plan
    """
    matrices = {}
    for name, linear in linear_modules(model).items():
        grid = BlockGrid(*linear.weight.shape, spec.block_rows, spec.group_size)
        matrices[name] = MatrixPlan(np.arange(grid.out_features), np.arange(grid.in_features),
                                    np.full((grid.row_blocks, grid.groups), bits[name], dtype=np.uint8))
    return Plan(spec, matrices)


def _check_found(found, model, group_size, seed):
    shapes = {name: linear.weight.numel() for name, linear in linear_modules(model).items()}
    if dict(zip(found.names, found.weights.tolist(), strict=True)) != shapes:
        raise SfmpError(f"found: expected a search of this model ({len(shapes)} linears), found one of "
                        f"{len(found.names)} linears with other names or sizes; search this model")
    if found.group_size != group_size:
        raise SfmpError(f"found: expected a search at group_size {group_size}, found {found.group_size}; "
                        "search again")
    if found.knobs.get("seed", seed) != seed:
        raise SfmpError(f"found: expected a search with seed {seed}, as this run has, found one with seed "
                        f"{found.knobs['seed']}; search again or pass that seed")
