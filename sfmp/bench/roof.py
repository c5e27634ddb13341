"""The roof: how fast all threads together read bytes that are in no cache, and do nothing else with them."""

from __future__ import annotations

import functools

import numpy as np
from numba import njit, prange, types
from numba.extending import intrinsic

from kernels_numba.cpu import launch, threads
from kernels_numba.cpu.simd import INTS, VECTOR, Simd
from sfmp.bench.timing import Candidate

CHAINS = 8  # vectors that are read before one depends on another
PIECE = 4096  # bytes between looks at the loop counter


def _reading(ahead):
    """Intrinsic ``read(address, pieces)``: XOR of so many pieces of memory, as one int32."""

    @intrinsic
    def read(typing, address, pieces):
        def codegen(context, builder, signature, arguments):
            return _write(Simd(builder), ahead, *arguments)

        return types.int32(types.int64, types.int64), codegen

    return read


def _write(v: Simd, ahead, address, pieces):
    memory = v.stack(VECTOR * CHAINS)
    seen = [v.at(memory, chain * VECTOR) for chain in range(CHAINS)]
    for place in seen:
        v.store(place, v.constant(INTS, 0))
    with v.loop(pieces) as index:
        piece = v.at(address, v.times(index, PIECE))
        values = [v.load(INTS, place) for place in seen]
        for line in range(0, PIECE, VECTOR):
            if ahead:
                v.prefetch(v.at(piece, ahead[0] + line), ahead[1])
            chain = line // VECTOR % CHAINS
            values[chain] = v.builder.xor(values[chain], v.load(INTS, v.at(piece, line)))
        for place, value in zip(seen, values, strict=True):
            v.store(place, value)
    return v.reduce_or(functools.reduce(v.builder.xor, [v.load(INTS, place) for place in seen]))


@functools.cache
def _reader(ahead):
    threads.choose_layer()
    _read = _reading(ahead)

    @njit(parallel=True, nogil=True)
    def read(address, pieces, count):
        found = np.zeros(count * 16, np.int32)
        for part in prange(count):
            first, last = part * pieces // count, (part + 1) * pieces // count
            found[16 * part] = _read(address + first * PIECE, last - first)
        return found

    @njit(nogil=True)
    def read_alone(address, pieces, count):
        return np.full(1, _read(address, pieces))

    return read, read_alone


def candidates(images: list[np.ndarray], label: str) -> list[Candidate]:
    """Pure reading of the same bytes as the kernels read, without software prefetch and with that of the kernels."""
    count = threads.count()
    found = []
    for name, ahead in (("as it is", None), ("prefetched", launch.prefetch())):
        read = _reader(ahead)[count == 1]
        products = [functools.partial(read, image.ctypes.data, len(image) // PIECE, count) for image in images]
        found.append(Candidate(f"read {label} {name}", "roof", products, len(images[0]) // PIECE * PIECE,
                               facts={"bits": label, "mode": name}))
    return found
