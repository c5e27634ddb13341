"""Vector operations by name, as LLVM IR: the one place of this package that knows instructions.

`Simd` writes IR through the builder of a Numba intrinsic, so a kernel is an ordinary Python function that calls
named operations and loops over bits and planes while it is being written; Numba never has to type the thousands of
operations that come out. Addresses are int64 values, because Numba code passes them on as plain integers.
"""

from __future__ import annotations

from contextlib import contextmanager

from llvmlite import ir
from numba.core import cgutils

BIT, BYTE, SHORT, INT, LONG = (ir.IntType(size) for size in (1, 8, 16, 32, 64))
HALF, FLOAT = ir.HalfType(), ir.FloatType()
BYTES, SHORTS, INTS, FLOATS, HALVES = (ir.VectorType(kind, size) for kind, size in (
    (BYTE, 64), (SHORT, 32), (INT, 16), (FLOAT, 16), (HALF, 16)))
LANES = 16  # rows of a tile, entries of a float table
VECTOR = 64  # bytes


class Simd:
    """Named vector operations on 64-byte vectors, appended to one IR builder."""

    def __init__(self, builder: ir.IRBuilder):
        self.builder = builder

    # Addresses and memory

    def at(self, address, offset):
        """Return address + offset; the offset is a Python int or an int64 value."""
        if isinstance(offset, int):
            if not offset:
                return address
            offset = LONG(offset)
        return self.builder.add(address, offset)

    def times(self, value, factor: int):
        return self.builder.mul(value, LONG(factor))

    def load(self, kind, address, align: int = VECTOR):
        loaded = self.builder.load(self._pointer(address, kind))
        loaded.align = align
        return loaded

    def store(self, address, value, align: int = VECTOR):
        self.builder.store(value, self._pointer(address, value.type)).align = align

    def load_halves(self, address):
        """16 float16 in memory → 16 float32."""
        return self.builder.fpext(self.load(HALVES, address, 2), FLOATS)

    def load_bfloats(self, address):
        """16 bfloat16 in memory → 16 float32: a bfloat16 is the upper half of a float32."""
        b = self.builder
        wide = b.zext(self.load(ir.VectorType(SHORT, LANES), address, 2), INTS)
        return b.bitcast(b.shl(wide, self.constant(INTS, 16)), FLOATS)

    def gather(self, base, indices):
        """16 float32 at base + 4·index (vgatherdps)."""
        mask = ir.Constant(ir.VectorType(BIT, LANES), [1] * LANES)
        return self._call("llvm.x86.avx512.mask.gather.dps.512", FLOATS,
                          [self.constant(FLOATS, 0.0), self._pointer(base, BYTE), indices, mask, INT(4)])

    def prefetch(self, address, locality: int):
        """Fetch a line for reading, into the first-level cache (locality 3), the second (2) or the third (1)."""
        pointer = self._pointer(address, BYTE)
        self._call("llvm.prefetch.p0", ir.VoidType(), [pointer, INT(0), INT(locality), INT(1)])

    def stack(self, size: int):
        """Return the address of `size` bytes on the stack, aligned to a vector."""
        slot = cgutils.alloca_once(self.builder, ir.ArrayType(BYTE, size))
        slot.align = VECTOR
        return self.builder.ptrtoint(slot, LONG)

    def pause(self):
        """Tell the processor that this is a loop that waits."""
        self._call("llvm.x86.sse2.pause", ir.VoidType(), [])

    # Making vectors

    @staticmethod
    def constant(kind, value):
        """A vector constant: one value for all lanes, or a list."""
        values = value if isinstance(value, list) else [value] * kind.count
        return ir.Constant(kind, values)

    def splat(self, scalar):
        """16 copies of a scalar of 4 bytes."""
        kind = ir.VectorType(scalar.type, LANES)
        first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, INT(0))
        return self._shuffle(first, [0] * LANES)

    def load_splat(self, kind, address):
        return self.splat(self.load(kind, address, 4))

    def as_ints(self, vector):
        return self.builder.bitcast(vector, INTS)

    # Integers

    def nibbles(self, word, half: int, offsets):
        """The low (half 0) or high nibbles of 64 bytes, OR-ed with `offsets`."""
        b = self.builder
        if half:
            word = b.bitcast(b.lshr(b.bitcast(word, SHORTS), self.constant(SHORTS, 4)), BYTES)
        return b.or_(b.and_(word, self.constant(BYTES, 15)), offsets)

    def lookup_bytes(self, table, index):
        """64 look-ups in a table of 64 bytes; the low 6 bits of a byte count (vpermb, AVX512-VBMI)."""
        return self._call("llvm.x86.avx512.permvar.qi.512", BYTES, [table, index])

    def dot(self, total, unsigned, signed):
        """int32 lanes: total + the sum of 4 products unsigned·signed bytes (vpdpbusd, AVX512-VNNI)."""
        return self._call("llvm.x86.avx512.vpdpbusd.512", INTS, [total, unsigned, signed])

    def add(self, x, y):
        return self.builder.add(x, y)

    def left(self, vector, bits: int):
        return self.builder.shl(vector, self.constant(INTS, bits))

    def right(self, vector, bits: int):
        """Logical shift of int32 lanes."""
        return self.builder.lshr(vector, self.constant(INTS, bits)) if bits else vector

    def store_low_bytes(self, address, vector):
        """The low byte of 16 int32 lanes → 16 bytes in memory (vpmovdb)."""
        self.store(address, self.builder.trunc(vector, ir.VectorType(BYTE, LANES)), 1)

    def reduce_or(self, vector):
        return self._call("llvm.vector.reduce.or.v16i32", INT, [vector])

    # Floats

    def lookup_floats(self, table, index):
        """16 look-ups in a table of 16 float32; the low 4 bits of an int32 count (vpermps, AVX512F)."""
        return self._call("llvm.x86.avx512.permvar.sf.512", FLOATS, [table, index])

    def fma(self, x, y, z):
        """x·y + z with one rounding."""
        return self._call("llvm.fma.v16f32", FLOATS, [x, y, z])

    def fadd(self, x, y):
        return self.builder.fadd(x, y)

    def fmul(self, x, y):
        return self.builder.fmul(x, y)

    def add_where(self, mask, x, y):
        """x + y in the lanes whose bit of the int16 mask is set, x in the others (vaddps{k})."""
        lanes = self.builder.bitcast(mask, ir.VectorType(BIT, LANES))
        return self.builder.select(lanes, self.fadd(x, y), x)

    def to_bfloats(self, x):
        """16 finite float32 → 16 bfloat16 as int16, to nearest even."""
        b, bits = self.builder, self.as_ints(x)
        odd = b.and_(self.right(bits, 16), self.constant(INTS, 1))
        rounded = self.right(b.add(bits, b.add(odd, self.constant(INTS, 0x7FFF))), 16)
        return b.trunc(rounded, ir.VectorType(SHORT, LANES))

    def maximum(self, x, y):
        return self.builder.select(self.builder.fcmp_ordered(">", x, y), x, y)

    def magnitude(self, x):
        return self._call("llvm.fabs.v16f32", FLOATS, [x])

    def sum_of_four(self, x):
        """Every lane gets the sum of its four neighbours 4i..4i+3."""
        for step in (1, 2):
            x = self.fadd(x, self._shuffle(x, [lane ^ step for lane in range(LANES)]))
        return x

    def reduce_sum(self, x):
        """Sum of 16 lanes as a tree: the order is fixed when the code is compiled."""
        function = self._declare("llvm.vector.reduce.fadd.v16f32", FLOAT, [FLOAT, FLOATS])
        return self.builder.call(function, [FLOAT(-0.0), x], fastmath=("reassoc",))

    def reduce_maximum(self, x):
        return self._call("llvm.vector.reduce.fmax.v16f32", FLOAT, [x])

    def to_floats(self, x):
        return self.builder.sitofp(x, FLOATS)

    def rounded(self, x):
        """Nearest int32, ties to even."""
        return self.builder.fptosi(self._call("llvm.rint.v16f32", FLOATS, [x]), INTS)

    # Control

    @contextmanager
    def loop(self, count):
        """Repeat what is written inside for an index 0 .. count − 1 (int64)."""
        if isinstance(count, int):
            count = LONG(count)
        with cgutils.for_range(self.builder, count) as loop:
            yield loop.index

    def _pointer(self, address, kind):
        return self.builder.inttoptr(address, ir.PointerType(kind))

    def _shuffle(self, vector, lanes):
        mask = ir.Constant(ir.VectorType(INT, len(lanes)), lanes)
        return self.builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)

    def _declare(self, name, result, kinds):
        return cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(result, kinds), name)

    def _call(self, name, result, arguments):
        function = self._declare(name, result, [argument.type for argument in arguments])
        return self.builder.call(function, arguments)


def outlined(builder: ir.IRBuilder, name: str, arguments, body):
    """Call an internal, never inlined function of int64 arguments, whose code ``body(simd, *arguments)`` writes once.

    A kernel in a function of its own gets all 32 vector registers for itself.
    """
    module = builder.module
    function = module.globals.get(name)
    if function is None:
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [LONG] * len(arguments)), name)
        function.linkage = "internal"
        function.attributes.add("noinline")
        function.attributes.add("nounwind")
        inner = ir.IRBuilder(function.append_basic_block("entry"))
        body(Simd(inner), *function.args)
        inner.ret_void()
    builder.call(function, arguments)
