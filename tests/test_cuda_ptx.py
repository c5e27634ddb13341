"""Look-up kernels compiled for five compute capabilities without a device: what their PTX and their code hold."""

import re

import pytest
from cuda_ptx import CAPABILITIES, LUT, assemble, compile_ptx, compiler  # noqa: F401 - compiler is a fixture


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", LUT)
def test_look_up_kernel_keeps_its_sums_in_registers(capability, name):
    from kernels_numba.gpu import lut

    ptx, tokens, width = compile_ptx(capability)[name], LUT[name]["tokens"], LUT[name]["width"]
    assert re.search(rf"^\.target sm_{capability[0]}{capability[1]}$", ptx, re.MULTILINE)
    once, kept = (ptx.count(f"ld.global.nc.{cached}L2::256B.v4.u32") for cached in ("L1::no_allocate.", ""))
    assert (once, kept) == ((2, 2) if tokens == 1 else (0, 4))  # lines of a plane; numbers of columns
    assert not re.search(r"\.local|\bcall\b|\batom\.|\bred\.", ptx)
    assert ptx.count("ld.shared.f32 ") >= 16 * {8: 1, 6: 2, 4: 2, 2: 4}[width]
    registers, memory, shared, _ = assemble(ptx, capability)
    assert memory == 0 and registers <= 128
    assert shared - lut.shared_bytes(width, tokens) in (0, 1024)  # of which 1024 are the system's on some chips


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_compiler_made_two_exchanges_of_one(capability):
    """Lanes that came different ways would wait in different places: 15 that halve 16 sums, 1 across, 4 of totals."""
    assert compile_ptx(capability)["lut 8"].count("shfl.sync.bfly.b32") == 20


@pytest.mark.parametrize("text,convergent", [("shfl.sync.bfly.b32 $0, $1, 1, 31, -1;", True),
                                             ("bar.warp.sync -1;", True), ("ld.shared.f32 $0, [$1];", False)])
def test_instructions_of_a_warp_are_convergent(text, convergent):
    from llvmlite import ir

    from kernels_numba.gpu import ptx

    function = ir.Function(ir.Module(), ir.FunctionType(ir.VoidType(), []), "f")
    ptx._assembly(ir.IRBuilder(function.append_basic_block()), ir.VoidType(), text, "", [], effect=True)
    assert ("() convergent" in str(function)) == convergent


@pytest.mark.parametrize("kind,store", [("float16", "cvt.rn.f16.f32"), ("bfloat16", "cvt.rn.bf16.f32")])
def test_sums_are_rounded_once(kind, store):
    ptx = compile_ptx((8, 0))[f"sum {kind}"]
    assert ptx.count(store) == 1 and ".local" not in ptx
