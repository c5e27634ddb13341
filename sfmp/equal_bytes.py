"""A budget in stored bytes: how many bits per weight are left for codes once everything else is paid for.

The paper's bits per weight count codes, scales and offsets. A block-mixed matrix also stores its bit map, its
permutations and the padding of ragged edges; here these count too. Source: METHOD.md section 4, E5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fractions import Fraction

from sfmp.checks import SfmpError, is_skipped
from sfmp.grid import BlockGrid
from sfmp.packed import permutation_dtype
from sfmp.spec import QuantSpec

AFFINE_BYTES = 4  # a float16 scale and a float16 offset for each group of a row


def fixed_bytes(shapes: Mapping[str, tuple[int, int]], spec: QuantSpec) -> dict[str, int]:
    """Bytes by part that do not depend on which block gets how many bits.

    Parameters
    ----------
    shapes : mapping name -> (out_features, in_features)
    spec : QuantSpec
        Its `skip` names are left out.

    Returns
    -------
    dict
        `affine`, `bit_map`, `permutations`, and `padding`: the most that padded codes can take (all of them in
        blocks of the highest level; nothing where the shapes are multiples of the block).
    """
    parts = dict.fromkeys(("affine", "bit_map", "permutations", "padding"), 0)
    for rows, columns, grid in _matrices(shapes, spec):
        parts["affine"] += AFFINE_BYTES * rows * grid.groups
        parts["bit_map"] += grid.row_blocks * grid.groups
        sizes = {"both": (rows, columns), "rows": (rows,), "cols": (columns,), "none": ()}[spec.reorder]
        parts["permutations"] += sum(size * permutation_dtype(size)(0).itemsize for size in sizes)
        stored = grid.row_blocks * grid.block_rows * grid.groups * grid.group_size
        parts["padding"] += -(-(stored - rows * columns) * spec.candidate_levels[-1] // 8)
    return parts


def spec_for_stored(shapes: Mapping[str, tuple[int, int]], spec: QuantSpec) -> QuantSpec:
    """Lower the bits per weight so that all stored bytes of any plan fit ``floor(bpw · weights / 8)``.

    Parameters
    ----------
    shapes : mapping name -> (out_features, in_features)
        Of the matrices that will be planned.
    spec : QuantSpec
        Its `bpw` is the budget of stored bits per weight.

    Returns
    -------
    QuantSpec
        The same, with a smaller `bpw` (codes, scales and offsets, as everywhere). A plan made from it stores at
        most the budget; the gap is less than one block's step, plus what padding was reserved but not used.

    Raises
    ------
    SfmpError
        If what is left cannot give every weight the lowest level; the least feasible budget is named.

    Examples
    --------
    >>> spec = QuantSpec(bpw=3.0, group_size=128, block_rows=64, reorder="none")
    >>> round(spec_for_stored({"layer": (128, 256)}, spec).bpw, 4)  # 4 bytes of bit map on 32,768 weights
    2.999
    """
    weights = sum(rows * columns for rows, columns, _ in _matrices(shapes, spec))
    if not weights:
        raise SfmpError(f"shapes: expected a matrix that skip={spec.skip} keeps, found {list(shapes)}")
    fixed = sum(fixed_bytes(shapes, spec).values())
    target = int(Fraction(repr(spec.bpw)) * weights / 8)
    code_bits = 8 * (target - fixed)
    lowest = spec.candidate_levels[0]
    if code_bits < lowest * weights:
        least = 8 * (fixed + lowest * weights / 8) / weights
        raise SfmpError(f"bpw: {spec.bpw:g} bits per weight of stored bytes leave {code_bits / weights:.4f} for codes, "
                        f"the lowest level needs {lowest}; choose bpw >= {least:.4f} or other levels")
    # Half a bit keeps the whole number of bits safe from the rounding of a float.
    wbits = Fraction(2 * min(code_bits, spec.candidate_levels[-1] * weights) + 1, 2 * weights)
    wbits = min(wbits, Fraction(spec.candidate_levels[-1]))
    return dataclasses.replace(spec, bpw=float(wbits + Fraction(32, spec.group_size)))


def _matrices(shapes, spec):
    """(rows, columns, grid) of each matrix as it is stored: a single row block has no more rows than the matrix."""
    for name, (rows, columns) in shapes.items():
        if not is_skipped(name, spec.skip):
            yield rows, columns, BlockGrid(rows, columns, min(spec.block_rows, rows), spec.group_size)
