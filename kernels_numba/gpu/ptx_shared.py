"""Shared memory by address and copies into it, as inline PTX: what `ptx` is for other instructions.

Copies run on while the thread goes on; those before a `copy_commit` are a group, groups arrive in order, and
`copy_wait_n` waits until all but the last n groups of this thread are there. Twins are in `twins_shared`.

Source: PTX ISA 9.0, sections 9.7.9 and 9.7.13.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.cuda.extending import intrinsic

from kernels_numba.gpu.ptx import _I32, _VOID, _address, _assembly, _tuple


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


def _copies(lines):
    return "{ .reg .pred p; " + " ".join(
        f"setp.gt.s32 p, $2, {i}; @p cp.async.{line} [$0+{512 * i}], [$1+{512 * i}], {size};"
        for i, (line, size) in enumerate(lines)) + " }"


def _copy(text):
    @intrinsic
    def copy(typingctx, address, pointer, offset, count):
        signature = types.void(types.uint32, pointer, offset, types.int32)

        def generate(context, builder, signature, arguments):
            target, *source, count = arguments
            source = _address(context, builder, signature.args[1], *source)
            _assembly(builder, _VOID, text, "r,l,r", [target, source, count], effect=True)
            return context.get_dummy_value()

        return signature, generate

    return copy


# copy_chunks(address, pointer, offset, count): 16 bytes from each of 0 to 4 chunks, which are 512 bytes apart.
copy_chunks = _copy(_copies([("cg.shared.global.L2::256B", 16)] * 4))
# copy_word(address, pointer, offset, count): 4 bytes if count is more than 0.
copy_word = _copy(_copies([("ca.shared.global", 4)]))


def _effect(text):
    @intrinsic
    def act(typingctx):
        def generate(context, builder, signature, arguments):
            _assembly(builder, _VOID, text, "", [], effect=True)
            return context.get_dummy_value()

        return types.void(), generate

    return act


copy_commit = _effect("cp.async.commit_group;")
copy_wait_1, copy_wait_2, copy_wait_3 = (_effect(f"cp.async.wait_group {left};") for left in (1, 2, 3))
sync_warp = _effect("bar.warp.sync 0xffffffff;")
