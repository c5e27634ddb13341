"""The product of a block of tiles as a function for Numba: one kernel for each bit-width, for a target and a mode."""

from __future__ import annotations

from numba import types
from numba.core.errors import RequireLiteralValue
from numba.extending import intrinsic

from kernels_numba.cpu import lut, lut_lanes, signs, targets
from kernels_numba.cpu.simd import LONG, outlined

MAX_BITS = 8


@intrinsic
def multiply_block(typing, target, mode, columns, tokens, bits, tiles, count, tables, table_step, sums, sum_step):
    """Add the product of `count` tiles of `bits` bits to the sums of `tokens` tokens.

    Parameters
    ----------
    target, mode, columns, tokens : literals
        One of `targets.MODES` and of its modes, columns of a tile, tokens of this call.
    bits : int64
        1..8, the same for all tiles.
    tiles, tables, sums : int64
        Addresses: of the first tile; of the table record of these columns for the first token; of 16·count float32.
    table_step, sum_step : int64
        Bytes from one token to the next.
    """
    for literal in (target, mode, columns, tokens):
        if not isinstance(literal, types.Literal):
            raise RequireLiteralValue(literal)
    vectors = targets.vectors(target.literal_value)
    fixed = mode.literal_value, columns.literal_value, tokens.literal_value
    signature = types.void(target, mode, columns, tokens, *[types.int64] * 7)

    def codegen(context, builder, signature, arguments):
        bits, *rest = arguments[4:]
        end = builder.append_basic_block("multiplied")
        choice = builder.switch(bits, end)
        for width in range(1, MAX_BITS + 1):
            with builder.goto_block(builder.append_basic_block(f"bits{width}")):
                choice.add_case(LONG(width), builder.block)
                name = f"multiply_{fixed[0]}_{fixed[1]}x{fixed[2]}_{width}"
                outlined(builder, vectors, name, rest, kernel(vectors, *fixed, width))
                builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return signature, codegen


def kernel(vectors, mode: str, columns: int, tokens: int, bits: int):
    """Return ``write(simd, tiles, count, tables, table_step, sums, sum_step)``, which writes a kernel."""
    modes = {"dot": lut, "lanes": lut_lanes, "signs": signs}[vectors.kernels].KERNELS
    return modes[mode](columns, tokens, bits).write
