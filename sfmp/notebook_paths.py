"""Where a notebook reads and writes: names to paths, the same under Snakemake and when opened in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sfmp.checks import SfmpError

GPU_FOLDER = "results/reference/gpu"  # of committed measurements, if there are any


def base_directory() -> Path:
    """Directory of relative paths: the working directory, or the checkout of a notebook opened in place."""
    here = Path.cwd()
    return here.parent if here.name == "notebooks" and (here.parent / "Snakefile").is_file() else here


def relative(path: Path) -> str:
    """`path` relative to the base directory where it lies inside, so that manifests name no one's home."""
    path, base = Path(path), base_directory()
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)


class Outputs(Mapping):
    """name → path of a result; names the notebook was not given go to ``results/scratch/<notebook>/``."""

    def __init__(self, notebook: str, declared: Mapping):
        self._base, self._declared = base_directory(), dict(declared)
        self._scratch = self._base / "results" / "scratch" / notebook

    def __getitem__(self, name: str) -> Path:
        declared = name in self._declared
        path = self._base / self._declared[name] if declared else self._scratch / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def __iter__(self):
        return iter(self._declared)

    def __len__(self):
        return len(self._declared)

    def with_suffix(self, name: str, suffix: str) -> Path:
        """Path of `name`; a scratch path gets `suffix`."""
        return self[name] if name in self._declared else Path(f"{self[name]}{suffix}")


class Inputs(Mapping):
    """name → path, or list of paths, of what the notebook reads."""

    def __init__(self, notebook: str, declared: Mapping):
        self._notebook, self._base, self._declared = notebook, base_directory(), dict(declared)

    def __getitem__(self, name: str) -> Path | list[Path]:
        if name not in self._declared:
            raise SfmpError(
                f"{self._notebook}: input {name!r} is not among {sorted(self._declared)}; "
                "add it to `inputs` in the parameters cell"
            )
        value = self._declared[name]
        if isinstance(value, str | Path):
            return self._base / value
        return [self._base / item for item in value]

    def __contains__(self, name):
        return name in self._declared

    def __iter__(self):
        return iter(self._declared)

    def __len__(self):
        return len(self._declared)

    def files(self) -> list[Path]:
        """Every input path, flat."""
        paths = [self[name] for name in self]
        return [path for item in paths for path in ([item] if isinstance(item, Path) else item)]
