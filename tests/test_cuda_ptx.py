"""Kernels compiled for five compute capabilities without a device: what their PTX and, with ptxas, their code holds."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0))


@pytest.fixture(scope="module", autouse=True)
def compiler():
    """Numba compiles with libnvvm and asks libnvrtc what it may compile for."""
    pathfinder = pytest.importorskip("cuda.pathfinder", reason="needs numba-cuda")
    for library in ("nvvm", "nvrtc"):
        try:
            pathfinder.load_nvidia_dynamic_lib(library)
        except Exception as error:
            pytest.skip(f"needs lib{library} to compile for CUDA: {str(error).splitlines()[0]}")


BASE = {"name": "lut", "kind": "float16", "levels": [2, 3, 4]}
REQUESTS = {f"sum {kind}": {**BASE, "kind": kind, "group_size": 128, "launch": 1} for kind in ("float16", "bfloat16")}
for _width, _tokens, _segment in ((8, 1, 128), (4, 8, 128), (6, 4, 64), (2, 8, 32)):
    REQUESTS[f"lut {_width}"] = {**BASE, "width": _width, "tokens": _tokens, "group_size": _segment, "launch": 0}


@functools.cache
def compile_ptx(capability):
    """PTX of all requests."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS.parent), os.environ.get("PYTHONPATH", "")))}
    command = [sys.executable, str(TESTS / "compile_cuda.py"), *map(str, capability), json.dumps([*REQUESTS.values()])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(REQUESTS, json.loads(done.stdout), strict=True))


def assemble(ptx, capability, folder):
    """(registers, bytes of stack and spills, bytes of shared memory) as ptxas tells; skips without it."""
    if shutil.which("ptxas") is None:
        pytest.skip("needs ptxas to count registers")
    (folder / "kernel.ptx").write_text(ptx)
    command = ["ptxas", "-v", f"-arch=sm_{capability[0]}{capability[1]}", "kernel.ptx", "-o", "kernel.cubin"]
    told = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr[-2000:]
    memory = sum(int(size) for size in re.findall(r"(\d+) bytes (?:stack|spill)", told.stderr))
    shared = re.search(r"(\d+) bytes smem", told.stderr)
    return int(re.search(r"Used (\d+) reg", told.stderr)[1]), memory, int(shared[1]) if shared else 0


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ("lut 2", "lut 4", "lut 6", "lut 8"))
def test_look_up_kernel_keeps_its_sums_in_registers(capability, name, tmp_path):
    from kernels_numba.gpu import lut

    ptx, tokens, width = compile_ptx(capability)[name], REQUESTS[name]["tokens"], REQUESTS[name]["width"]
    assert re.search(rf"^\.target sm_{capability[0]}{capability[1]}$", ptx, re.MULTILINE)
    once, kept = (ptx.count(f"ld.global.nc.{cached}L2::256B.v4.u32") for cached in ("L1::no_allocate.", ""))
    assert (once, kept) == ((2, 2) if tokens == 1 else (0, 4))  # lines of a plane; numbers of columns
    assert not re.search(r"\.local|\bcall\b|\batom\.|\bred\.", ptx)
    assert ptx.count("ld.shared.f32 ") >= 16 * {8: 1, 6: 2, 4: 2, 2: 4}[width]
    registers, memory, shared = assemble(ptx, capability, tmp_path)
    assert memory == 0 and registers <= 128 and shared == lut.shared_bytes(width, tokens)


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
