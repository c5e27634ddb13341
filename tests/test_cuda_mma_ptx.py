"""Tensor-core and dequantizing kernels compiled without a device: what their PTX holds, and their code on five chips.

Their PTX for 8.0 is that for 9.0 but for the target, which a test shows; for 12.0 libnvvm makes another. It is made for
these two, and ptxas makes code of it for each chip. The order of SASS and its instructions need nvdisasm.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from test_cuda_ptx import CAPABILITIES, TESTS, assemble, compiler  # noqa: F401 - compiler is a fixture

MIXED = {"name": "mma", "kind": "float16", "levels": [2, 3, 4], "group_size": 128, "warps": 8}
REQUESTS = {
    "fused, 1 token": {**MIXED, "gather": "fused"},
    "fused, 1 token, bfloat16, 16 warps": {**MIXED, "gather": "fused", "kind": "bfloat16", "warps": 16},
    "fused, 8 tokens": {**MIXED, "gather": "fused", "tokens": 8, "stages": 3},
    "unfused, 8 tokens": {**MIXED, "gather": "unfused", "tokens": 8},
    "unfused, 8 tokens, group 32": {**MIXED, "gather": "unfused", "tokens": 8, "kind": "bfloat16", "group_size": 32,
                                    "stages": 4},
    "unfused, 16 tokens": {**MIXED, "gather": "unfused", "tokens": 16, "kind": "bfloat16", "stages": 4},
    "unfused, 32 tokens": {**MIXED, "gather": "unfused", "tokens": 32, "stages": 4},
    "many bits": {**MIXED, "gather": "unfused", "tokens": 8, "kind": "bfloat16", "group_size": 32,
                  "levels": [1, 6, 7, 8]},
    "arrange": {**MIXED, "gather": "unfused", "kind": "bfloat16", "launch": 0},
    "dequantize": {"name": "dequantize", "kind": "float16", "levels": [2, 3, 4], "group_size": 128},
    "dequantize many bits": {"name": "dequantize", "kind": "bfloat16", "levels": [1, 5, 7, 8], "group_size": 32},
} | {f"{bits} bits": {**MIXED, "gather": "fused", "levels": [bits]} for bits in (2, 3, 4)}
PRODUCTS = [name for name, asked in REQUESTS.items() if asked["name"] == "mma" and "launch" not in asked]
NARROW = ("unfused, 8 tokens, group 32",)  # four sets of scales a unit; half as many warps run together
# Most instructions of a warp for a unit with its scales, 512·bits + 128 bytes. 4.3 TB/s are 18.6 bytes a clock of each
# of 132 processors at 1.755 GHz (CUDA.md 3.1): so many take 90, 72 and 50 % of the slots of four schedulers.
ONE_UNIT = {2: 224, 3: 256, 4: 234}


@functools.cache
def compile_ptx(capability=(8, 0), names=tuple(REQUESTS)):
    """PTX of requests."""
    folders = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, str(TESTS / "compile_cuda.py"), *map(str, capability),
               json.dumps([REQUESTS[name] for name in names])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(names, json.loads(done.stdout), strict=True))


def code(name, capability, folder):
    """(registers, bytes of stack and spills, SASS); no SASS where nvdisasm is missing."""
    ptx = compile_ptx((8, 0) if capability < (10, 0) else (12, 0))[name]
    ptx = ptx.replace(".target sm_80", f".target sm_{capability[0]}{capability[1]}")
    registers, memory, _ = assemble(ptx, capability, folder)
    tool = shutil.which("nvdisasm")
    sass = tool and subprocess.run([tool, "kernel.cubin"], cwd=folder, capture_output=True, text=True).stdout
    return registers, memory, sass


@pytest.mark.parametrize("capability", [(8, 9), (9, 0)])
def test_code_before_ptxas_is_the_same(capability):
    name = "fused, 1 token"
    ptx = compile_ptx(capability, (name,))[name]
    assert re.search(rf"^\.target sm_{capability[0]}{capability[1]}$", ptx, re.MULTILINE)
    assert _body(ptx) == _body(compile_ptx()[name])


def _body(ptx):
    """PTX after its header, without comments and names, which count what was compiled before."""
    text = re.sub(r"//.*", "", ptx[ptx.index(".address_size"):])
    return re.sub(r"_Z\w+|(\$L__BB)\d+_", r"\1", text)


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_on_tensor_cores_from_copies_of_16_bytes(name):
    ptx, asked = compile_ptx()[name], REQUESTS[name]
    parts = sum(1 if bits <= 4 else 2 for bits in asked["levels"])
    tiles = max(1, asked.get("tokens", 1) // 8)
    assert ptx.count("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32") == 16 * tiles * parts
    stages, sets = asked.get("stages", 2), 1 if max(asked["levels"]) <= 4 else 2
    copies = len(re.findall(r"cp\.async\.cg\.shared\.global\.L2::256B \[\S+\], \[\S+\], 16;", ptx))
    assert copies == 4 * sets * (stages + 1)  # of the first units, and in the loop
    assert ptx.count(f"cp.async.wait_group {stages - 1};") == 1
    assert not re.search(r"\.local|\bcall\b|\batom\.|\bred\.", ptx)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_unit_is_asked_for_before_another_is_multiplied(name):
    loop = compile_ptx()[name].partition("cp.async.wait_group")[2]
    places = [loop.index(text) for text in ("ld.shared.v4", "cp.async.cg", "cp.async.commit_group", "mma.sync")]
    assert places == sorted(places)
    assert "cp.async" not in loop[places[-1]:]  # nothing waits after the products began


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", REQUESTS)
def test_registers_suffice_on_five_chips(name, capability, tmp_path):
    registers, memory, _ = code(name, capability, tmp_path)
    few = max(REQUESTS[name]["levels"]) <= 4 and REQUESTS[name].get("tokens", 1) <= 8 and name not in NARROW
    assert memory == 0 and registers <= (128 if few else 255)
    if name == "fused, 1 token" and capability < (10, 0):
        assert registers <= 85  # 24 warps of a processor


@pytest.mark.parametrize("bits", ONE_UNIT)
def test_instructions_of_a_unit(bits, tmp_path):
    _, _, sass = code(f"{bits} bits", (9, 0), tmp_path)
    if not sass:
        pytest.skip("needs nvdisasm to read instructions")
    loop = _loop(sass)
    names = [name.partition(".")[0] for name in loop]
    assert names.count("HMMA") == 16 and len(loop) <= ONE_UNIT[bits]
    assert sum(name.startswith("LDGSTS.E.BYPASS") and ".128" in name for name in loop) == 4
    copies = [i for i, name in enumerate(names) if name == "LDGSTS"]
    assert names.index("DEPBAR") < min(copies) and max(copies) < names.index("HMMA")
    assert not {"LDL", "STL", "ATOM", "ATOMG", "RED", "REDG", "CALL"} & set(names)


def _loop(sass):
    """Names of the instructions from the label before the wait to the jump back to it."""
    lines = sass.splitlines()
    wait = next(i for i, line in enumerate(lines) if "DEPBAR.LE SB0, 0x1" in line)
    first = max(i for i in range(wait) if lines[i].startswith(".L_x"))
    last = max(i for i, line in enumerate(lines) if f"`({lines[first].rstrip(':')})" in line)
    found = (re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line) for line in lines[first : last + 1])
    return [match[1] for match in found if match]
