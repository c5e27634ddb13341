"""The tile kernel for processors without look-ups: every bit of a plane is the sign of an activation.

Loops over words and planes keep the code short, since a vector may take many registers. In the place of a table of 4
columns there are 4 copies of each of their activations, which a register of 16 bytes loads without spreading.
"""

from __future__ import annotations

from kernels_numba.cpu import lut
from kernels_numba.cpu.records import VECTOR, WORD_COLUMNS
from kernels_numba.cpu.simd import FLOAT, FLOATS, INT, INTS

COPIES = 4
_SIGN = -(1 << 31)


class Floats(lut.Kernel):
    """float32 activations."""

    mode = "exact"

    def multiply(self, tile):
        """Return the totals of the tokens, one after the other: their sums would not fit into registers together."""
        v = self.v
        found = v.stack(self.tokens * VECTOR)
        with v.loop(self.tokens) as token:
            total = self._multiply(tile, v.at(self.tables[0], v.builder.mul(token, self.table_step)))
            v.store(v.at(found, v.times(token, VECTOR)), total)
        return [v.load(FLOATS, v.at(found, token * VECTOR)) for token in range(self.tokens)]

    def _multiply(self, tile, table):
        v = self.v
        total = v.stack(VECTOR)
        v.store(total, v.constant(FLOATS, 0.0))
        with v.loop(self.words) as word, v.loop(self.bits) as plane:
            line = v.load(INTS, v.at(tile, v.times(v.builder.add(v.times(word, self.bits), plane), VECTOR)))
            found = self._signed_sum(line, v.at(table, v.times(word, WORD_COLUMNS // 4 * VECTOR)))
            v.store(total, v.fadd(v.load(FLOATS, total), v.fmul(self._power_of_two(plane), found)))
        return v.load(FLOATS, total)

    def _signed_sum(self, line, x):
        """Σ ±x over the columns of a word, in two chains that hide the latency of an addition."""
        v, b = self.v, self.v.builder
        cleared = b.not_(line)  # a bit that is not set is a sign
        sums = [v.constant(FLOATS, 0.0)] * 2
        for bit in range(WORD_COLUMNS):
            nibble = bit // 8 + bit % 8 // 4 * 4  # byte j of a word holds nibbles j and 4 + j
            sign = b.and_(b.shl(cleared, v.constant(INTS, WORD_COLUMNS - 1 - bit)), v.constant(INTS, _SIGN))
            copies = v.load_repeated(v.at(x, nibble * VECTOR + bit % 4 * VECTOR // COPIES), COPIES)
            signed = b.bitcast(b.xor(v.as_ints(copies), sign), FLOATS)
            sums[bit % 2] = v.fadd(sums[bit % 2], signed)
        return v.fadd(*sums)

    def _power_of_two(self, exponent):
        b = self.v.builder
        bits = b.shl(b.add(b.trunc(exponent, INT), INT(127)), INT(23))
        return self.v.splat(b.bitcast(bits, FLOAT))


KERNELS = {"exact": Floats}
