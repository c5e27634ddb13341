"""Integer tile kernels for processors whose look-ups read 16 entries at a time and have no dot product of bytes.

The layout is that of all targets: a 64-byte line has 16 rows of 4 bytes, byte j with nibbles for tables j and 4 + j.
Turned round into 4 lanes of 16 rows it indexes 4 tables at once, one in each lane, and the entries are added up as
unsigned 16-bit numbers. So a few planes are added, each after doubling what came before, as long as the sum fits; then
lanes are summed to int32 exactly. The integers, and hence the results, are those of `lut`.

Signed bytes of tables are stored + 128 (`Simd.biased`), which the total gives back.
"""

from __future__ import annotations

from kernels_numba.cpu import lut
from kernels_numba.cpu.records import VECTOR
from kernels_numba.cpu.simd import BYTES, INTS

_LARGEST = 255  # unsigned entry


class Bytes(lut.Bytes):
    """int8 entries."""

    def multiply(self, tile):
        """Return the totals of the tokens; the planes are taken from the top."""
        totals, planes = None, list(reversed(range(self.bits)))
        while planes:
            group, planes = planes[: self._planes_that_fit()], planes[self._planes_that_fit() :]
            found = self._multiply(tile, group)
            if totals is not None:
                found = [[self.v.add(self.v.left(total, len(group)), part) for total, part in zip(*pair, strict=True)]
                         for pair in zip(totals, found, strict=True)]
            totals = found
        return [self.total([[part] for part in self._unbiased(parts)]) for parts in totals]

    def _planes_that_fit(self) -> int:
        """Planes whose sum, in one lane, is below 2^16."""
        largest = self.words * self.steps * (VECTOR // self.v.lane_vector) * _LARGEST
        return max(planes for planes in range(1, 9) if largest * ((1 << planes) - 1) < 1 << 16)

    def _multiply(self, tile, planes):
        """Sums of the planes for each token and part of an entry, as int32 for 16 rows."""
        v = self.v
        sums = [[v.no_lane_sums() for _ in range(self.parts)] for _ in range(self.tokens)]
        for plane in planes:
            lines = [v.rows_to_lanes(v.load(BYTES, v.at(tile, (word * self.bits + plane) * VECTOR)))
                     for word in range(self.words)]
            places = [(word, step, v.nibbles(line, step)) for word, line in enumerate(lines)
                      for step in range(self.steps)]
            for token, parts in enumerate(sums):
                if plane != planes[0]:
                    parts[:] = [v.doubled(part) for part in parts]
                for word, step, index in places:
                    for part, table in enumerate(self.tables_of(token, word, step)):
                        for entries in v.lookup_lanes(table, index):
                            parts[part] = v.add_to_lanes(parts[part], entries)
        return [[v.rows_of_lanes(part) for part in parts] for parts in sums]

    def _unbiased(self, parts):
        """Only the highest byte of an entry has a sign."""
        bias = 128 * (self.columns // 4) * ((1 << self.bits) - 1)
        return [self.v.add(parts[0], self.v.constant(INTS, -bias)), *parts[1:]]


class Shorts(Bytes, lut.Shorts):
    """int16 entries as a high and a low byte, which has no sign."""

    parts, mode, total = 2, "lut16", lut.Shorts.total


KERNELS = {"lut8": Bytes, "lut16": Shorts, "exact": lut.Floats}
