"""Vector operations by name, as LLVM IR that every processor can run.

`Simd` writes IR through the builder of a Numba intrinsic, so a kernel is an ordinary Python function that calls
named operations and loops over bits and planes while it is being written; Numba never has to type the thousands of
operations that come out. Addresses are int64 values, because Numba code passes them on as plain integers.

LLVM cuts 64-byte vectors into whatever registers there are. `x86` and `neon` add the operations that need instructions
of a target.
"""

from __future__ import annotations

from contextlib import contextmanager

from llvmlite import ir
from numba.core import cgutils

from kernels_numba.cpu import halves, targets

BIT, BYTE, SHORT, INT, LONG = (ir.IntType(size) for size in (1, 8, 16, 32, 64))
HALF, FLOAT = ir.HalfType(), ir.FloatType()
BYTES, SHORTS, INTS, FLOATS, HALVES = (ir.VectorType(kind, size) for kind, size in (
    (BYTE, 64), (SHORT, 32), (INT, 16), (FLOAT, 16), (HALF, 16)))
_constants: dict = {}  # each is written out once: they are most of the text of a kernel
LANES = 16  # rows of a tile, entries of a float table
VECTOR = 64  # bytes


class Simd:
    """Named vector operations on 64-byte vectors, appended to one IR builder.

    Results do not depend on the target: sums are trees of a fixed order, and where a processor lacks instructions for
    float16, integers do the same. Only without fused multiply-add is `fma` rounded twice.

    Attributes
    ----------
    kernels : which kernels the target has: "dot" (`lut`), "lanes" (`lut_lanes`) or "signs" (`signs`)
    keeps_tables : whether the registers hold the integer tables of a tile
    biased : whether signed table bytes are stored + 128
    features : target features that a function needs beyond those of the compiler, in LLVM's notation, or None
    """

    kernels = "signs"
    keeps_tables = biased = False
    features: str | None = None

    def __init__(self, builder: ir.IRBuilder):
        self.builder = builder

    # What the processor has, whatever the target

    @property
    def has_half(self) -> bool:
        return "half" in targets.basics()

    @property
    def has_fma(self) -> bool:
        return "fma" in targets.basics()

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
        return self._widened(HALVES, INTS, FLOATS, address)

    def load_half(self, address):
        return self._widened(HALF, INT, FLOAT, address)

    def store_half(self, address, value):
        """float32 → float16 in memory, to nearest even."""
        b = self.builder
        self.store(address, b.fptrunc(value, HALF) if self.has_half else halves.narrow(b, value), 2)

    def _widened(self, kind, ints, floats, address):
        if self.has_half:
            return self.builder.fpext(self.load(kind, address, 2), floats)
        shorts = ir.VectorType(SHORT, LANES) if kind is HALVES else SHORT
        return halves.widen(self.builder, self.builder.zext(self.load(shorts, address, 2), ints), floats)

    def load_bfloats(self, address):
        """16 bfloat16 in memory → 16 float32: a bfloat16 is the upper half of a float32."""
        b = self.builder
        wide = b.zext(self.load(ir.VectorType(SHORT, LANES), address, 2), INTS)
        return b.bitcast(b.shl(wide, self.constant(INTS, 16)), FLOATS)

    def gather(self, base, indices):
        """16 float32 at base + 4·index, one by one."""
        b, found = self.builder, ir.Constant(FLOATS, ir.Undefined)
        for lane in range(LANES):
            place = self.at(base, self.times(b.sext(b.extract_element(indices, INT(lane)), LONG), 4))
            found = b.insert_element(found, self.load(FLOAT, place, 4), INT(lane))
        return found

    def prefetch(self, address, locality: int):
        """Fetch a line for reading, into the first-level cache (locality 3), the second (2) or the third (1)."""
        pointer = self._pointer(address, BYTE)
        self._call("llvm.prefetch.p0", ir.VoidType(), [pointer, INT(0), INT(locality), INT(1)])

    def stack(self, size: int):
        """Return the address of `size` bytes on the stack, aligned to a vector, not set to anything."""
        with self.builder.goto_entry_block():
            slot = self.builder.alloca(ir.ArrayType(BYTE, size))
        slot.align = VECTOR
        return self.builder.ptrtoint(slot, LONG)

    def pause(self):
        """Tell the processor that this is a loop that waits."""
        architecture = targets.architecture()
        if architecture == "x86":
            self._call("llvm.x86.sse2.pause", ir.VoidType(), [])
        elif architecture == "aarch64":
            self._call("llvm.aarch64.hint", ir.VoidType(), [INT(1)])  # yield

    # Making vectors

    @staticmethod
    def constant(kind, value):
        """A vector constant: one value for all lanes, or a list."""
        key = kind, repr(value)  # 0.0 and -0.0 differ
        found = _constants.get(key)
        if found is None:
            found = _constants[key] = ir.Constant(kind, value if isinstance(value, list) else [value] * kind.count)
        return found

    def splat(self, scalar):
        """16 copies of a scalar of 4 bytes."""
        kind = ir.VectorType(scalar.type, LANES)
        first = self.builder.insert_element(self.constant(kind, ir.Undefined), scalar, INT(0))
        return self._shuffle(first, [0] * LANES)

    def load_splat(self, kind, address):
        return self.splat(self.load(kind, address, 4))

    def load_repeated(self, address, copies: int):
        """The first `copies` float32 at an address, again and again."""
        few = self.load(ir.VectorType(FLOAT, copies), address, 4 * copies)
        return self._shuffle(few, [lane % copies for lane in range(LANES)])

    def load_each(self, address, copies: int):
        """Copies of the first float32 at an address, then as many of the next, …"""
        few = self.load(ir.VectorType(FLOAT, LANES // copies), address, 4)
        return self._shuffle(few, [lane // copies for lane in range(LANES)])

    def as_ints(self, vector):
        return self.builder.bitcast(vector, INTS)

    # Integers

    def nibbles(self, word, half: int, offsets=None):
        """The low (half 0) or high nibbles of 64 bytes, OR-ed with `offsets`."""
        b = self.builder
        if half:
            word = b.bitcast(b.lshr(b.bitcast(word, SHORTS), self.constant(SHORTS, 4)), BYTES)
        word = b.and_(word, self.constant(BYTES, 15))
        return word if offsets is None else b.or_(word, offsets)

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

    def fma(self, x, y, z):
        """x·y + z, with one rounding if the processor can."""
        if not self.has_fma:
            return self.fadd(self.fmul(x, y), z)
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
        """Sum of 16 lanes: halves are added to each other."""
        half = LANES // 2
        while half:
            x = self.fadd(self._shuffle(x, range(half)), self._shuffle(x, range(half, 2 * half)))
            half //= 2
        return self.builder.extract_element(x, INT(0))

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
        return self._shuffle_two(vector, self.constant(vector.type, ir.Undefined), lanes)

    def _shuffle_two(self, x, y, lanes):
        """Lanes of x and, counted on from those, of y."""
        lanes = list(lanes)
        return self.builder.shuffle_vector(x, y, self.constant(ir.VectorType(INT, len(lanes)), lanes))

    def _declare(self, name, result, kinds):
        return cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(result, kinds), name)

    def _call(self, name, result, arguments):
        function = self._declare(name, result, [argument.type for argument in arguments])
        return self.builder.call(function, arguments)


def outlined(builder: ir.IRBuilder, vectors: type[Simd], name: str, arguments, body):
    """Call an internal, never inlined function of int64 arguments; ``body(simd, *arguments)`` writes its code once.

    A kernel in a function of its own gets all vector registers for itself.
    """
    module = builder.module
    function = module.globals.get(name)
    if function is None:
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [LONG] * len(arguments)), name)
        function.linkage = "internal"
        function.attributes.add("noinline")
        function.attributes.add("nounwind")
        if vectors.features:  # llvmlite has no name for this attribute
            set.add(function.attributes, f'"target-features"="{vectors.features}"')
        inner = ir.IRBuilder(function.append_basic_block("entry"))
        body(vectors(inner), *function.args)
        inner.ret_void()
    builder.call(function, arguments)
