"""The tensor-core kernel: codes become float16 by one mask and one product, tensor cores add in float32.

A thread block multiplies one strip of 32 rows. Its warps take the tiles in turn, tiles of most bits first, and their
sums are added in order, so the result does not depend on timing. Every warp has a ring of stages in shared memory into
which units are copied while it multiplies others: it reads one into registers, asks for the next that may have its
place, whatever the bits of either, and then multiplies. Warps of a block do not wait for each other in the loop.

Activations are in permuted order, either gathered into shared memory by every block while its first units are on their
way (`make_fused`), or once for all blocks by a kernel before (`make_kernel` after `mma_gather.make_arrange`).

An activation that is not finite makes the results of its token NaN or infinite, and those of no other token.

Source: CUDA.md sections 4.2–4.5. Differences: copies into shared memory in place of two sets of registers, since ptxas
tracks the loads of both sets with one scoreboard and so waits for either before it asks for more; bfloat16 is scaled
per segment, which needs one pass over x.
"""

from __future__ import annotations

import functools

from numba import cuda, types

from kernels_numba.gpu.kinds import writer
from kernels_numba.gpu.mma_codes import read_chunks
from kernels_numba.gpu.mma_gather import gatherer
from kernels_numba.gpu.mma_unit import dispatcher
from kernels_numba.gpu.primitives import (
    copy_chunks,
    copy_commit,
    copy_wait_1,
    copy_wait_2,
    copy_wait_3,
    copy_word,
    device,
    float_bits,
    kernel,
    load_shared,
    load_shared_line,
    shared_address,
    store_shared,
    sync_warp,
)

KINDS = ("float16", "bfloat16")  # float32 activations would lose half of their digits
TOKENS = 8  # of a tensor-core tile
FUSED_TOKENS = 8
MANY_WARPS, FEW_WARPS = 16, 8  # that run together on a processor: how many registers a lane may have
WAITS = {2: copy_wait_1, 3: copy_wait_2, 4: copy_wait_3}  # by stages: until the oldest is there

INT, U, L, F = types.int32, types.uint32, types.int64, types.float32


def resident_warps(widths: tuple[int, ...], tokens: int, kind: str, segment: int) -> int:
    """Warps of a processor that have room for their registers: 128 each without spills, or 255."""
    few_sums = tokens == 1 or (tokens <= 8 and (segment > 32 or kind == "float16"))
    return MANY_WARPS if few_sums and max(widths) <= 4 else FEW_WARPS


def most_tokens(widths: tuple[int, ...], segment: int) -> int:
    """Most tokens of one launch: as many as have room for their sums, which are two sets beyond 4 bits."""
    if max(widths) <= 4:
        return 32
    return 16 if segment > 32 else 8


def stage_bytes(widths: tuple[int, ...], segment: int) -> int:
    """Shared memory of one stage of a warp: a unit of most bits and its scales."""
    return 512 * max(widths) + 128 * (128 // segment)


def ring_bytes(widths: tuple[int, ...], tokens: int, segment: int, stages: int) -> int:
    """Shared memory of a warp: its stages, and later its sums."""
    return max(stages * stage_bytes(widths, segment), 4 * 32 * (1 if tokens == 1 else max(tokens, TOKENS)))


@functools.cache
def stage(widths: tuple[int, ...], tokens: int, segment: int):
    """Device functions that ask for a unit with its scales, and that read what arrived, for stages at `slot`."""
    most, single, per_unit = max(widths), tokens == 1, 128 // segment
    low, high, both = min(most, 4), most - 4, most > 4

    @device
    def ask(units, scales, start, record, tile, info, lane, slot):
        bits = INT(info & 15)
        at = start + L(info >> 4) * 512
        copy_chunks(U(slot + U(16 * lane)), units, at, bits)
        if both:
            copy_chunks(U(slot + U(2048 + 16 * lane)), units, at + 2048, INT(bits - 4))
        for part in range(per_unit):
            copy_word(U(slot + U(512 * most + 128 * part + 4 * lane)), scales,
                      ((record + tile * per_unit + part) * 32 + lane) * 4, bits)
        copy_commit()

    @device
    def read(lane, slot, words, more, scale):
        read_chunks(U(slot + U(16 * lane)), low, words)
        if both:
            read_chunks(U(slot + U(2048 + 16 * lane)), high, more)
        for part in range(per_unit):
            at = U(slot + U(512 * most + 128 * part))
            if single:
                scale[part] = float_bits(load_shared(U(at + U(4 * lane))))
            else:
                scale[4 * part], scale[4 * part + 1], scale[4 * part + 2], scale[4 * part + 3] = load_shared_line(
                    U(at + U(16 * (lane // 4))))

    return ask, read


@device
def clear(tile, sums, high_sums, results):
    """Zero what a lane holds of one tile of tokens; loops over all tiles are too long for compilers to unroll."""
    for i in range(8):
        sums[8 * tile + i] = F(0)
        high_sums[8 * tile + i] = F(0)
        results[8 * tile + i] = F(0)


@functools.cache
def mover(per_unit: int):
    """Device function numbers ← found from `at` on, element by element: of a loop compilers make a copy of memory."""

    @device
    def move(found, at, numbers):
        numbers[0] = found[at]
        if per_unit > 1:
            numbers[1] = found[at + 1]
        if per_unit > 2:
            numbers[2] = found[at + 2]
            numbers[3] = found[at + 3]

    return move


@device
def put(tile, address, results):
    """Write the results of one tile of tokens, [token][row]."""
    for rho in range(4):
        for e in range(2):
            store_shared(U(address + U(4 * (256 * tile + 32 * e + 8 * rho))), results[8 * tile + 2 * rho + e])


@functools.cache
def body(widths: tuple[int, ...], tokens: int, kind: str, segment: int, warps: int, stages: int, fused: bool):
    """Device function that is the whole kernel.

    After x come the columns where the kernel gathers x itself, and totals and factors where not.
    """
    write, (ask, read), wait = writer(kind), stage(widths, tokens, segment), WAITS[stages]
    scaled, single, tiles = kind == "bfloat16", tokens == 1, max(1, tokens // TOKENS)
    add, move = dispatcher(widths, tokens, segment, scaled, fused), mover(128 // segment)
    threads, size, per_unit = 32 * warps, 32 if single else 32 * TOKENS * tiles, 128 // segment
    own_bytes, slot_bytes = ring_bytes(widths, tokens, segment, stages), stage_bytes(widths, segment)
    queued, fragments, held, owned = stages + 1, 4 * tiles, 8 * tiles, 2 * tiles
    scale_size = per_unit if single else 4 * per_unit
    stride_more = 64 if fused else 0  # bytes that rows of activations are apart beyond their own

    @device
    def given(x, totals, factors, address, names, numbers, warp, lane, in_features, length, count):
        return x, totals, factors

    prepare = gatherer(kind, tokens, segment, warps) if fused else given

    @device
    def multiply(units, scales, table, segments, strip_chunk, strip_record, rows, x, gathered, more_gathered, memory,
                 bias, y, out_features, in_features, length, table_tiles, strip, count):
        words = cuda.local.array(16, U)
        more = cuda.local.array(16, U)
        scale = cuda.local.array(scale_size, U)
        queue = cuda.local.array(queued, INT)  # table words of the units from the one that is multiplied on
        numbers = cuda.local.array(per_unit, INT)
        next_numbers = cuda.local.array(per_unit, INT)
        names = cuda.local.array(16, INT)
        rest = cuda.local.array(4, U)
        b = cuda.local.array(fragments, U)
        sums = cuda.local.array(held, F)
        high_sums = cuda.local.array(held, F)
        results = cuda.local.array(held, F)
        places = cuda.local.array(tiles, INT)
        owners = cuda.local.array(owned, INT)
        thread = INT(cuda.threadIdx.x)
        lane, warp = INT(thread & 31), INT(thread >> 5)
        first = INT(INT(cuda.blockIdx.y) * table_tiles)
        tile = INT(first + warp)
        for i in range(stages + 1):
            queue[i] = table[tile + i * warps]
        record = L(strip_record[strip]) - first * per_unit  # of tile 0 of the first row block, were it in this strip
        start = L(strip_chunk[strip]) * 512 + lane * 16
        natural = rows[strip * 32 + lane]
        address = U(U(shared_address(memory) + U(15)) & U(0xFFFFFFF0))
        ring = U(address + U(warp * own_bytes))
        end = U(ring + U(stages * slot_bytes))
        for i in range(stages):
            ask(units, scales, start, record, tile + i * warps, queue[i], lane, U(ring + U(i * slot_bytes)))
        move(segments, tile * per_unit, numbers)
        offset = bias[natural] if natural >= 0 else F(0)
        at_x, at_totals, at_factors = prepare(x, gathered, more_gathered, U(address + U(warps * own_bytes)), names,
                                              words, warp, lane, in_features, length, count)
        if fused:
            cuda.syncthreads()
        clear(0, sums, high_sums, results)
        if tiles > 1:
            clear(1, sums, high_sums, results)
        if tiles > 2:
            clear(2, sums, high_sums, results)
            clear(3, sums, high_sums, results)
        last = INT(tokens - 1) if fused else count - 1  # where fewer tokens are there, any other stands for the rest
        for i in range(tiles):
            places[i] = min(INT(8 * i + lane // 4), last) * (2 * length + stride_more) + 16 * (lane % 4)
            for e in range(2):
                owners[2 * i + e] = min(INT(8 * i + 2 * (lane % 4) + e), last) * (length // segment)
        slot = ring
        while queue[0] > 0:
            wait()
            if not single:  # lanes read scales that others copied
                sync_warp()
            read(lane, slot, words, more, scale)
            if not single:
                sync_warp()
            ask(units, scales, start, record, tile + stages * warps, queue[stages], lane, slot)
            bits = INT(queue[0] & 15)
            for i in range(stages):
                queue[i] = queue[i + 1]
            queue[stages] = table[tile + (stages + 1) * warps]
            move(segments, (tile + warps) * per_unit, next_numbers)
            add(bits, words, more, scale, numbers, at_x, at_totals, at_factors, places, owners, lane, rest, b, sums,
                high_sums, results)
            move(next_numbers, 0, numbers)
            tile = INT(tile + warps)
            slot = U(slot + U(slot_bytes))
            slot = ring if slot == end else slot
        sync_warp()  # all lanes have read their stages, whose place the sums take
        if single:
            store_shared(U(ring + U(4 * (lane // 4 + 8 * (lane % 4)))), results[0])
        else:
            place = U(ring + U(4 * (lane % 4 * 64 + lane // 4)))
            put(0, place, results)
            if tiles > 1:
                put(1, place, results)
            if tiles > 2:
                put(2, place, results)
                put(3, place, results)
        cuda.syncthreads()
        for i in range(thread, size, threads):
            token = i // 32  # a thread has one row at every token
            if natural >= 0 and token < count:
                total = F(0)
                for other in range(warps):
                    total += load_shared(U(address + U(other * own_bytes + 4 * i)))
                write(y, L(token) * out_features + natural, F(total + offset))

    return multiply


@functools.cache
def make_fused(widths: tuple[int, ...], tokens: int, kind: str, segment: int, warps: int, stages: int):
    """Return the kernel that gathers activations itself: 1, 2, 4 or 8 tokens, or fewer.

    Its arguments are arrays of `MmaLayout`, x [tokens, K], bias float32 [N], y [tokens, N], N, K, length (of
    `columns`), table_tiles, strips and the number of tokens. Grid: most_strips × row blocks, a block of 32·warps
    threads per strip, with 16 bytes of shared memory, `ring_bytes` per warp and `mma_gather.shared_bytes`.
    """
    multiply = body(widths, tokens, kind, segment, warps, stages, True)

    @kernel(32 * warps, max(1, resident_warps(widths, tokens, kind, segment) // warps))
    def mma(units, scales, tiles, segments, strip_chunk, strip_record, rows, columns, x, bias, y, out_features,
            in_features, length, table_tiles, strips, count):
        memory = cuda.shared.array(0, U)
        strip = INT(INT(cuda.blockIdx.y) * INT(cuda.gridDim.x) + INT(cuda.blockIdx.x))
        if strip < strips:  # the last row block may have fewer
            multiply(units, scales, tiles, segments, strip_chunk, strip_record, rows, x, columns, INT(0), memory, bias,
                     y, out_features, in_features, length, table_tiles, strip, count)

    return mma


@functools.cache
def make_kernel(widths: tuple[int, ...], tokens: int, kind: str, segment: int, warps: int, stages: int):
    """Return the kernel for 1, 8, 16 or 32 arranged tokens, or fewer.

    Its arguments are as for `make_fused`, without K and with what `make_arrange`'s kernel wrote for columns and x.
    """
    multiply = body(widths, tokens, kind, segment, warps, stages, False)

    @kernel(32 * warps, max(1, resident_warps(widths, tokens, kind, segment) // warps))
    def mma(units, scales, tiles, segments, strip_chunk, strip_record, rows, arranged, totals, factors, bias, y,
            out_features, length, table_tiles, strips, count):
        memory = cuda.shared.array(0, U)
        strip = INT(INT(cuda.blockIdx.y) * INT(cuda.gridDim.x) + INT(cuda.blockIdx.x))
        if strip < strips:
            multiply(units, scales, tiles, segments, strip_chunk, strip_record, rows, arranged, totals, factors, memory,
                     bias, y, out_features, INT(0), length, table_tiles, strip, count)

    return mma
