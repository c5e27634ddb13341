"""What aarch64 processors with dot products (Armv8.2) have beyond `Simd`: NEON's table look-ups, sdot and udot.

Compiled for aarch64 in tests, and compared with the other kernels where an emulator (qemu) is installed; not yet run on
such a processor.

Source: CPU.md section 6.
"""

from __future__ import annotations

from llvmlite import ir

from kernels_numba.cpu.simd import BYTE, BYTES, FLOATS, INT, INTS, Simd

_QUARTER_BYTES, _QUARTER_INTS = ir.VectorType(BYTE, 16), ir.VectorType(INT, 4)


class Neon(Simd):
    """A vector of 64 bytes is four registers, which one look-up reads together."""

    kernels = "dot"
    has_half = has_fma = True
    features = "+neon,+fp-armv8,+dotprod"

    def float_table(self, address):
        return self.load(BYTES, address)

    def lookup_floats(self, table, index):
        """The 4 bytes of an entry are looked up one by one."""
        b = self.builder
        entry = b.and_(index, self.constant(INTS, 15))
        places = b.or_(b.mul(entry, self.constant(INTS, 0x04040404)), self.constant(INTS, 0x03020100))
        return b.bitcast(self.lookup_bytes(table, b.bitcast(places, BYTES)), FLOATS)

    def lookup_bytes(self, table, index):
        """64 look-ups in a table of 64 bytes, index < 64 (tbl)."""
        table = self._quarters(table)
        return self._joined([self._tbl(table, part) for part in self._quarters(index)])

    def add_signed(self, total, entries, plane: int):
        """int32 lanes: total + 2^plane · the sum of 4 signed bytes (sdot); 2^7 is no signed byte: it is 2^6 twice."""
        for _ in range(2 if plane == 7 else 1):
            total = self._dot("sdot", total, entries, 1 << min(plane, 6))
        return total

    def add_unsigned(self, total, entries, plane: int):
        """int32 lanes: total + 2^plane · the sum of 4 unsigned bytes (udot)."""
        return self._dot("udot", total, entries, 1 << plane)

    def _dot(self, name, total, entries, weight):
        weight = self.constant(_QUARTER_BYTES, weight)
        parts = zip(self._quarters(total), self._quarters(entries), strict=True)
        return self._joined([self._dot_quarter(name, part, bytes_, weight) for part, bytes_ in parts])

    def _tbl(self, table, index):
        return self._call("llvm.aarch64.neon.tbl4.v16i8", _QUARTER_BYTES, [*table, index])

    def _dot_quarter(self, name, total, entries, weight):
        return self._call(f"llvm.aarch64.neon.{name}.v4i32.v16i8", _QUARTER_INTS, [total, entries, weight])

    def _quarters(self, vector):
        size = vector.type.count // 4
        return [self._shuffle(vector, range(start, start + size)) for start in range(0, 4 * size, size)]

    def _joined(self, quarters):
        first, second = (self._shuffle_two(*pair, range(2 * pair[0].type.count))
                         for pair in (quarters[:2], quarters[2:]))
        return self._shuffle_two(first, second, range(2 * first.type.count))
