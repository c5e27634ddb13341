"""NEON kernels run by an emulator, if there is one: ``apt install qemu-user-static binutils-aarch64-linux-gnu``."""

import shutil
import subprocess

import numpy as np
import pytest
from kernel_code import Code, random_case
from llvmlite import binding

from kernels_numba.cpu import neon, targets
from kernels_numba.cpu.records import table_bytes

EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
TOOLS = ("aarch64-linux-gnu-as", "aarch64-linux-gnu-ld")
pytestmark = pytest.mark.skipif(not (EMULATOR and all(map(shutil.which, TOOLS))), reason="no emulator of aarch64")
BEST = next(name for name, needs in targets.NEEDS.items() if targets.features().issuperset(needs))
TILES = 3
PROGRAM = """
.text
.global _start
_start:
    {builds}
    ldr x0, =tiles; mov x1, #{count}; ldr x2, =records; ldr x3, ={record}; ldr x4, =sums; ldr x5, ={step}
    bl multiply{bits}
    mov x0, #1; ldr x1, =sums; ldr x2, ={size}; mov x8, #64; svc 0
    mov x0, #0; mov x8, #93; svc 0
.data
.p2align 6
x: .incbin "x"
.p2align 6
indices: .incbin "indices"
.p2align 6
tiles: .incbin "tiles"
.skip 16384
.bss
.p2align 6
records: .skip {records}
sums: .skip {size}
"""
BUILD = "ldr x0, =x + {x}; ldr x1, =indices; ldr x2, =records + {record}; bl build"


@pytest.mark.parametrize(("mode", "columns", "tokens"), [("lut16", 128, 1), ("lut8", 64, 2), ("exact", 32, 2)])
@pytest.mark.parametrize("bits", [3, 8])
def test_neon_gives_the_bits_of_the_best_target(mode, columns, tokens, bits, tmp_path):
    if BEST == "generic":
        pytest.skip("this processor has nothing to compare with")
    x, indices, tiles = case = random_case(bits, columns, tokens, (bits,), TILES)
    code = Code(neon.Neon, mode, columns, tokens, (bits,), "generic", "+neon", "aarch64-unknown-linux-gnu")
    record, step = table_bytes(columns, mode), TILES * 64
    (tmp_path / "x").write_bytes(x.tobytes())
    (tmp_path / "indices").write_bytes(indices.astype(np.int32).tobytes())
    (tmp_path / "tiles").write_bytes(tiles[bits].tobytes())
    (tmp_path / "kernels.o").write_bytes(code.machine.emit_object(code._parsed))
    builds = "\n    ".join(BUILD.format(x=token * x[0].nbytes, record=token * record) for token in range(tokens))
    (tmp_path / "main.s").write_text(PROGRAM.format(builds=builds, count=TILES, record=record, step=step, bits=bits,
                                                    size=tokens * step, records=tokens * record))
    for command in ((TOOLS[0], "main.s", "-o", "main.o"), (TOOLS[1], "main.o", "kernels.o", "-o", "main")):
        subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run([EMULATOR, "-cpu", "max", "./main"], cwd=tmp_path, check=True, capture_output=True)
    found = np.frombuffer(done.stdout, np.int32).reshape(tokens, -1)
    best = Code(targets.vectors(BEST), mode, columns, tokens, (bits,), binding.get_host_cpu_name(),
                binding.get_host_cpu_features().flatten()).run(*case)
    np.testing.assert_array_equal(found, best[bits].view(np.int32))
