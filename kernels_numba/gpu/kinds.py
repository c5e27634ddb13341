"""Numbers of activations and results: how a kernel reads and writes them."""

from __future__ import annotations

import functools

from numba import types

from kernels_numba.gpu.primitives import bfloat_bits, bfloat_value, device, half_bits, half_low

KINDS = ("float16", "bfloat16", "float32")


@functools.cache
def reader(kind: str):
    """Device function (pointer, index) → float32; half-precision numbers are passed as uint16."""

    @device
    def read_half(pointer, index):
        return half_low(types.uint32(pointer[index]))

    @device
    def read_bfloat(pointer, index):
        return bfloat_value(pointer[index])

    @device
    def read_float(pointer, index):
        return pointer[index]

    return dict(zip(KINDS, (read_half, read_bfloat, read_float), strict=True))[kind]


@functools.cache
def writer(kind: str):
    """Device function (pointer, index, float32); half-precision numbers are passed as uint16."""

    @device
    def write_half(pointer, index, value):
        pointer[index] = half_bits(value)

    @device
    def write_bfloat(pointer, index, value):
        pointer[index] = bfloat_bits(value)

    @device
    def write_float(pointer, index, value):
        pointer[index] = value

    return dict(zip(KINDS, (write_half, write_bfloat, write_float), strict=True))[kind]
