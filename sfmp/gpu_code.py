"""What compilers make of the GPU kernels: facts that need no GPU. Registers, spills, 128-bit loads, tensor-core steps.

A process for each capability (``python -m sfmp.gpu_code REQUEST``), because Numba keeps what it compiled of device
functions for the first capability it compiled for.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys

import pandas as pd

from sfmp.checks import SfmpError

CAPABILITIES = ((8, 0), (9, 0), (12, 0))  # A100, H100 and H200, RTX 50
SHAPE, WBITS = (512, 1024), 3.0  # of a matrix with blocks of 2, 3 and 4 bits; code depends on its widths only
KERNELS = (("lut", 1), ("mma", 1))  # kernel, tokens
COLUMNS = ["kernel", "tokens", "capability", "registers", "stack_bytes", "loads_128", "tensor_steps"]
LONGEST = 300  # seconds for one capability
_LINES = re.compile(r"\bld\.global\S*\.v4\.u32\b|\bcp\.async\.c[ag]\S*global[^;]*, 16;")
_MMA = re.compile(r"\bmma\.sync\.")
_REGISTERS, _FRAME = 0x2F, 0x11  # attributes of .nv.info: registers and bytes of stack of a function


def facts(capabilities=CAPABILITIES, kernels=KERNELS) -> pd.DataFrame:
    """Compile the kernels of one product and read what they take.

    Parameters
    ----------
    capabilities : sequence of (major, minor)
    kernels : sequence of (kernel, tokens)

    Returns
    -------
    pandas.DataFrame
        `kernel, tokens, capability, registers` of a lane, `stack_bytes` (local arrays and spilled registers),
        `loads_128` and `tensor_steps`: 128-bit loads from memory, into registers or into shared memory, and m16n8k16
        products in the PTX. Where kernels cannot be compiled: no rows, and ``attrs["skipped"]`` says why.

    Raises
    ------
    SfmpError
        The libraries are there and a kernel does not compile.
    """
    why, rows = skipped(), []
    for capability in capabilities if why is None else ():
        command = [sys.executable, "-m", "sfmp.gpu_code", json.dumps([capability, kernels])]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)
        except subprocess.TimeoutExpired as error:
            raise SfmpError(f"kernels for {capability}: expected code within {LONGEST} s, found none; try on a quieter "
                            "machine") from error
        if done.returncode:
            raise SfmpError(f"kernels for {capability}: expected code, found {done.stderr[-600:]!r}; report it with "
                            "the versions of numba and numba-cuda")
        rows += json.loads(done.stdout.splitlines()[-1])
    frame = pd.DataFrame(rows, columns=COLUMNS)
    frame.attrs["skipped"] = why
    return frame


def skipped() -> str | None:
    """Why kernels cannot be compiled here, or None."""
    from kernels_numba.gpu import compile as compiler

    why = compiler.missing_library()
    return why or (None if compiler.nvjitlink() is not None else "nvJitLink: not found; install nvidia-nvjitlink")


def _compiled(capability, kernels):
    """Rows of one capability."""
    from kernels_numba.gpu import compile as compiler
    from kernels_numba.gpu import lut_layout, lut_run, mma_layout, mma_run
    from sfmp.bench.random_model import random_packed

    packed = random_packed(*SHAPE, WBITS + 0.25, block_rows=64)
    found = []
    for kernel, tokens in kernels:
        layouts, runs = {"lut": (lut_layout, lut_run), "mma": (mma_layout, mma_run)}[kernel]
        plan = runs.plan(layouts.make_layout(packed), tokens, "float16")
        launch = max(plan.launches, key=lambda one: one.make.__name__ in ("make_kernel", "make_fused"))
        ptx = compiler.make_ptx(launch, capability)
        cubin = compiler.assemble(ptx, capability, compiler.name_of(launch))
        found.append([kernel, tokens, ".".join(map(str, capability)), *resources(cubin), len(_LINES.findall(ptx)),
                      len(_MMA.findall(ptx))])
    return found


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of the one kernel in a cubin, an ELF file.

    Raises
    ------
    SfmpError
        It is no cubin, or says nothing of registers.
    """
    if cubin[:4] != b"\x7fELF":
        raise SfmpError(f"cubin: expected an ELF file, found {cubin[:4]!r}; compile with nvJitLink")
    offset, = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, offset + size * index) for index in range(count)]
    strings = sections[names][4]
    registers, stack = None, 0
    for name, _, _, _, start, length in sections:
        text = cubin[strings + name : cubin.index(b"\0", strings + name)].decode()
        if text == ".nv.info":
            for attribute, value in _attributes(cubin[start : start + length]):
                registers = value if attribute == _REGISTERS else registers
                stack = max(stack, value) if attribute == _FRAME else stack
    if registers is None:
        raise SfmpError("cubin: expected the number of registers in .nv.info, found none; is it of a newer toolkit?")
    return registers, stack


def _attributes(data):
    """(attribute, value) of the entries that hold a function and a number."""
    at = 0
    while at + 4 <= len(data):
        form, attribute, size = struct.unpack_from("<BBH", data, at)
        at += 4
        if form == 4:  # followed by `size` bytes
            if size == 8:
                yield attribute, struct.unpack_from("<II", data, at)[1]
            at += size


if __name__ == "__main__":
    asked, chosen = json.loads(sys.argv[1])
    print(json.dumps(_compiled(tuple(asked), chosen)))
