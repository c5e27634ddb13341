"""float16 by integer arithmetic, for processors without instructions for it; scalars or vectors.

LLVM would call a function of the C library for each number, which not every process has.
"""

from __future__ import annotations

from llvmlite import ir

_REBASE = (127 - 15) << 23  # from the exponent of a float16, shifted into place, to that of a float32
_SMALLEST = 2.0**-14  # normal float16


def widen(builder: ir.IRBuilder, bits, floats):
    """float16 → float32; bits: the 16 bits as int32, floats: the type of the result."""
    b, kind = builder, bits.type
    exponent = b.and_(bits, _all(kind, 0x7C00))
    shifted = b.shl(b.and_(bits, _all(kind, 0x7FFF)), _all(kind, 13))
    normal = b.add(shifted, _all(kind, _REBASE))
    special = b.add(shifted, _all(kind, 2 * _REBASE))  # infinity and NaN: the largest exponent again
    raised = b.bitcast(b.add(normal, _all(kind, 1 << 23)), floats)  # 2^-14 more than a subnormal, exactly
    small = b.bitcast(b.fsub(raised, _all(floats, _SMALLEST)), kind)
    found = b.select(b.icmp_unsigned("==", exponent, _all(kind, 0x7C00)), special, normal)
    found = b.select(b.icmp_unsigned("==", exponent, _all(kind, 0)), small, found)
    return b.bitcast(b.or_(found, b.shl(b.and_(bits, _all(kind, 0x8000)), _all(kind, 16))), floats)


def narrow(builder: ir.IRBuilder, value):
    """float32 → the bits of a float16 as int16, to nearest even; one number."""
    b, kind = builder, ir.IntType(32)
    bits = b.bitcast(value, kind)
    size = b.and_(bits, kind(0x7FFFFFFF))
    odd = b.and_(b.lshr(size, kind(13)), kind(1))
    normal = b.lshr(b.sub(b.add(size, b.add(odd, kind(0xFFF))), kind(_REBASE)), kind(13))
    one = ir.FloatType()(0.5)  # whose last bit is worth as much as that of a subnormal float16
    small = b.sub(b.bitcast(b.fadd(b.bitcast(size, ir.FloatType()), one), kind), kind(126 << 23))
    found = b.select(b.icmp_unsigned("<", size, kind(113 << 23)), small, normal)
    nan = b.or_(b.and_(b.lshr(size, kind(13)), kind(0x3FF)), kind(0x7E00))
    large = b.select(b.icmp_unsigned(">", size, kind(255 << 23)), nan, kind(0x7C00))
    found = b.select(b.icmp_unsigned(">=", size, kind(143 << 23)), large, found)
    sign = b.and_(b.lshr(bits, kind(16)), kind(0x8000))
    return b.trunc(b.or_(found, sign), ir.IntType(16))


def _all(kind, value):
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)
