"""Compiled kernels: code for an architecture without a device, and what is kept of it."""

import os
import re
import subprocess
import sys

import pytest

from kernels_numba.gpu import compile as compiler
from kernels_numba.gpu import cubins
from kernels_numba.gpu.launches import Launch
from sfmp.checks import SfmpError

LAUNCH = Launch(print, ("float16",), "fif", (), (1, 1), 32)
CAPABILITY = (9, 0)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """List of what was compiled; kept in `tmp_path`, and nothing in memory."""
    made = []
    monkeypatch.setenv(cubins.VARIABLE, str(tmp_path))
    monkeypatch.setattr(cubins, "_memory", {})
    monkeypatch.setattr(compiler, "make_ptx", lambda launch, capability: f"{launch.options} {capability}")
    monkeypatch.setattr(compiler, "assemble", lambda ptx, capability, name: made.append(ptx) or ptx.encode())
    return made


def forget(monkeypatch):
    monkeypatch.setattr(cubins, "_memory", {})


def test_code_is_compiled_once_and_read_by_the_next_process(compiled, monkeypatch, tmp_path):
    code = cubins.get(LAUNCH, CAPABILITY)
    assert cubins.get(LAUNCH, CAPABILITY) is code and len(compiled) == 1
    forget(monkeypatch)
    assert cubins.get(LAUNCH, CAPABILITY) == code and len(compiled) == 1
    assert [path.suffix for path in tmp_path.iterdir()] == [".bin"], "no temporary files are left"


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:40] + b"x" + data[41:], lambda data: b"",
                                    lambda data: data[:32]], ids=["short", "changed", "empty", "no code"])
def test_a_damaged_file_is_compiled_again_and_mended(compiled, monkeypatch, tmp_path, damage):
    code = cubins.get(LAUNCH, CAPABILITY)
    path, = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    forget(monkeypatch)
    assert cubins.get(LAUNCH, CAPABILITY) == code and len(compiled) == 2
    assert path.read_bytes() == whole


@pytest.mark.parametrize("error", [PermissionError(13, "read-only"), OSError(28, "no space left on device")])
def test_a_folder_that_takes_nothing_costs_no_more_than_time(compiled, monkeypatch, tmp_path, error):
    def refuse(path, write):
        raise error

    monkeypatch.setattr(cubins, "write_atomically", refuse)
    code = cubins.get(LAUNCH, CAPABILITY)
    assert cubins.get(LAUNCH, CAPABILITY) is code and len(compiled) == 1 and not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_no_error(compiled, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cubins.VARIABLE, str(tmp_path / "file" / "folder"))
    assert cubins.get(LAUNCH, CAPABILITY) and len(compiled) == 1


def test_nothing_is_kept_on_disk_if_that_is_asked_for(compiled, monkeypatch):
    monkeypatch.setenv(cubins.VARIABLE, "")
    assert cubins.folder() is None and cubins.get(LAUNCH, CAPABILITY)
    monkeypatch.delenv(cubins.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert str(cubins.folder()) == "/caches/sfmp/cubins"


def test_everything_the_code_depends_on_is_in_the_key(monkeypatch):
    keys = {cubins.key(LAUNCH, CAPABILITY), cubins.key(LAUNCH, (8, 0)),
            cubins.key(Launch(print, ("bfloat16",), "fif", (), (1, 1), 32), CAPABILITY),
            cubins.key(Launch(print, ("float16",), "fih", (), (1, 1), 32), CAPABILITY),
            cubins.key(Launch(sum, ("float16",), "fif", (), (1, 1), 32), CAPABILITY)}
    assert len(keys) == 5
    assert cubins.key(Launch(print, ("float16",), "fif", ("a",), (9, 9), 64), CAPABILITY) in keys, "not of the grid"
    for name in ("sources", "versions"):
        monkeypatch.setattr(cubins, name, lambda: "other")
        keys.add(cubins.key(LAUNCH, CAPABILITY))
        monkeypatch.undo()
    assert len(keys) == 7 and len(cubins.sources()) == 64


KERNEL = """
from kernels_numba.gpu import compile as compiler, lut
from kernels_numba.gpu.launches import Launch
import re, sys
sums = Launch(lut.make_sum, ("float16",), "fifhnnnn", (), (1, 1), 128)
look = Launch(lut.make_kernel, (4, 8, "float16", 64, 4), "uuiiiiiiihfnnn", (), (1, 1), 128)
first = [compiler.make_ptx(look, (8, 0)), compiler.make_ptx(sums, (8, 0))]
second = [compiler.make_ptx(look, (9, 0)), compiler.make_ptx(sums, (9, 0))]
for ptx, cc in ((first, "80"), (second, "90")):
    assert f".target sm_{cc}" in ptx[0] and ".maxntid 128" in ptx[0]
    assert ".entry sfmp_lut_kernel(" in ptx[0] and ".entry sfmp_lut_sum(" in ptx[1], ptx[1][:2000]
cubin = compiler.assemble(second[1], (9, 0), "sums")
print(cubin[:4] == b"\\x7fELF" and b"sfmp_lut_sum" in cubin or cubin.startswith(b"//"))
from numba import cuda
import torch
assert "numba.cuda.dispatcher" in sys.modules and cuda.dispatcher.get_current_device.__module__ == "numba.cuda.api"
try:
    compiler.assemble(second[1].replace("ld.global", "ld.nowhere"), (9, 0), "wrong")
except ValueError as error:
    print("nvJitLink" in str(error) and "nowhere" in str(error))
else:
    print(compiler.nvjitlink() is None)
"""


def test_kernels_of_two_architectures_compile_in_one_process():
    if compiler.missing_library():
        pytest.skip(f"needs to compile for CUDA: {compiler.missing_library()}")
    done = subprocess.run([sys.executable, "-c", KERNEL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["True", "True"]


def test_a_toolkit_that_no_variable_names_is_found(monkeypatch, tmp_path):
    pathfinder = pytest.importorskip("cuda.pathfinder")

    def load(library):
        if library == "nvvm" and "CUDA_HOME" not in os.environ:
            raise RuntimeError("no libnvvm\nanywhere")

    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", load)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("CUDA_PATH", "elsewhere")
    monkeypatch.setenv("CUDA_HOME", "")  # so that what is set below is undone
    monkeypatch.delenv("CUDA_HOME")
    assert compiler.missing_library() == "libnvvm: no libnvvm; install nvidia-nvvm or the CUDA toolkit"
    monkeypatch.delenv("CUDA_PATH")
    (tmp_path / "nvvm").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text("")
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    assert compiler.missing_library() is None and os.environ["CUDA_HOME"] == str(tmp_path)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(compiler, "missing_library", lambda: "libnvvm: not found; install nvidia-nvvm")
    with pytest.raises(SfmpError, match="expected the libraries that compile them, but libnvvm: not found; install"):
        compiler.make_ptx(LAUNCH, CAPABILITY)
    assert re.fullmatch("sfmp_[a-z]+_print", compiler.name_of(LAUNCH))
