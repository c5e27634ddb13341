"""Integer tile kernels for processors whose look-ups read 16 entries at a time and have no dot product of bytes.

The layout is that of all targets: a 64-byte line has 16 rows of 4 bytes, byte j with nibbles for tables j and 4 + j.
Turned round into 4 lanes of 16 rows it indexes 4 tables at once, one in each lane, and the entries are added up as
unsigned 16-bit numbers. So a few planes are added, each after doubling what came before, as long as the sum fits; then
lanes are summed to int32 exactly. The integers, and hence the results, are those of `lut`.

Signed bytes of tables are stored + 128 (`Simd.biased`), which the total gives back.
"""

from __future__ import annotations

import functools

from kernels_numba.cpu import lut
from kernels_numba.cpu.records import VECTOR
from kernels_numba.cpu.simd import BYTES, INTS

_LARGEST = 255  # unsigned entry


class Bytes(lut.Bytes):
    """int8 entries."""

    def multiply(self, tile):
        """Return the total of each token; several tokens are a loop that reads the indices from the stack."""
        v = self.v
        if self.tokens == 1:
            return [self.total([[part] for part in self._integers(functools.partial(self._indices, tile))])]
        count = self.words * self.steps
        stored, found = v.stack(self.bits * count * VECTOR), v.stack(self.tokens * self.parts * VECTOR)
        for plane in range(self.bits):
            for number, index in enumerate(self._indices(tile, plane)):
                v.store(v.at(stored, (plane * count + number) * VECTOR), index)
        tables = self.tables
        with v.loop(self.tokens) as token:
            self.tables = [v.at(tables[0], v.builder.mul(token, self.table_step))]
            parts = self._integers(lambda plane: [v.load(BYTES, v.at(stored, (plane * count + number) * VECTOR))
                                                  for number in range(count)])
            for number, part in enumerate(parts):
                v.store(v.at(found, v.at(v.times(token, self.parts * VECTOR), number * VECTOR)), part)
        self.tables = tables
        places = [[v.at(found, (token * self.parts + part) * VECTOR) for part in range(self.parts)]
                  for token in range(self.tokens)]
        return [self.total([[v.load(INTS, place)] for place in parts]) for parts in places]

    def _indices(self, tile, plane):
        """Indices into the tables of each word and step."""
        v = self.v
        lines = [v.rows_to_lanes(v.load(BYTES, v.at(tile, (word * self.bits + plane) * VECTOR)))
                 for word in range(self.words)]
        return [v.nibbles(line, step) for line in lines for step in range(self.steps)]

    def _integers(self, indices):
        """Total of a token for each part of an entry, as int32 for 16 rows; ``indices(plane)`` as `_indices`."""
        v, totals, planes = self.v, None, list(reversed(range(self.bits)))
        while planes:
            group, planes = planes[: self._planes_that_fit()], planes[self._planes_that_fit() :]
            found = [v.rows_of_lanes(sums) for sums in self._sums(indices, group)]
            if totals is not None:
                found = [v.add(v.left(total, len(group)), part) for total, part in zip(totals, found, strict=True)]
            totals = found
        bias = 128 * (self.columns // 4) * ((1 << self.bits) - 1)  # only the highest byte of an entry has a sign
        return [v.add(totals[0], v.constant(INTS, -bias)), *totals[1:]]

    def _sums(self, indices, planes):
        """Lane sums of some planes, which are taken from the top, for each part of an entry."""
        v, sums = self.v, [self.v.no_lane_sums() for _ in range(self.parts)]
        for plane in planes:
            if plane != planes[0]:
                sums = [v.doubled(part) for part in sums]
            for number, index in enumerate(indices(plane)):
                for part, table in enumerate(self.tables_of(0, *divmod(number, self.steps))):
                    for entries in v.lookup_lanes(table, index):
                        sums[part] = v.add_to_lanes(sums[part], entries)
        return sums

    def _planes_that_fit(self) -> int:
        """Planes whose sum, in one lane, is below 2^16."""
        largest = self.words * self.steps * (VECTOR // self.v.lane_vector) * _LARGEST
        return max(planes for planes in range(1, 9) if largest * ((1 << planes) - 1) < 1 << 16)


class Shorts(Bytes, lut.Shorts):
    """int16 entries as a high and a low byte, which has no sign."""

    parts, mode, total = 2, "lut16", lut.Shorts.total


KERNELS = {"lut8": Bytes, "lut16": Shorts, "exact": lut.Floats}
