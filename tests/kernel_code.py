"""Kernels and the builder of their tables compiled by LLVM alone, for a processor of choice: to read or to run."""

import ctypes

import numpy as np
from llvmlite import binding, ir

from kernels_numba.cpu import block, tables
from kernels_numba.cpu.records import table_bytes, tile_bytes
from kernels_numba.cpu.simd import LONG, outlined

ROWS = 16


class Code:
    """Machine code of the builder and of one kernel for each of some bit-widths.

    Attributes
    ----------
    ir, assembly : str
    """

    def __init__(self, vectors, mode, columns=128, tokens=1, widths=range(1, 9), cpu="", features="", triple=None):
        self.mode, self.columns, self.tokens, self.widths = mode, columns, tokens, widths
        module = self._module(vectors)
        module.triple = triple or binding.get_process_triple()
        self.ir = str(module)
        binding.initialize_all_targets()
        binding.initialize_all_asmprinters()
        # as Numba compiles, where the code is to run
        how = {"reloc": "static", "codemodel": "small"} if triple else {"jit": True}
        self.machine = binding.Target.from_triple(module.triple).create_target_machine(cpu, features, opt=3, **how)
        self._parsed = binding.parse_assembly(self.ir)
        self._parsed.verify()
        passes = binding.create_pass_builder(self.machine, binding.create_pipeline_tuning_options(speed_level=3))
        passes.getModulePassManager().run(self._parsed, passes)
        self.assembly = self.machine.emit_assembly(self._parsed)
        self._engine = None

    def _module(self, vectors):
        module = ir.Module()
        for bits in self.widths:
            builder, arguments = _function(module, ir.VoidType(), f"multiply{bits}", 6)
            body = block.kernel(vectors, self.mode, self.columns, self.tokens, bits)
            outlined(builder, vectors, f"kernel{bits}", arguments, body)
            builder.ret_void()
        builder, arguments = _function(module, LONG, "build", 3)
        builder.ret(tables.write_tables(vectors(builder), self.mode, self.columns, *arguments))
        return module

    def run(self, x, indices, tiles):
        """Return bits → the sums of all tiles, float32 [tokens, tiles · 16]; x [tokens, K] is gathered by `indices`."""
        if self._engine is None:
            self._engine = binding.create_mcjit_compiler(self._parsed, self.machine)
            self._engine.finalize_object()
        size = table_bytes(self.columns, self.mode)
        record, indices = _aligned(np.zeros(self.tokens * size, np.uint8)), _aligned(indices.astype(np.int32))
        build = self._callable("build", ctypes.c_int64, 3)
        for token in range(self.tokens):
            assert build(x[token].ctypes.data, indices.ctypes.data, record.ctypes.data + token * size) == 0
        found = {}
        for bits in self.widths:
            count = tiles[bits].size // tile_bytes(self.columns, bits)
            sums, data = _aligned(np.zeros((self.tokens, count * ROWS), np.float32)), _aligned(tiles[bits])
            multiply = self._callable(f"multiply{bits}", None, 6)
            multiply(data.ctypes.data, count, record.ctypes.data, size, sums.ctypes.data, count * ROWS * 4)
            found[bits] = sums
        return found

    def _callable(self, name, result, arguments):
        return ctypes.CFUNCTYPE(result, *[ctypes.c_int64] * arguments)(self._engine.get_function_address(name))


def _function(module, result, name, arguments):
    function = ir.Function(module, ir.FunctionType(result, [LONG] * arguments), name)
    return ir.IRBuilder(function.append_basic_block("entry")), function.args


def _aligned(array):
    memory = np.zeros(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


def random_case(seed, columns=128, tokens=1, widths=range(1, 9), count=3):
    """Arguments of `Code.run`: activations, the order of the columns, tiles."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, columns + 40)).astype(np.float32)
    tiles = {}
    for bits in widths:
        tile = rng.integers(0, 256, (count, tile_bytes(columns, bits)), dtype=np.uint8)
        scales = rng.uniform(-0.1, 0.1, (count, 32)).astype(np.float16)
        tile[:, -64:] = scales.view(np.uint8)
        tiles[bits] = tile.reshape(-1)
    return x, rng.permutation(columns + 40)[:columns], tiles
