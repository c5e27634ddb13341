"""Budget to bits per block, without search: one Lagrange threshold over the blocks' lower convex hulls."""

import contextlib
import dataclasses
from collections.abc import Mapping

import numpy as np

from sfmp.checks import SfmpError, is_skipped
from sfmp.grid import BlockGrid
from sfmp.reorder import apply, as_numpy, block_sums, permutations, shared_columns
from sfmp.spec import MatrixPlan, Plan, QuantSpec


def allocate(losses, weights, levels, budget_bits: int, tie_salience) -> np.ndarray:
    """Choose one level per block so that the total loss is least within a budget of code bits.

    Every block starts at the lowest level. The steps along each block's lower convex hull are sorted by loss
    removed per bit, and the longest prefix that fits is taken: the optimum for the bits that it uses, less
    than one step below the budget, never above. Harmful steps come last, and are taken while bits remain.

    Parameters
    ----------
    losses : float64 [blocks, levels]
        Loss of each block at each level.
    weights : int64 [blocks]
        Weights of each block; a level costs level * weights bits.
    levels : sequence of int, increasing
    budget_bits : int
        Total code bits allowed.
    tie_salience : float64 [blocks]
        Among equally good steps, blocks of higher salience go first, then the earlier block.

    Returns
    -------
    uint8 [blocks]

    Raises
    ------
    SfmpError
        If the shapes differ, a loss is not finite, or the lowest level alone exceeds the budget.

    Notes
    -----
    O(blocks * levels * log) time. Source: METHOD.md 1.3 (closed form); avoids 1.12 #4.

    Examples
    --------
    >>> allocate([[1.0, 0.2], [4.0, 1.0]], [8, 8], (2, 3), 40, [1.0, 4.0]).tolist()
    [2, 3]
    """
    losses = np.asarray(losses, dtype=np.float64)
    weights = np.asarray(weights, dtype=np.int64)
    tie_salience = np.asarray(tie_salience, dtype=np.float64)
    levels = np.asarray(levels, dtype=np.int64)
    blocks = len(weights)
    if losses.shape != (blocks, len(levels)) or tie_salience.shape != (blocks,):
        raise SfmpError(f"losses: expected shape {(blocks, len(levels))} and tie_salience {(blocks,)}, "
                        f"found {losses.shape} and {tie_salience.shape}")
    if not np.isfinite(losses).all():
        raise SfmpError(f"losses: expected finite numbers, found {losses[~np.isfinite(losses)][0]} in block "
                        f"{int(np.argwhere(~np.isfinite(losses))[0, 0])}")
    room = int(budget_bits) - int(levels[0] * weights.sum())
    if room < 0:
        raise SfmpError(f"budget: expected at least {int(levels[0] * weights.sum())} bits (every block at "
                        f"{levels[0]}), found {budget_bits}; raise bpw or add a lower level")
    if blocks == 0 or len(levels) == 1:
        return np.full(blocks, levels[0], dtype=np.uint8)

    slopes, gained = _hull_steps(losses, levels)
    slopes = slopes / weights[:, None]
    real = gained > 0
    owner = np.nonzero(real)[0]  # block of each step, in block order and, inside a block, in level order
    slope, cost = slopes[real], (gained * weights[:, None])[real]
    chosen = np.ones(len(owner), dtype=bool)
    order = np.argsort(-slope)
    fitting = np.searchsorted(np.cumsum(cost[order]), room, side="right")
    if fitting < len(order):
        # The order inside a tie matters only at the threshold itself, so a full stable sort is not needed.
        threshold = slope[order[fitting]]
        chosen = slope > threshold
        tied = np.flatnonzero(slope == threshold)
        tied = tied[np.argsort(-tie_salience[owner[tied]], kind="stable")]
        left = room - int(cost[chosen].sum())
        chosen[tied[:np.searchsorted(np.cumsum(cost[tied]), left, side="right")]] = True
    bits = levels[0] + np.bincount(owner[chosen], weights=gained[real][chosen], minlength=blocks)
    return bits.astype(np.uint8)


def _hull_steps(losses, levels):
    """Walk every block's lower convex hull from the lowest level to the highest.

    Returns slopes float64 (loss removed per bit of every weight) and gained int64 (bits of the step, 0 past
    the end), both [blocks, levels - 1]; slopes never increase in a row, so a sorted prefix holds whole walks.
    """
    blocks, count = losses.shape
    at, every = np.zeros(blocks, dtype=np.int64), np.arange(blocks)
    slopes = np.full((blocks, count - 1), -np.inf)
    gained = np.zeros((blocks, count - 1), dtype=np.int64)
    for step in range(count - 1):
        run = levels[None, :] - levels[at][:, None]
        fall = losses[every, at][:, None] - losses
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = np.where(run > 0, fall / run, -np.inf)
        best = rate.argmax(axis=1)  # the first of equals: collinear points stay on the walk
        moving = at < count - 1
        slopes[moving, step] = rate[every, best][moving]
        gained[moving, step] = run[every, best][moving]
        at = np.where(moving, best, at)
    return np.minimum.accumulate(slopes, axis=1), gained


def make_plan(salience: Mapping, spec: QuantSpec, model=None) -> Plan:
    """Decide permutations and bit-widths of every matrix.

    Parameters
    ----------
    salience : mapping name -> array or tensor [N, K], >= 0, natural order
        Read one matrix at a time, so a lazily loading mapping keeps one in memory. `shared_columns` needs its
        `readers` (sfmp.readers.Salience).
    spec : QuantSpec
        Its `skip` names are left out.
    model : torch.nn.Module, optional
        Needed by ``objective="measured"`` only; its module of each name holds the weight [N, K].

    Returns
    -------
    Plan
        In each scope, and in total, the bits used are at most the budget and less than one block's step below
        it; bits that one scope could not use pass on to the next.

    Raises
    ------
    SfmpError
        If a salience matrix is not 2-D, negative or not finite, nothing is left to plan, the model is
        missing or does not match, or nobody recorded which matrices may share columns.

    Notes
    -----
    Ties go by salience (descending), name, block index, so the order of the mapping has no effect.
    Source: paper v1 Eq. 7; METHOD.md 1.3, 1.4; avoids 1.12 #2-#5.
    """
    if not isinstance(spec, QuantSpec) or not isinstance(salience, Mapping):
        raise SfmpError("make_plan: expected (mapping of salience, QuantSpec), found "
                        f"({type(salience).__name__}, {type(spec).__name__}); see fisher_salience and QuantSpec")
    if spec.objective == "measured" and model is None:
        raise SfmpError('model: expected a model, as objective="measured" quantizes its weights; '
                        "found None; call make_plan(salience, spec, model)")
    return solve(block_problem(salience, spec, model))


def solve(problem) -> Plan:
    """Return the plan with the least loss within the budget of ``problem.spec`` (a `BlockProblem`); see `make_plan`."""
    grids, spec = problem.grids, problem.spec
    bits, carried = {}, 0
    for members in _scopes(list(grids), spec.scope):
        losses, weights, sums = problem.arrays(members)
        budget = spec.budget_bits(int(weights.sum())) + carried
        chosen = allocate(losses, weights, spec.candidate_levels, budget, sums)
        carried = budget - int((chosen * weights).sum())
        ends = np.cumsum([grids[name].weights.size for name in members])[:-1]
        bits.update(zip(members, np.split(chosen, ends), strict=True))
    return problem.plan(np.concatenate([bits[name] for name in grids]))


@dataclasses.dataclass(frozen=True)
class BlockProblem:
    """What an allocation decides on, by matrix in the order of names.

    Attributes
    ----------
    spec : QuantSpec
    permuted : dict name -> (row_perm, col_perm)
    grids : dict name -> BlockGrid
    sums : dict name -> float64 [blocks], salience of each block
    losses : dict name -> float64 [blocks, levels], loss of each block at each candidate level
    """

    spec: QuantSpec
    permuted: dict
    grids: dict
    sums: dict
    losses: dict

    def arrays(self, names=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return losses [blocks, levels], weights int64 [blocks] and salience [blocks] of some matrices, or of all."""
        names = list(self.grids) if names is None else names
        return (np.concatenate([self.losses[name] for name in names]),
                np.concatenate([self.grids[name].weights.ravel() for name in names]),
                np.concatenate([self.sums[name] for name in names]))

    def plan(self, bits) -> Plan:
        """Return the plan that gives the blocks of all matrices, one after the other, these bits."""
        ends = np.cumsum([grid.weights.size for grid in self.grids.values()])[:-1]
        parts = zip(self.grids.items(), np.split(np.asarray(bits), ends), strict=True)
        return Plan(self.spec, {name: MatrixPlan(*self.permuted[name], part.reshape(grid.weights.shape))
                                for (name, grid), part in parts})


def block_problem(salience: Mapping, spec: QuantSpec, model=None) -> BlockProblem:
    """Permute every matrix and measure every block at every level; arguments and errors as in `make_plan`."""
    names = sorted(name for name in salience if not is_skipped(name, spec.skip))
    if not names:
        raise SfmpError(f"salience: expected a matrix that skip={spec.skip} keeps, found {list(salience)}")

    def column_sums(name):
        return _checked(name, salience[name]).sum(axis=0, dtype=np.float64)

    problem = BlockProblem(spec, {}, {}, {}, {})
    sharing = spec.shared_columns and spec.reorder in ("both", "cols")  # the natural order is everybody's
    columns = shared_columns(salience, names, column_sums) if sharing else {}
    with contextlib.ExitStack() as exposed:
        if model is not None:
            from sfmp.unfuse import linears_exposed

            exposed.enter_context(linears_exposed(model))
        for name in names:
            matrix = _checked(name, salience[name])
            rows, cols = permutations(matrix, spec.reorder, columns.get(name))
            grid = BlockGrid(*matrix.shape, spec.block_rows, spec.group_size)
            problem.permuted[name], problem.grids[name] = (rows, cols), grid
            problem.sums[name] = block_sums(matrix, rows, cols, grid).ravel()
            problem.losses[name] = level_losses(name, matrix, rows, cols, grid, spec, model, problem.sums[name])
    return problem


def _checked(name, matrix):
    matrix = as_numpy(matrix)
    if matrix.ndim != 2 or matrix.size == 0:
        raise SfmpError(f"salience[{name}]: expected a matrix [N, K], found shape {matrix.shape}")
    if matrix.dtype.kind not in "fiu":
        raise SfmpError(f"salience[{name}]: expected numbers, found {matrix.dtype}; use fisher_salience")
    low = matrix.min()
    if not (low >= 0 and np.isfinite(matrix.max())):
        raise SfmpError(f"salience[{name}]: expected finite numbers >= 0, found {low} to {matrix.max()}; "
                        "compute the salience again with the model in float32 or bfloat16")
    return matrix


def level_losses(name, matrix, rows, cols, grid, spec, model, sums=None) -> np.ndarray:
    """Loss of each block of one matrix at each candidate level, float64 [blocks, levels].

    `matrix` is its salience in natural order, `sums` the salience of its blocks (``objective="paper"`` only);
    `model` is needed by ``objective="measured"``.
    """
    levels = spec.candidate_levels
    if spec.objective == "paper":
        # Same range for every block, so the error of b bits goes with the squared step, 1 / (2^b - 1)^2.
        return sums[:, None] / (2.0 ** np.array(levels) - 1.0) ** 2
    if len(levels) == 1:
        return np.zeros((grid.row_blocks * grid.groups, 1))
    import torch

    from sfmp.quantize import dequantize, quantize
    from sfmp.salience import check_in_memory

    try:
        layer = model.get_submodule(name)
        check_in_memory({name: layer}, 'objective="measured"')
        weight = layer.weight.detach().float().cpu()
    except AttributeError as error:
        raise SfmpError(f"model: expected the module {name!r} of the salience; {error}") from error
    if tuple(weight.shape) != matrix.shape:
        raise SfmpError(f"model: expected {name}.weight of shape {matrix.shape}, as in the salience, "
                        f"found {tuple(weight.shape)}")
    weight, importance = apply(weight, rows, cols), apply(matrix, rows, cols)
    natural = np.arange(grid.out_features), np.arange(grid.in_features)
    columns = []
    for level in levels:
        bits = torch.full((grid.row_blocks, grid.groups), level, dtype=torch.uint8)
        rebuilt = dequantize(quantize(weight, bits, group_size=grid.group_size, block_rows=grid.block_rows))
        error = as_numpy(weight - rebuilt).astype(np.float64)
        columns.append(block_sums(importance * error**2, *natural, grid).ravel())
    return np.stack(columns, axis=1)


def _scopes(names, scope):
    """Split sorted names into the lists that share a budget."""
    if scope == "global":
        return [names]
    if scope == "matrix":
        return [[name] for name in names]
    layers = {}
    for name in names:
        parts = name.split(".")
        first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        # A matrix outside the numbered layers shares its budget with the others of that kind.
        layers.setdefault("" if first is None else ".".join(parts[: first + 1]), []).append(name)
    return list(layers.values())
