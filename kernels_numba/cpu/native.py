"""What Numba lacks for drivers: memory by address, floats of any stored type, atomic counters, calls by address."""

from __future__ import annotations

import os

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels_numba.cpu.simd import FLOAT, FLOATS, INT, INTS, LANES, LONG, SHORT, Simd

FLOAT32, BFLOAT16, FLOAT16 = range(3)  # kinds of floats in memory
KIND_BYTES = (4, 2, 2)
PATIENCE = 1 << 10  # turns of waiting, about 40 cycles each, before a thread gives up its processor; a power of two


@intrinsic
def longs(typing, address):
    """The memory at an address as a pointer to int64, to be indexed or given to carray."""
    return _pointer_to(types.int64)


@intrinsic
def ints(typing, address):
    """The memory at an address as a pointer to int32."""
    return _pointer_to(types.int32)


@intrinsic
def floats(typing, address):
    """The memory at an address as a pointer to float32."""
    return _pointer_to(types.float32)


@intrinsic
def bytes_at(typing, address):
    """The memory at an address as a pointer to uint8."""
    return _pointer_to(types.uint8)


def _pointer_to(kind):
    pointer = types.CPointer(kind)

    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(types.int64), codegen


@intrinsic
def take_number(typing, address):
    """Add 1 to the int64 at an address, atomically, and return what was there."""

    def codegen(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.PointerType(LONG))
        return builder.atomic_rmw("add", pointer, LONG(1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic
def add_number(typing, address):
    """Add 1 to the int64 at an address, atomically, after all stores before it have become visible."""

    def codegen(context, builder, signature, arguments):
        builder.atomic_rmw("add", builder.inttoptr(arguments[0], ir.PointerType(LONG)), LONG(1), "acq_rel")
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def wait_for(typing, address, value):
    """Wait until the int64 at an address is `value`; what other threads stored before that is then visible.

    A thread that waits long gives up its processor: the thread it waits for may need it.
    """

    def codegen(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.PointerType(LONG))
        names = ("check", "pause", "give_up", "again", "arrived")
        check, pause, give_up, again, end = (builder.append_basic_block(name) for name in names)
        before = builder.block
        builder.branch(check)
        builder.position_at_end(check)
        turns = builder.phi(LONG)
        turns.add_incoming(LONG(1), before)
        found = builder.load_atomic(pointer, "acquire", 8)
        builder.cbranch(builder.icmp_signed("==", found, arguments[1]), end, pause)
        builder.position_at_end(pause)
        Simd(builder).pause()
        patience = builder.and_(turns, LONG(PATIENCE - 1))
        builder.cbranch(builder.icmp_signed("==", patience, LONG(0)), give_up, again)
        builder.position_at_end(give_up)
        if os.name == "posix":
            function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(INT, []), "sched_yield")
            builder.call(function, [])
        builder.branch(again)
        builder.position_at_end(again)
        turns.add_incoming(builder.add(turns, LONG(1)), again)
        builder.branch(check)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def call_stage(typing, stage, job):
    """Call the C function void(int64) at an address."""

    def codegen(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [LONG])
        builder.call(builder.inttoptr(arguments[0], ir.PointerType(kind)), arguments[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def read_float(typing, kind, address, index):
    """Element `index` of an array of `kind` at an address, as float32."""

    def codegen(context, builder, signature, arguments):
        kind, address, index = arguments
        return _by_kind(builder, kind, lambda v, k: _read(v, k, v.at(address, v.times(index, KIND_BYTES[k]))), FLOAT)

    return types.float32(types.int64, types.int64, types.int64), codegen


@intrinsic
def write_float(typing, kind, address, index, value):
    """Store a float32 as element `index` of an array of `kind`, rounded to nearest even."""

    def codegen(context, builder, signature, arguments):
        kind, address, index, value = arguments
        _by_kind(builder, kind,
                 lambda v, k: _write(v, k, v.at(address, v.times(index, KIND_BYTES[k])), value))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32), codegen


@intrinsic
def widen(typing, kind, source, target, count):
    """Copy `count` floats of `kind` to float32; return 0 if the target held exactly these bits before."""

    def codegen(context, builder, signature, arguments):
        kind, source, target, count = arguments
        return _by_kind(builder, kind, lambda v, k: _widen(v, k, source, target, count), LONG)

    return types.int64(types.int64, types.int64, types.int64, types.int64), codegen


def _by_kind(builder, kind, write, result=None):
    """Write code for each kind of floats behind one switch; return what they result in."""
    end = builder.append_basic_block("end")
    blocks = [builder.append_basic_block(f"kind{k}") for k in range(3)]
    choice = builder.switch(kind, blocks[0])
    found = []
    for k, block in enumerate(blocks):
        if k:
            choice.add_case(LONG(k), block)
        builder.position_at_end(block)
        found.append((write(Simd(builder), k), builder.block))
        builder.branch(end)
    builder.position_at_end(end)
    if result is None:
        return None
    merged = builder.phi(result)
    for value, block in found:
        merged.add_incoming(value, block)
    return merged


def _read(v, kind, address):
    b = v.builder
    if kind == FLOAT32:
        return v.load(FLOAT, address, 4)
    if kind == FLOAT16:
        return v.load_half(address)
    return b.bitcast(b.shl(b.zext(v.load(SHORT, address, 2), INT), INT(16)), FLOAT)


def _write(v, kind, address, value):
    b = v.builder
    if kind == FLOAT32:
        v.store(address, value, 4)
    elif kind == FLOAT16:
        v.store_half(address, value)
    else:
        bits = b.bitcast(value, INT)
        odd = b.and_(b.lshr(bits, INT(16)), INT(1))
        rounded = b.add(bits, b.add(odd, INT(0x7FFF)))
        quiet = b.or_(bits, INT(0x400000))  # a NaN must stay one
        kept = b.select(b.fcmp_unordered("uno", value, value), quiet, rounded)
        v.store(address, b.trunc(b.lshr(kept, INT(16)), SHORT), 2)


def _widen(v, kind, source, target, count):
    b = v.builder
    step = KIND_BYTES[kind]
    whole = b.and_(count, LONG(-LANES))
    seen = v.stack(64)
    v.store(seen, v.constant(INTS, 0))
    load = (lambda address: v.load(FLOATS, address, 4), v.load_bfloats, v.load_halves)[kind]
    with v.loop(b.sdiv(whole, LONG(LANES))) as index:
        value = load(v.at(source, v.times(index, step * LANES)))
        place = v.at(target, v.times(index, 4 * LANES))
        new, old = v.as_ints(value), v.load(INTS, place)
        v.store(seen, b.or_(v.load(INTS, seen), b.xor(new, old)))
        v.store(place, value)
    with v.loop(b.sub(count, whole)) as rest:
        index = b.add(whole, rest)
        value = _read(v, kind, v.at(source, v.times(index, step)))
        place = v.at(target, v.times(index, 4))
        new, old = b.bitcast(value, INT), v.load(INT, place, 4)
        v.store(seen, b.or_(v.load(INT, seen), b.xor(new, old)), 4)
        v.store(place, value, 4)
    return b.zext(v.reduce_or(v.load(INTS, seen)), LONG)
