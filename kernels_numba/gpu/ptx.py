"""Every instruction the CUDA kernels need and Numba does not offer, as inline PTX.

Kernels import these names from `kernels_numba.gpu.primitives`, which gives the Python twins of `twins` in the
simulator. Pointers are Numba arrays or CPointers, offsets are in bytes. Weights are read once, so their loads leave the
level-1 cache to the activations.

Source: PTX ISA 9.0, sections 9.7.1–9.7.15.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.cuda.extending import intrinsic

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_VOID = ir.VoidType()


def _assembly(builder, result, text, constraints, arguments, effect=False):
    """Emit one instruction; `effect` keeps its place among memory accesses and barriers.

    Those of a whole warp are convergent: no compiler may make two of one, for lanes that came different ways.
    """
    function = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(ir.InlineAsm(function, text, constraints, side_effect=effect), arguments,
                        attrs=("convergent",) if ".sync" in text else ())


def _address(context, builder, kind, pointer, offset):
    """Address of a byte of an array or behind a pointer, 64 bits."""
    if isinstance(kind, types.Array):
        pointer = context.make_array(kind)(context, builder, value=pointer).data
    if offset.type != _I64:
        offset = builder.sext(offset, _I64)
    return builder.add(builder.ptrtoint(pointer, _I64), offset)


def _tuple(context, builder, kind, struct, count):
    return context.make_tuple(builder, kind, [builder.extract_value(struct, i) for i in range(count)])


@intrinsic
def load_line(typingctx, pointer, offset):
    """16 bytes, read once: four uint32."""
    signature = types.UniTuple(types.uint32, 4)(pointer, offset)

    def generate(context, builder, signature, arguments):
        address = _address(context, builder, signature.args[0], *arguments)
        found = _assembly(builder, ir.LiteralStructType([_I32] * 4),
                          "ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {$0,$1,$2,$3}, [$4];",
                          "=r,=r,=r,=r,l", [address])
        return _tuple(context, builder, signature.return_type, found, 4)

    return signature, generate


@intrinsic
def load_line_kept(typingctx, pointer, offset):
    """16 bytes that are read again soon, through the level-1 cache: four uint32."""
    signature = types.UniTuple(types.uint32, 4)(pointer, offset)

    def generate(context, builder, signature, arguments):
        address = _address(context, builder, signature.args[0], *arguments)
        found = _assembly(builder, ir.LiteralStructType([_I32] * 4),
                          "ld.global.nc.L2::256B.v4.u32 {$0,$1,$2,$3}, [$4];", "=r,=r,=r,=r,l", [address])
        return _tuple(context, builder, signature.return_type, found, 4)

    return signature, generate


@intrinsic
def load_word(typingctx, pointer, offset):
    """4 bytes, read once: uint32."""
    signature = types.uint32(pointer, offset)

    def generate(context, builder, signature, arguments):
        address = _address(context, builder, signature.args[0], *arguments)
        return _assembly(builder, _I32, "ld.global.nc.L1::no_allocate.u32 $0, [$1];", "=r,l", [address])

    return signature, generate


@intrinsic
def store_line(typingctx, pointer, offset, a, b, c, d):
    """Write 16 bytes, four uint32."""
    signature = types.void(pointer, offset, *[types.uint32] * 4)

    def generate(context, builder, signature, arguments):
        address = _address(context, builder, signature.args[0], *arguments[:2])
        _assembly(builder, _VOID, "st.global.v4.u32 [$0], {$1,$2,$3,$4};", "l,r,r,r,r", [address, *arguments[2:]],
                  effect=True)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def shared_address(typingctx, array):
    """Address of a shared array in the shared window, in bytes: uint32."""
    signature = types.uint32(array)

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, value=arguments[0]).data
        wide = _assembly(builder, _I64, "cvta.to.shared.u64 $0, $1;", "=l,l", [builder.ptrtoint(data, _I64)])
        return builder.trunc(wide, _I32)

    return signature, generate


@intrinsic
def load_shared(typingctx, address):
    """float32 at a shared address."""
    signature = types.float32(types.uint32)

    def generate(context, builder, signature, arguments):
        return _assembly(builder, _F32, "ld.shared.f32 $0, [$1];", "=f,r", arguments, effect=True)

    return signature, generate


def _byte_entry(number):
    text = (f"{{ .reg .u32 t; prmt.b32 t, $2, 0, {0x4440 + number}; mad.lo.u32 t, t, 128, $1; "
            "ld.shared.f32 $0, [t]; }")

    @intrinsic
    def load(typingctx, address, word):
        signature = types.float32(types.uint32, types.uint32)

        def generate(context, builder, signature, arguments):
            return _assembly(builder, _F32, text, "=f,r,r", arguments, effect=True)

        return signature, generate

    return load


# float32 at a shared address plus 128 times byte 0, 1, 2 or 3 of a word. Two instructions make that address; written as
# shifts and masks it would be three, because compilers move the factor 128 into the shift.
load_entry_0, load_entry_1, load_entry_2, load_entry_3 = map(_byte_entry, range(4))


@intrinsic
def shuffle_xor(typingctx, value, mask):
    """float32 of the lane whose number differs by the bits of the mask; all 32 lanes take part."""
    signature = types.float32(types.float32, types.int32)

    def generate(context, builder, signature, arguments):
        return _assembly(builder, _F32, "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=f,f,r", arguments,
                         effect=True)

    return signature, generate


def _half(builder, word, high):
    bits = builder.trunc(builder.lshr(word, ir.Constant(_I32, 16)) if high else word, _I16)
    return _assembly(builder, _F32, "cvt.f32.f16 $0, $1;", "=f,h", [bits])


@intrinsic
def half_low(typingctx, word):
    """The float16 in the low half of a uint32, as float32."""
    return types.float32(types.uint32), lambda context, builder, signature, args: _half(builder, args[0], False)


@intrinsic
def half_high(typingctx, word):
    """The float16 in the high half of a uint32, as float32."""
    return types.float32(types.uint32), lambda context, builder, signature, args: _half(builder, args[0], True)


@intrinsic
def half_bits(typingctx, value):
    """float32 → float16, round to nearest even, as uint16."""
    signature = types.uint16(types.float32)

    def generate(context, builder, signature, arguments):
        return _assembly(builder, _I16, "cvt.rn.f16.f32 $0, $1;", "=h,f", arguments)

    return signature, generate


@intrinsic
def bfloat_bits(typingctx, value):
    """float32 → bfloat16, round to nearest even, as uint16."""
    signature = types.uint16(types.float32)

    def generate(context, builder, signature, arguments):
        return _assembly(builder, _I16, "cvt.rn.bf16.f32 $0, $1;", "=h,f", arguments)

    return signature, generate


@intrinsic
def bfloat_value(typingctx, bits):
    """bfloat16 as uint16 → float32."""
    signature = types.float32(types.uint16)

    def generate(context, builder, signature, arguments):
        word = builder.shl(builder.zext(arguments[0], _I32), ir.Constant(_I32, 16))
        return builder.bitcast(word, _F32)

    return signature, generate


@intrinsic
def multiply_halves(typingctx, left, right):
    """Products of two float16 in a uint32 with two others, each rounded to nearest even."""
    signature = types.uint32(types.uint32, types.uint32)

    def generate(context, builder, signature, arguments):
        return _assembly(builder, _I32, "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", arguments)

    return signature, generate


@intrinsic
def multiply_tiles(typingctx, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """C + A·B of a warp: A float16 [16, 16], B float16 [16, 8], C float32 [16, 8] over the registers of 32 lanes.

    With g = lane//4, t = lane%4: a0 and a1 are rows g and g+8 of columns 2t, 2t+1 and a2, a3 of columns 2t+8, 2t+9;
    b0 and b1 are rows 2t, 2t+1 and 2t+8, 2t+9 of column g; c0, c1 are columns 2t, 2t+1 of row g and c2, c3 of row g+8.
    """
    signature = types.UniTuple(types.float32, 4)(*[types.uint32] * 6, *[types.float32] * 4)

    def generate(context, builder, signature, arguments):
        found = _assembly(builder, ir.LiteralStructType([_F32] * 4),
                          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                          "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
                          "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", arguments, effect=True)
        return _tuple(context, builder, signature.return_type, found, 4)

    return signature, generate


@intrinsic
def float_bits(typingctx, value):
    """float32 → its bits, uint32."""
    return types.uint32(types.float32), lambda context, builder, signature, args: builder.bitcast(args[0], _I32)


@intrinsic
def float_value(typingctx, bits):
    """Bits of a float32 → float32."""
    return types.float32(types.uint32), lambda context, builder, signature, args: builder.bitcast(args[0], _F32)
