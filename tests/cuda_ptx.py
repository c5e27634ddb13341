"""PTX and code of CUDA kernels for tests, without a device: one process per compute capability, two at a time.

PTX of the tensor-core kernels for 8.0 is that for 8.6, 8.9 and 9.0 but for the target, which a test shows with one
kernel; for 12.0 libnvvm makes another. So most are compiled for 8.0, those that differ most for 12.0 too.
"""

import functools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0))

_LUT = {"name": "lut", "kind": "float16", "levels": [2, 3, 4]}
SUMS = {f"sum {kind}": {**_LUT, "kind": kind, "group_size": 128, "launch": 1} for kind in ("float16", "bfloat16")}
LUT = {f"lut {width}": {**_LUT, "width": width, "tokens": tokens, "group_size": segment, "launch": 0}
       for width, tokens, segment in ((8, 1, 128), (4, 8, 128), (6, 4, 64), (2, 8, 32))}

_MIXED = {"name": "mma", "kind": "float16", "levels": [2, 3, 4], "group_size": 128, "warps": 8}
MMA = {
    "fused, 1 token": {**_MIXED, "gather": "fused"},
    "fused, 1 token, bfloat16, 16 warps": {**_MIXED, "gather": "fused", "kind": "bfloat16", "warps": 16},
    "fused, 8 tokens": {**_MIXED, "gather": "fused", "tokens": 8, "stages": 3},
    "unfused, 8 tokens": {**_MIXED, "gather": "unfused", "tokens": 8},
    "unfused, 8 tokens, group 32": {**_MIXED, "gather": "unfused", "tokens": 8, "kind": "bfloat16", "group_size": 32,
                                    "stages": 4},
    "unfused, 16 tokens": {**_MIXED, "gather": "unfused", "tokens": 16, "kind": "bfloat16", "stages": 4},
    "unfused, 32 tokens": {**_MIXED, "gather": "unfused", "tokens": 32, "stages": 4},
    "many bits": {**_MIXED, "gather": "unfused", "tokens": 8, "kind": "bfloat16", "group_size": 32,
                  "levels": [1, 6, 7, 8]},
    "arrange": {**_MIXED, "gather": "unfused", "kind": "bfloat16", "launch": 0},
    "dequantize": {"name": "dequantize", "kind": "float16", "levels": [2, 3, 4], "group_size": 128},
    "dequantize many bits": {"name": "dequantize", "kind": "bfloat16", "levels": [1, 5, 7, 8], "group_size": 32},
    **{f"{bits} bits": {**_MIXED, "gather": "fused", "levels": [bits]} for bits in (2, 3, 4)},
}
SAME = "3 bits"  # the kernel that shows that PTX is the same
NEW = ("fused, 1 token", "fused, 8 tokens", "unfused, 8 tokens, group 32", "unfused, 32 tokens", "many bits", "arrange",
       "dequantize many bits")  # those that are compiled for 12.0
_FOR_ALL = {**LUT, SAME: MMA[SAME]}
REQUESTS = {(12, 0): {**LUT, **{name: MMA[name] for name in NEW}}, (8, 0): {**SUMS, **LUT, **MMA},
            **dict.fromkeys(CAPABILITIES[1:4], _FOR_ALL)}  # what takes longest first


@pytest.fixture(scope="module", autouse=True)
def compiler():
    """Numba compiles with libnvvm and asks libnvrtc what it may compile for."""
    pathfinder = pytest.importorskip("cuda.pathfinder", reason="needs numba-cuda")
    for library in ("nvvm", "nvrtc"):
        try:
            pathfinder.load_nvidia_dynamic_lib(library)
        except Exception as error:
            pytest.skip(f"needs lib{library} to compile for CUDA: {str(error).splitlines()[0]}")


def compile_ptx(capability=(8, 0)):
    """PTX of all requests for a capability, by name."""
    return _jobs()[capability].result()


@functools.cache
def _jobs():
    pool = ThreadPoolExecutor(2)
    return {capability: pool.submit(_compile, capability) for capability in REQUESTS}


def _compile(capability):
    folders = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, str(TESTS / "compile_cuda.py"), *map(str, capability),
               json.dumps([*REQUESTS[capability].values()])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(REQUESTS[capability], json.loads(done.stdout), strict=True))


def assemble(ptx, capability):
    """(registers, bytes of stack and spills, bytes of shared memory, cubin) by nvJitLink; skips without it.

    This is the code that runs. ptxas of the same version makes another, with fewer registers or more.
    """
    from kernels_numba.gpu.compile import nvjitlink

    linker, source = nvjitlink(), ptx.encode()
    if linker is None:
        pytest.skip("needs nvJitLink to count registers")
    link = linker.create(2, [f"-arch=sm_{capability[0]}{capability[1]}", "-verbose"])
    try:
        linker.add_data(link, linker.InputType.PTX, source, len(source), "kernel")
        linker.complete(link)
        told = bytearray(linker.get_info_log_size(link))
        linker.get_info_log(link, told)
        cubin = bytearray(linker.get_linked_cubin_size(link))
        linker.get_linked_cubin(link, cubin)
    finally:
        linker.destroy(link)
    told = told.decode()
    memory = [int(size) for size in re.findall(r"(\d+) bytes (?:stack|spill)", told)]
    used = re.search(r"used (\d+) registers, .* (\d+) bytes smem", told)
    assert len(memory) == 3, told
    return int(used[1]), sum(memory), int(used[2]), bytes(cubin)
