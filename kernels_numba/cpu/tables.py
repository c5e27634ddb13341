"""Tables of the activations: gather by col_perm, then all 16 signed sums of every 4 columns, or for `signs` copies.

The work is per token and tile column: the columns of one tile, 32, 64 or 128. Integer entries share one step per tile
column, largest |entry| / (127 or 32700), so an outlier costs precision only in its own columns.

Activations that are not finite, or so large that a sum of the tile column may overflow, cannot be quantized: the
builder reports them and the caller multiplies with the dequantized weight instead, so they propagate as in torch. In
the modes with integer entries, a tile column whose |x| sums stay below 2^-100 gets tables of zeros: its look-ups add
nothing, while Σ x · beta stays.

Source: CPU.md section 5 (table build).
"""

from __future__ import annotations

from numba import types
from numba.core.errors import RequireLiteralValue
from numba.extending import intrinsic

from kernels_numba.cpu import signs, targets
from kernels_numba.cpu.records import table_bytes
from kernels_numba.cpu.simd import FLOAT, FLOATS, INTS, LANES, LONG, VECTOR, Simd

_TOP = {"lut8": 127.0, "lut16": 32700.0}  # largest |entry|; 32700 leaves room for the rounding of the product
_LARGEST, _SMALLEST = 2.0**120, 2.0**-100


@intrinsic
def build_tables(typing, target, mode, columns, x, indices, record):
    """Write the table record of one token over the columns of a tile; return 0, or 1 if it cannot be done.

    Parameters
    ----------
    target, mode, columns : literals
    x, indices, record : int64
        Addresses: float32 activations in natural order; int32 [columns], where each column is found in x; the record.
    """
    for literal in (target, mode, columns):
        if not isinstance(literal, types.Literal):
            raise RequireLiteralValue(literal)
    vectors = targets.vectors(target.literal_value)
    fixed = mode.literal_value, columns.literal_value
    signature = types.int64(target, mode, columns, types.int64, types.int64, types.int64)

    def codegen(context, builder, signature, arguments):
        return write_tables(vectors(builder), *fixed, *arguments[3:])

    return signature, codegen


def write_tables(v: Simd, mode, columns, x, indices, record):
    b = v.builder
    gathered = v.stack(4 * columns)
    zero = v.constant(FLOATS, 0.0)
    total, total_size, largest = zero, zero, zero
    values = []
    for part in range(0, 4 * columns, VECTOR):
        value = v.gather(x, v.load(INTS, v.at(indices, part)))
        values.append(value)
        size = v.magnitude(value)
        total, total_size = v.fadd(total, value), v.fadd(total_size, size)
        largest = v.maximum(v.sum_of_four(size), largest)
    largest = v.reduce_maximum(largest)
    fine = b.fcmp_ordered("<", v.reduce_sum(total_size), FLOAT(_LARGEST))  # false for NaN too
    step, scale = FLOAT(1.0), None
    if mode != "exact":
        normal = b.fcmp_ordered(">", largest, FLOAT(_SMALLEST))
        step = b.select(normal, b.fmul(largest, FLOAT(1 / _TOP[mode])), FLOAT(0.0))
        scale = b.select(normal, b.fdiv(FLOAT(_TOP[mode]), largest), FLOAT(0.0))
        scale = v.splat(b.select(fine, scale, FLOAT(0.0)))
    for part, value in enumerate(values):
        v.store(v.at(gathered, VECTOR * part), v.fmul(value, scale) if scale else value)
    with v.loop(columns // 4) as table:
        four = v.at(gathered, v.times(table, 4 * 4))
        if v.kernels == "signs":
            v.store(v.at(record, v.times(table, VECTOR)), v.load_each(four, signs.COPIES))
        else:
            _write(v, mode, columns, record, table, _signed_sums(v, four))
    tail = v.at(record, table_bytes(columns, mode) - VECTOR)
    v.store(tail, step, 4)
    v.store(v.at(tail, 4), v.reduce_sum(total), 4)
    return b.zext(b.not_(fine), LONG)


def _signed_sums(v, four):
    """The 16 sums of 4 float32 in memory; bit i of an entry's number is the sign of the i-th."""
    ones = [v.constant(FLOATS, [1.0 if entry >> bit & 1 else -1.0 for entry in range(LANES)]) for bit in range(4)]
    entries = v.fmul(v.load_splat(FLOAT, four), ones[0])
    for bit in range(1, 4):
        entries = v.fma(v.load_splat(FLOAT, v.at(four, 4 * bit)), ones[bit], entries)
    return entries


def _write(v, mode, columns, record, table, entries):
    """Entries of one table → memory, in the bytes of the mode."""
    if mode == "exact":
        v.store(v.at(record, v.times(table, VECTOR)), entries)
        return
    rounded, target = v.rounded(entries), v.at(record, v.times(table, LANES))
    if mode == "lut16":
        v.store_low_bytes(v.at(target, 4 * columns), rounded)
        rounded = v.right(rounded, 8)
    if v.biased:
        rounded = v.add(rounded, v.constant(INTS, 128))
    v.store_low_bytes(target, rounded)
