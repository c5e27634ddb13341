"""Row and column permutations that gather the salient weights of a matrix in a corner; sums over blocks.

Matrices may be numpy arrays or torch tensors of any device; permutations are numpy int64, sums numpy float64.
"""

from collections.abc import Callable, Collection, Mapping

import numpy as np

from sfmp.checks import SfmpError, check_permutation
from sfmp.grid import BlockGrid
from sfmp.spec import CHOICES

_CHUNK = 1 << 22  # weights gathered at a time: bounds the temporary copy at 16 MiB


def as_numpy(array) -> np.ndarray:
    """Return `array` (numpy, nested lists, torch of any dtype and device) as numpy, not copied where possible."""
    if not hasattr(array, "detach"):
        return np.asarray(array)
    tensor = array.detach().cpu()
    return (tensor if str(tensor.dtype) in ("torch.float32", "torch.float64") else tensor.float()).numpy()


def permutations(salience, reorder: str = "both", columns=None) -> tuple[np.ndarray, np.ndarray]:
    """Sort rows and columns by their total salience, highest first.

    Parameters
    ----------
    salience : array or tensor [N, K], >= 0
    reorder : {"both", "rows", "cols", "none"}
    columns : float64 [K], optional
        What the columns are sorted by in place of their own total.

    Returns
    -------
    row_perm, col_perm : int64 [N], int64 [K]
        ``salience[row_perm][:, col_perm]`` is the ordered matrix; ties keep their order, an axis that is not
        reordered has the identity.

    Raises
    ------
    SfmpError
        If `reorder` is unknown or `salience` is not a matrix.

    Notes
    -----
    The sums are float64 and the sort is stable, so the result is the same on every machine; it is computed
    once and stored in the plan. Source: METHOD.md 1.4; avoids 1.12 #3.

    Examples
    --------
    >>> rows, cols = permutations(np.array([[0.0, 1.0], [2.0, 3.0]]))
    >>> rows.tolist(), cols.tolist()
    ([1, 0], [1, 0])
    """
    if reorder not in CHOICES["reorder"]:
        raise SfmpError(f"reorder: expected one of {', '.join(CHOICES['reorder'])}, found {reorder!r}")
    matrix = as_numpy(salience)
    if matrix.ndim != 2:
        raise SfmpError(f"salience: expected a matrix [N, K], found shape {matrix.shape}")

    def order(axis, wanted, totals=None):
        if not wanted:
            return np.arange(matrix.shape[1 - axis], dtype=np.int64)
        totals = matrix.sum(axis=axis, dtype=np.float64) if totals is None else totals
        return np.argsort(-totals, kind="stable").astype(np.int64)

    return order(1, reorder in ("both", "rows")), order(0, reorder in ("both", "cols"), columns)


def shared_columns(salience: Mapping, names: Collection[str], column_sums: Callable) -> dict[str, np.ndarray]:
    """Salience of the columns of matrices that read the same activations: what one order for all of them sorts by.

    An allocation adds up the losses of all matrices, so a column that several read weighs the sum of what it weighs
    in each.

    Parameters
    ----------
    salience : mapping with `readers`
        See sfmp.readers.Salience.
    names : collection of str
        The matrices that are planned; others have no say.
    column_sums : callable name -> float64 [K]
        Salience of each column of one matrix.

    Returns
    -------
    dict name -> float64 [K]
        The same array for all of a group; a matrix that reads alone is left out.

    Raises
    ------
    SfmpError
        If there is no record of some matrix, or it puts matrices of different widths together.
    """
    groups = getattr(salience, "readers", None) or ()
    unknown = sorted(set(names).difference(*groups))
    if unknown:
        raise SfmpError(
            f"salience: expected a record of which matrices read the same activations, as shared_columns=True needs; "
            f"found none of {unknown[0]}. Salience of data keeps one (fisher_salience, activation_salience, "
            "guided_salience; older files and plain dicts have none): compute it again, or pass sfmp.readers.Salience("
            "salience, activation_salience(model, windows[:1]).readers), or leave shared_columns off")
    found = {}
    for group in groups:
        members = sorted(set(group).intersection(names))
        if len(members) > 1:
            sums = [column_sums(name) for name in members]
            if len({len(columns) for columns in sums}) > 1:
                widths = ", ".join(f"{name} {len(columns)}" for name, columns in zip(members, sums, strict=True))
                raise SfmpError(f"salience: expected matrices that read the same activations to have as many columns, "
                                f"found {widths}; is the record of another model?")
            found.update(dict.fromkeys(members, np.sum(sums, axis=0)))
    return found


def apply(matrix, row_perm: np.ndarray, col_perm: np.ndarray):
    """Return ``matrix[row_perm][:, col_perm]`` as a new array or tensor, same dtype and device."""
    rows = check_permutation("row_perm", row_perm, matrix.shape[0])
    cols = check_permutation("col_perm", col_perm, matrix.shape[1])
    if isinstance(matrix, np.ndarray):
        return matrix[rows][:, cols]
    import torch

    device = matrix.device
    return matrix[torch.from_numpy(rows).to(device)][:, torch.from_numpy(cols).to(device)]


def invert(perm: np.ndarray) -> np.ndarray:
    """Return the inverse permutation, int64: ``perm[invert(perm)]`` is 0, 1, 2, ...

    Examples
    --------
    >>> invert(np.array([2, 0, 1])).tolist()
    [1, 2, 0]
    """
    perm = check_permutation("perm", perm)
    inverse = np.empty_like(perm)
    inverse[perm] = np.arange(len(perm))
    return inverse


def block_sums(matrix, row_perm: np.ndarray, col_perm: np.ndarray, grid: BlockGrid) -> np.ndarray:
    """Sum a matrix over the blocks of its permuted form.

    Parameters
    ----------
    matrix : array or tensor [N, K], natural order
    row_perm, col_perm : int64 [N], int64 [K]
    grid : BlockGrid of N x K

    Returns
    -------
    float64 [row_blocks, groups]

    Notes
    -----
    Rows are gathered a few blocks at a time and columns are permuted after the sum over rows, so the permuted
    matrix never exists. Source: METHOD.md 1.3; avoids 1.12 #2.
    """
    array = as_numpy(matrix)
    if array.shape != (grid.out_features, grid.in_features):
        raise SfmpError(f"matrix: expected {grid.out_features} x {grid.in_features}, found {array.shape}")
    rows = check_permutation("row_perm", row_perm, grid.out_features)
    cols = check_permutation("col_perm", col_perm, grid.in_features)
    strips = np.empty((grid.row_blocks, grid.in_features))
    step = max(1, _CHUNK // (grid.block_rows * grid.in_features))
    for first in range(0, grid.row_blocks, step):
        last = min(first + step, grid.row_blocks)
        gathered = array[rows[first * grid.block_rows: last * grid.block_rows]]
        if len(gathered) == (last - first) * grid.block_rows:
            blocks = gathered.reshape(last - first, grid.block_rows, grid.in_features)
            strips[first:last] = blocks.sum(axis=1, dtype=np.float64)
        else:  # the last row block is short
            starts = np.arange(0, len(gathered), grid.block_rows)
            strips[first:last] = np.add.reduceat(gathered, starts, axis=0, dtype=np.float64)
    return np.add.reduceat(strips[:, cols], np.arange(0, grid.in_features, grid.group_size), axis=1)
