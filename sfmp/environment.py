"""Facts about where a result was made: package versions, hardware, git state, and fingerprints of files."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

from sfmp.code_hash import ROOT, notebook_hash

PACKAGES = (
    "accelerate",
    "datasets",
    "lm_eval",
    "matplotlib",
    "numba",
    "numpy",
    "pandas",
    "papermill",
    "safetensors",
    "scipy",
    "seaborn",
    "snakemake",
    "tokenizers",
    "torch",
    "transformers",
)


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> dict:
    """Return sha256 and size of a file, or of a folder through the names and hashes of its files."""
    path = Path(path)
    if not path.is_dir():
        return {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    files = sorted(p for p in path.rglob("*") if p.is_file())
    lines = [f"{p.relative_to(path).as_posix()}\0{sha256_file(p)}\n" for p in files]
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    return {"sha256": digest, "bytes": sum(p.stat().st_size for p in files)}


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a number; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def hardware() -> dict:
    """Return CPU, cores available, memory and GPU; the GPU only where torch is already imported."""
    import psutil

    gpu = None
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
    return {
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def available_cores() -> int:
    """Return the cores this process may use: its affinity mask, cut by a container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        allowed, period = quota.read_text().split()[:2]
        if allowed != "max":
            cores = min(cores, max(1, int(allowed) // int(period)))
    return cores


def available_memory_mb() -> int:
    """Return the memory jobs may use together: four fifths of the machine's, or of a container's limit."""
    import psutil

    total = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        total = min(total, int(text))
    return total * 4 // 5 // 2**20


def peak_gpu_memory() -> int | None:
    """Return the peak GPU memory torch allocated, in bytes; None without torch or a GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda.max_memory_allocated() if torch is not None and torch.cuda.is_available() else None


def code_state(notebook: Path) -> dict:
    """Return the hash of the modules a notebook reaches, the sha256 of the notebook, and the git commit."""
    known = notebook.is_file()
    return {
        "modules": notebook_hash(notebook) if known else None,
        "notebook_sha256": sha256_file(notebook) if known else None,
        **git_state(),
    }


def git_state() -> dict:
    """Return commit and whether tracked files differ from it; both None outside a git checkout."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(ROOT), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    status = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if status is None else bool(status)}
