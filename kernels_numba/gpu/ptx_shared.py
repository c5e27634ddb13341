"""Shared memory by address, as inline PTX: what `ptx` is for instructions in general, twins in `twins_shared`.

Source: PTX ISA 9.0, section 9.7.9.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.cuda.extending import intrinsic

from kernels_numba.gpu.ptx import _I32, _VOID, _assembly, _tuple


@intrinsic
def load_shared_line(typingctx, address):
    """16 bytes at a shared address: four uint32."""
    signature = types.UniTuple(types.uint32, 4)(types.uint32)

    def generate(context, builder, signature, arguments):
        found = _assembly(builder, ir.LiteralStructType([_I32] * 4), "ld.shared.v4.u32 {$0,$1,$2,$3}, [$4];",
                          "=r,=r,=r,=r,r", arguments, effect=True)
        return _tuple(context, builder, signature.return_type, found, 4)

    return signature, generate


@intrinsic
def store_shared_pair(typingctx, address, low, high):
    """Two uint32 to a shared address, 8 bytes."""
    signature = types.void(types.uint32, types.uint32, types.uint32)

    def generate(context, builder, signature, arguments):
        _assembly(builder, _VOID, "st.shared.v2.u32 [$0], {$1,$2};", "r,r,r", arguments, effect=True)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def store_shared(typingctx, address, value):
    """float32 to a shared address."""
    signature = types.void(types.uint32, types.float32)

    def generate(context, builder, signature, arguments):
        _assembly(builder, _VOID, "st.shared.f32 [$0], $1;", "r,f", arguments, effect=True)
        return context.get_dummy_value()

    return signature, generate
