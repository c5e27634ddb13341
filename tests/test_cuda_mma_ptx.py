"""Tensor-core and dequantizing kernels compiled without a device: what their PTX holds, and their code on five chips.

The order of SASS and its instructions need nvdisasm.
"""

import re
import shutil
import subprocess

import pytest
from cuda_ptx import (  # noqa: F401 - compiler is a fixture
    CAPABILITIES,
    MMA,
    NEW,
    SAME,
    assemble,
    compile_ptx,
    compiler,
)

PRODUCTS = [name for name, asked in MMA.items() if asked["name"] == "mma" and "launch" not in asked]
NARROW = ("unfused, 8 tokens, group 32",)  # four sets of scales a unit; half as many warps run together
# Most instructions of a warp for a unit with its scales, 512·bits + 128 bytes. 4.3 TB/s are 18.6 bytes a clock of each
# of 132 processors at 1.755 GHz (CUDA.md 3.1): so many take 90, 72 and 50 % of the slots of four schedulers.
ONE_UNIT = {2: 224, 3: 256, 4: 234}


def code(name, capability):
    """(registers, bytes of stack and spills, cubin)."""
    ptx = compile_ptx((8, 0) if capability < (10, 0) else (12, 0))[name]
    ptx = ptx.replace(".target sm_80", f".target sm_{capability[0]}{capability[1]}")
    registers, memory, _, cubin = assemble(ptx, capability)
    return registers, memory, cubin


@pytest.mark.parametrize("capability", CAPABILITIES[1:4])
def test_code_before_ptxas_is_the_same(capability):
    ptx = compile_ptx(capability)[SAME]
    assert re.search(rf"^\.target sm_{capability[0]}{capability[1]}$", ptx, re.MULTILINE)
    assert _body(ptx) == _body(compile_ptx()[SAME])


def _body(ptx):
    """PTX after its header, without comments and names, which count what was compiled before."""
    text = re.sub(r"//.*", "", ptx[ptx.index(".address_size"):])
    return re.sub(r"_Z\w+|_cudapy_smem_\d+|(\$L__BB)\d+_", r"\1", text)


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_on_tensor_cores_from_copies_of_16_bytes(name):
    ptx, asked = compile_ptx()[name], MMA[name]
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


@pytest.mark.parametrize("name,capability", [(name, capability) for capability in CAPABILITIES
                                             for name in (MMA if capability < (10, 0) else NEW)])
def test_registers_suffice_on_five_chips(name, capability):
    registers, memory, _ = code(name, capability)
    few = max(MMA[name]["levels"]) <= 4 and MMA[name].get("tokens", 1) <= 8 and name not in NARROW
    assert memory == 0 and registers <= (128 if few else 255)
    if name == "fused, 1 token" and capability == (9, 0):
        assert registers <= 85  # 24 warps of a processor


@pytest.mark.parametrize("bits", ONE_UNIT)
def test_instructions_of_a_unit(bits, tmp_path):
    tool = shutil.which("nvdisasm")
    if tool is None:
        pytest.skip("needs nvdisasm to read instructions")
    (tmp_path / "kernel.cubin").write_bytes(code(f"{bits} bits", (9, 0))[2])
    loop = _loop(subprocess.run([tool, tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True).stdout)
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
