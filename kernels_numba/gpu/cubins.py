"""Compiled kernels, kept in memory and on disk: compiling one takes seconds, reading it less than a millisecond.

The folder is ``$SFMP_CUDA_CACHE``, or ``sfmp/cubins`` in the user's folder for caches; an empty variable keeps nothing
on disk. A file is the SHA-256 of the code and then the code; its name is a hash of everything the code depends on, so
files are never out of date and may be deleted at any time.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import sys
import threading
from pathlib import Path

from kernels_numba.gpu import compile as compiler
from kernels_numba.gpu.launches import Launch
from sfmp.checks import write_atomically

VARIABLE = "SFMP_CUDA_CACHE"
PACKAGES = ("numba", "numba-cuda", "llvmlite", "numpy", "cuda-bindings")
_DIGEST = hashlib.sha256().digest_size
_memory: dict[str, bytes] = {}
_lock = threading.RLock()


def folder() -> Path | None:
    """Where compiled kernels are kept, or None."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    caches = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(caches) if caches else Path.home() / ".cache") / "sfmp" / "cubins"
    except RuntimeError:  # a user without a home
        return None


def get(launch: Launch, capability: tuple[int, int]) -> bytes:
    """Return the machine code of a kernel for an architecture, compiled if it is not kept.

    Raises
    ------
    SfmpError
        It has to be compiled and cannot be.
    """
    found = key(launch, capability)
    with _lock:
        if found not in _memory:
            where = folder()
            path = where and where / f"{found}.bin"
            code = path and _read(path)
            if code is None:
                ptx = compiler.make_ptx(launch, capability)
                code = compiler.assemble(ptx, capability, compiler.name_of(launch))
                if path:
                    _write(path, code)
            _memory[found] = code
        return _memory[found]


def key(launch: Launch, capability: tuple[int, int]) -> str:
    """Hash of what the code of a kernel depends on: sources, options, architecture and versions."""
    what = (launch.make.__module__, launch.make.__qualname__, launch.options, launch.types, capability, sources(),
            versions())
    return hashlib.sha256(repr(what).encode()).hexdigest()


@functools.cache
def sources() -> str:
    """Hash of all Python files beside this one."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def versions() -> tuple:
    """Versions of the packages and of the toolkit's libraries that make code."""
    found = [sys.version_info[:2]]
    for package in PACKAGES:
        try:
            found.append(importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            found.append(None)
    linker = compiler.nvjitlink()
    found.append(linker and linker.version())
    if compiler.missing_library() is None:
        from cuda import pathfinder

        for library in compiler.LIBRARIES:
            path = pathfinder.load_nvidia_dynamic_lib(library).abs_path
            stat = path and os.stat(path)
            found.append((path and Path(path).name, stat and stat.st_size, stat and stat.st_mtime_ns))
    return tuple(found)


def _read(path: Path) -> bytes | None:
    """The code in a file; None if there is no such file, it cannot be read, or it is not what was written."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    code = data[_DIGEST:]
    return code if code and data[:_DIGEST] == hashlib.sha256(code).digest() else None


def _write(path: Path, code: bytes) -> None:
    """Keep the code; a folder that is read-only or full costs the time to compile again, no more."""
    try:
        write_atomically(path, lambda part: part.write_bytes(hashlib.sha256(code).digest() + code))
    except OSError:
        return
