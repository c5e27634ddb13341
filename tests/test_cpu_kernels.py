"""Kernels of every target, compiled for the least processor that has it: their instructions, and the same bits."""

import ctypes
import functools
import re

import naive
import numpy as np
import pytest
from kernel_code import Code, random_case
from llvmlite import binding, ir

from kernels_numba.cpu import halves, neon, targets
from kernels_numba.cpu.records import VECTOR, tile_bytes

LINUX = {"x86": "x86_64-unknown-linux-gnu", "arm": "aarch64-unknown-linux-gnu"}
BEST = next(name for name, needs in targets.NEEDS.items() if targets.features().issuperset(needs))
LIMITS = {"lut16": 1e-4, "lut8": 2e-2, "exact": 1e-5}
# target → (processor, what its code may not contain)
PROCESSORS = {
    "avx512_vbmi": ("icelake-server", ""),
    "avx512f": ("skylake-avx512", "vpermb|vpdp|vpermi2b"),
    "avx2": ("haswell", "zmm|%k[0-7]"),
    "generic": ("x86-64", "[yz]mm|\tv[a-z]|pshufb|pblend|roundps"),
}
on_x86 = pytest.mark.skipif(targets.architecture() != "x86", reason="runs x86 code")


def _needs(target):
    if any(feature not in targets.features() for feature in targets.NEEDS[target]):
        pytest.skip(f"this processor cannot run {target}")


@pytest.fixture
def plain(monkeypatch):
    """Numba may not use float16 or fused multiply-add instructions."""
    monkeypatch.setattr(targets, "basics", lambda: frozenset())


def _weight(tiles, bits, columns):
    """float64 [tiles · 16, columns]."""
    tiles = tiles.reshape(-1, tile_bytes(columns, bits))
    scales = np.ascontiguousarray(tiles[:, -VECTOR:]).view(np.float16).astype(float).reshape(-1, 2, 16, 1)
    planes = tiles[:, :-VECTOR].reshape(len(tiles), columns // 32, bits, 16, 4)
    codes = [[[naive.tile_code(tile, bits, row, column) for column in range(columns)] for row in range(16)]
             for tile in planes]
    return (scales[:, 0] * (2.0 * np.array(codes) - (1 << bits) + 1) + scales[:, 1]).reshape(-1, columns)


def _check(code, case):
    """The sums are near those of the dequantized weight; return them."""
    x, indices, tiles = case
    found = code.run(*case)
    gathered = x[:, indices].astype(float)
    for bits, sums in found.items():
        expected = gathered @ _weight(tiles[bits], bits, code.columns).T
        assert np.linalg.norm(sums - expected) < LIMITS[code.mode] * np.linalg.norm(expected), bits
    return found


@functools.cache
def _host():
    return {"cpu": binding.get_host_cpu_name(), "features": binding.get_host_cpu_features().flatten()}


@functools.cache
def _of_best_target(mode, columns, tokens, widths):
    """(arguments of `Code.run`, what the kernels of the best target make of them)."""
    case = random_case(columns, columns, tokens, widths)
    return case, Code(targets.vectors(BEST), mode, columns, tokens, widths, **_host()).run(*case)


def _same_bits(vectors, mode, columns, tokens, widths, **processor):
    """Compile for another target, run, compare; return the code."""
    code = Code(vectors, mode, columns, tokens, widths, **processor)
    case, expected = _of_best_target(mode, columns, tokens, widths)
    found = _check(code, case)
    for bits in widths:
        np.testing.assert_array_equal(found[bits].view(np.int32), expected[bits].view(np.int32), str(bits))
    return code


SHAPES = [("lut16", 128, 1, (1, 2, 3, 4, 5, 6, 7, 8)), ("lut16", 64, 3, (3, 6)), ("lut16", 32, 1, (1, 8)),
          ("lut8", 128, 2, (4, 8)), ("lut8", 64, 1, (5, 7)), ("exact", 128, 1, (1, 4, 8)), ("exact", 32, 2, (3,))]


@on_x86
@pytest.mark.parametrize(("mode", "columns", "tokens", "widths"), SHAPES)
@pytest.mark.parametrize("target", ["avx512f", "avx2"])
def test_lower_targets_give_the_bits_of_the_best(target, mode, columns, tokens, widths):
    _needs(target)
    cpu, forbidden = PROCESSORS[target]
    code = _same_bits(targets.vectors(target), mode, columns, tokens, widths, cpu=cpu)
    assert not re.search(forbidden, code.assembly) and not _outside(code.assembly)


def _outside(assembly):
    """Calls of anything but the kernels."""
    return "\n".join(line for line in assembly.splitlines() if re.search(r"\t(call|bl)q?\t", line)
                     and "kernel" not in line)


@on_x86
@pytest.mark.parametrize(("columns", "tokens"), [(128, 1), (32, 2)])
def test_generic_needs_nothing_but_the_oldest_processor(plain, columns, tokens):
    cpu, forbidden = PROCESSORS["generic"]
    code = Code(targets.vectors("generic"), "exact", columns, tokens, (1, 8), cpu=cpu)
    assert not re.search(forbidden, code.assembly) and not _outside(code.assembly)
    _check(code, random_case(1, columns, tokens, (1, 8)))


@on_x86
def test_best_target_uses_its_instructions():
    code = Code(targets.vectors("avx512_vbmi"), "lut16", cpu=PROCESSORS["avx512_vbmi"][0], widths=(2,))
    assert code.assembly.count("vpermb") >= 32 and code.assembly.count("vpdpbusd") >= 32
    assert not _outside(code.assembly)


@pytest.mark.parametrize(("mode", "tokens"), [("lut16", 1), ("lut16", 4), ("lut8", 1), ("lut8", 8), ("exact", 1)])
def test_neon_compiles_to_its_instructions(mode, tokens):
    """For a compiler that was not told of dot products: the kernels ask for them themselves."""
    try:
        binding.initialize_all_targets()
        binding.Target.from_triple(LINUX["arm"])
    except RuntimeError as error:
        pytest.skip(f"llvmlite cannot compile for aarch64: {error}")
    code = Code(neon.Neon, mode, 128, tokens, widths=(3, 8), cpu="generic", features="+neon", triple=LINUX["arm"])
    assert not _outside(code.assembly)
    for bits in code.widths:
        kernel = code.assembly.split(f"\nkernel{bits}:")[1].split("\n.Lfunc_end")[0]
        count = {name: len(re.findall(rf"\t{name}\t", kernel)) for name in ("tbl", "sdot", "udot", "fmadd", "fmla")}
        look_ups = bits * tokens * 4 * (8 if mode == "exact" else 2)  # of a word: words are a loop
        assert count["tbl"] == look_ups * (2 if mode == "lut16" else 1)
        twice = 1 + bits // 8 / bits  # the weight of plane 7 is no signed byte
        assert count["sdot"] == (0 if mode == "exact" else look_ups * twice)
        assert count["udot"] == (look_ups if mode == "lut16" else 0)
        assert count["fmla"] > 0


def test_generic_compiles_for_any_processor_without_calling_a_library(plain):
    names = ("aarch64-unknown-linux-gnu", "powerpc64le-unknown-linux-gnu", "riscv64-unknown-linux-gnu")
    binding.initialize_all_targets()
    for triple in names:
        features = "+m,+a,+f,+d" if "riscv" in triple else ""
        code = Code(targets.vectors("generic"), "exact", widths=(3,), features=features, triple=triple)
        assert not _outside(code.assembly), triple


class Twin(neon.Neon):
    """NEON's instructions written with what x86 has."""

    features = None

    def _tbl(self, table, index):
        b, found = self.builder, self.constant(neon._QUARTER_BYTES, 0)
        for part, entries in enumerate(table):
            here = b.icmp_unsigned("==", b.lshr(index, self.constant(index.type, 4)), self.constant(index.type, part))
            entry = self._call("llvm.x86.ssse3.pshuf.b.128", index.type, [entries, b.and_(index, self.constant(
                index.type, 15))])
            found = b.select(here, entry, found)
        return found

    def _dot_quarter(self, name, total, entries, weight):
        b, wide = self.builder, ir.VectorType(ir.IntType(32), 16)
        extend = {"sdot": b.sext, "udot": b.zext}[name]
        products = b.mul(extend(entries, wide), extend(weight, wide))
        for part in range(4):
            total = b.add(total, self._shuffle(products, range(part, 16, 4)))
        return total


@on_x86
@pytest.mark.parametrize(("mode", "columns", "tokens", "widths"), [
    ("lut16", 128, 1, (2, 8)), ("lut8", 64, 2, (8,)), ("exact", 32, 1, (3,))])
def test_neon_kernels_give_the_bits_of_the_best(mode, columns, tokens, widths):
    _needs("avx2")
    _same_bits(Twin, mode, columns, tokens, widths, **_host())


@pytest.mark.parametrize("kind", ["widen", "narrow"])
def test_float16_by_integers(kind):
    """All float16; all of them and their neighbours, half way between them, as float32."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    short, word = ir.IntType(16), ir.IntType(32)
    module = ir.Module()
    given, returned = (short, word) if kind == "widen" else (word, short)
    function = ir.Function(module, ir.FunctionType(returned, [given]), kind)
    builder = ir.IRBuilder(function.append_basic_block())
    if kind == "widen":
        floats = halves.widen(builder, builder.zext(function.args[0], word), ir.FloatType())
        builder.ret(builder.bitcast(floats, word))
        values, expected = every.view(np.uint16), every.astype(np.float32)
    else:
        builder.ret(halves.narrow(builder, builder.bitcast(function.args[0], ir.FloatType())))
        finite = np.sort(every[np.isfinite(every)].astype(np.float32))
        middle = (finite[1:] + finite[:-1]) / 2
        large = np.array([65519.996, 65520, 65536, 1e9, np.inf, np.nan, 1e-45, 0], np.float32)
        values = np.concatenate([finite, middle, np.nextafter(middle, np.float32(np.inf)), large, -large])
        with np.errstate(over="ignore"):
            values, expected = values.view(np.uint32), values.astype(np.float16)
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(str(module)),
                                           binding.Target.from_default_triple().create_target_machine(jit=True))
    c_short, c_word = ctypes.c_uint16, ctypes.c_uint32
    kinds = (c_word, c_short) if kind == "widen" else (c_short, c_word)
    call = ctypes.CFUNCTYPE(*kinds)(engine.get_function_address(kind))
    found = np.array([call(value) for value in values.tolist()], expected.view(f"u{expected.itemsize}").dtype)
    nan = np.isnan(expected)
    assert np.isnan(found.view(expected.dtype)[nan]).all()
    np.testing.assert_array_equal(found[~nan], expected.view(found.dtype)[~nan])
