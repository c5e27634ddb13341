"""What x86 processors have beyond `Simd`: AVX2, AVX-512 with bytes (BW), AVX-512 with VBMI and VNNI.

Source: CPU.md sections 5 and 6.
"""

from __future__ import annotations

from llvmlite import ir

from kernels_numba.cpu.simd import BIT, BYTE, BYTES, FLOAT, FLOATS, INT, INTS, LANES, SHORT, VECTOR, Simd

_HALF_BYTES, _HALF_INTS, _HALF_FLOATS = (ir.VectorType(kind, size) for kind, size in (
    (BYTE, 32), (INT, 8), (FLOAT, 8)))
_BYTES_FIRST = [16 * (i // 16) + 4 * (i % 4) + i % 16 // 4 for i in range(VECTOR)]  # byte j of 4 dwords side by side


class Avx2(Simd):
    """vpshufb looks up 16 entries for 16 rows, in each 16-byte lane of a vector in another table.

    Lane sums: bytes are added up without a sign as 16-bit numbers, as (words, odd): the sums, modulo 2^16, of the
    16-bit words in which they lie, and of their odd bytes.
    """

    kernels = "lanes"
    has_half = has_fma = biased = True
    lane_vector = 32  # bytes of one look-up

    def float_table(self, address):
        return self.load(FLOATS, address)

    def lookup_floats(self, table, index):
        """vpermps reads 3 bits; the fourth chooses between two halves of the table."""
        b = self.builder
        low, high = self._halves(table)
        found = []
        for part in self._halves(index):
            first, second = (self._call("llvm.x86.avx2.permps", _HALF_FLOATS, [half, part]) for half in (low, high))
            sign = b.shl(part, self.constant(_HALF_INTS, 28))  # vblendvps looks at the sign
            found.append(b.select(b.icmp_signed("<", sign, self.constant(_HALF_INTS, 0)), second, first))
        return self._joined(*found)

    def rows_to_lanes(self, line):
        """16 rows of 4 bytes → 4 lanes of 16 rows: byte j of every row is in lane j."""
        b = self.builder
        low, high = self._halves(b.bitcast(self._shuffle(line, _BYTES_FIRST), INTS))
        order = [0, 4, 2, 6, 1, 5, 3, 7]  # bytes 0 and 2, then 1 and 3; a half holds two times four rows
        low, high = (b.bitcast(self._shuffle(half, order), ir.VectorType(ir.IntType(64), 4)) for half in (low, high))
        return b.bitcast(self._joined(*(self._shuffle_two(low, high, lanes) for lanes in ((0, 4, 2, 6), (1, 5, 3, 7)))),
                         BYTES)

    def lookup_lanes(self, table, index):
        """64 look-ups, for each lane in a table of its own; vectors of `lane_vector` bytes."""
        return [self._call("llvm.x86.avx2.pshuf.b", _HALF_BYTES, list(pair))
                for pair in zip(self._halves(table), self._halves(index), strict=True)]

    def no_lane_sums(self):
        return [self.constant(ir.VectorType(SHORT, self.lane_vector // 2), 0)] * 2

    def add_to_lanes(self, sums, entries):
        """Add unsigned bytes to lane sums."""
        b, (words, odd) = self.builder, sums
        entries = b.bitcast(entries, words.type)
        return [b.add(words, entries), b.add(odd, b.lshr(entries, self.constant(words.type, 8)))]

    def doubled(self, sums):
        return [self.builder.add(x, x) for x in sums]

    def rows_of_lanes(self, sums):
        """Lane sums below 2^16 → int32 for each of the 16 rows, summed over the lanes."""
        b, (words, odd) = self.builder, sums
        even = b.sub(words, b.shl(odd, self.constant(odd.type, 8)))
        rows = []
        for part in (even, odd):
            part = b.zext(part, ir.VectorType(INT, part.type.count))
            while part.type.count > LANES // 2:
                part = b.add(*self._halves(part))
            rows.append(part)
        return self._shuffle_two(*rows, [lane // 2 + LANES // 2 * (lane % 2) for lane in range(LANES)])

    def _halves(self, vector):
        half = vector.type.count // 2
        return self._shuffle(vector, range(half)), self._shuffle(vector, range(half, 2 * half))

    def _joined(self, x, y):
        return self._shuffle_two(x, y, range(2 * x.type.count))


class Avx512(Avx2):
    """The same with 64-byte vectors; a float table is one of them."""

    keeps_tables = True
    lane_vector = 64

    def gather(self, base, indices):
        """16 float32 at base + 4·index (vgatherdps)."""
        mask = ir.Constant(ir.VectorType(BIT, LANES), [1] * LANES)
        return self._call("llvm.x86.avx512.mask.gather.dps.512", FLOATS,
                          [self.constant(FLOATS, 0.0), self._pointer(base, BYTE), indices, mask, INT(4)])

    def lookup_floats(self, table, index):
        """vpermps."""
        return self._call("llvm.x86.avx512.permvar.sf.512", FLOATS, [table, index])

    def rows_to_lanes(self, line):
        ints = self.builder.bitcast(self._shuffle(line, _BYTES_FIRST), INTS)
        return self.builder.bitcast(self._shuffle(ints, [4 * (i % 4) + i // 4 for i in range(LANES)]), BYTES)

    def lookup_lanes(self, table, index):
        return [self._call("llvm.x86.avx512.pshuf.b.512", BYTES, [table, index])]


class Vbmi(Avx512):
    """One instruction for 64 look-ups in 4 tables, one for sum, widening and weight."""

    kernels = "dot"
    biased = False

    def lookup_bytes(self, table, index):
        """64 look-ups in a table of 64 bytes; the low 6 bits of a byte count (vpermb)."""
        return self._call("llvm.x86.avx512.permvar.qi.512", BYTES, [table, index])

    def add_signed(self, total, entries, plane: int):
        """int32 lanes: total + 2^plane · the sum of 4 signed bytes (vpdpbusd)."""
        return self._dot(total, self.constant(BYTES, 1 << plane), entries)  # 128 is an unsigned byte too

    def add_unsigned(self, total, entries, plane: int):
        """int32 lanes: total + 2^plane · the sum of 4 unsigned bytes; 2^7 is no signed byte, so it is 2^6 twice."""
        for _ in range(2 if plane == 7 else 1):
            total = self._dot(total, entries, self.constant(BYTES, 1 << min(plane, 6)))
        return total

    def _dot(self, total, unsigned, signed):
        return self._call("llvm.x86.avx512.vpdpbusd.512", INTS, [total, unsigned, signed])
