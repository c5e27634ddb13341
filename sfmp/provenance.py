"""What every notebook opens and closes with: where results go, and a manifest beside each that says how it came about.

Results are written atomically (temporary file, then rename) and are a function of inputs, parameters, seed and code only.
Whatever is not reproducible to the byte - times, memory, host - goes into ``<output>.manifest.json``.
"""

from __future__ import annotations

import datetime
import json
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from sfmp import environment
from sfmp.checks import SfmpError, write_atomically

FIGURE_SUFFIXES = (".png", ".svg", ".csv")


def base_directory() -> Path:
    """Directory that relative paths mean: the working directory, or the checkout of a notebook opened in place."""
    here = Path.cwd()
    return here.parent if here.name == "notebooks" and (here.parent / "Snakefile").is_file() else here


def manifest_path(output: Path | str) -> Path:
    """Path of the manifest of a result file or folder."""
    return Path(f"{output}.manifest.json")


class _Outputs(Mapping):
    """name → path of a result; names the notebook was not given go to ``results/scratch/<notebook>/``."""

    def __init__(self, notebook: str, declared: Mapping):
        self._base, self._declared = base_directory(), dict(declared)
        self._scratch = self._base / "results" / "scratch" / notebook

    def __getitem__(self, name: str) -> Path:
        path = self._base / self._declared[name] if name in self._declared else self._scratch / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def __iter__(self):
        return iter(self._declared)

    def __len__(self):
        return len(self._declared)

    def with_suffix(self, name: str, suffix: str) -> Path:
        """Path of `name`; a scratch path gets `suffix`."""
        return self[name] if name in self._declared else Path(f"{self[name]}{suffix}")


class _Inputs(Mapping):
    """name → path, or list of paths, of what the notebook reads."""

    def __init__(self, notebook: str, declared: Mapping):
        self._notebook, self._base, self._declared = notebook, base_directory(), dict(declared)

    def __getitem__(self, name: str) -> Path | list[Path]:
        if name not in self._declared:
            raise SfmpError(f"{self._notebook}: input {name!r} is not among {sorted(self._declared)}; "
                            "add it to `inputs` in the parameters cell")
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
        return [path for name in self for path in ([self[name]] if isinstance(self[name], Path) else self[name])]


class Run:
    """One execution of a notebook; made by :func:`start`.

    Attributes
    ----------
    out : Mapping
        name → `Path` to write.
    inputs : Mapping
        name → `Path` or list of `Path`.
    seed : int
    """

    def __init__(self, notebook: str, parameters: Mapping, seed: int):
        self.notebook, self.parameters, self.seed = notebook, dict(parameters), seed
        self.out = _Outputs(notebook, self.parameters.get("out") or {})
        self.inputs = _Inputs(notebook, self.parameters.get("inputs") or {})
        missing = [str(path) for path in self.inputs.files() if not path.exists()]
        if missing:
            raise SfmpError(f"{notebook}: inputs {missing} do not exist; run their rules first (snakemake does), "
                            "or correct `inputs` in the parameters cell")
        for name in self.out:  # a manifest must never describe a file of an earlier run
            manifest_path(self.out[name]).unlink(missing_ok=True)
        self._written: dict[str, list[Path]] = {}
        self._notes: dict = {}
        self._started = datetime.datetime.now(datetime.UTC)
        self._clock = time.perf_counter()
        self._inputs_read = [{"path": _relative(path), **environment.fingerprint(path)} for path in self.inputs.files()]

    def write(self, name: str, writer: Callable[[Path], object]) -> Path:
        """Write result `name` through ``writer(temporary path)``, then rename; files and folders alike.

        Parameters
        ----------
        name : str
            Key of the notebook's `out` parameter.
        writer : callable
            Creates the file or folder it is given the path of.

        Returns
        -------
        Path
            Where the result is now.

        Raises
        ------
        SfmpError
            If `writer` creates nothing.
        """
        return self._write(name, self.out[name], writer)

    def _write(self, name: str, path: Path, writer: Callable[[Path], object]) -> Path:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            writer(temporary)
            if temporary.is_dir():
                if path.is_dir():
                    shutil.rmtree(path)
            elif not temporary.is_file():
                raise SfmpError(f"{self.notebook}: nothing was written for output {name!r}; the writer must create "
                                "the path it is given")
            os.replace(temporary, path)
        finally:
            if temporary.is_dir():
                shutil.rmtree(temporary)
            else:
                temporary.unlink(missing_ok=True)
        written = self._written.setdefault(name, [])
        if path not in written:
            written.append(path)
        return path

    def save_text(self, name: str, text: str, suffix: str = ".txt") -> Path:
        """Write a UTF-8 text."""
        return self._write(name, self.out.with_suffix(name, suffix),
                           lambda path: path.write_text(text, encoding="utf-8", newline="\n"))

    def save_csv(self, name: str, frame) -> Path:
        """Write a pandas frame without its index; floats in full precision."""
        return self.save_text(name, frame.to_csv(index=False, lineterminator="\n"), ".csv")

    def save_json(self, name: str, value) -> Path:
        """Write plain data, NumPy scalars and arrays allowed, as indented JSON; NaN and infinity become null."""
        return self.save_text(name, json.dumps(_plain(value), indent=2, allow_nan=False) + "\n", ".json")

    def save_figure(self, name: str, figure, data) -> Path:
        """Write a matplotlib figure as PNG and SVG (the same bytes every time) and its data, a frame, as CSV.

        Returns
        -------
        Path
            The PNG; the SVG and the CSV lie beside it.
        """
        import matplotlib

        png = self.out.with_suffix(name, ".png")
        if png.suffix != ".png":
            raise SfmpError(f"{self.notebook}: output {name!r} is a figure, expected a path ending in .png, found {png}")
        with matplotlib.rc_context({"svg.hashsalt": "sfmp", "svg.fonttype": "path"}):
            for suffix, metadata in ((".svg", {"Date": None, "Creator": None}), (".png", {"Software": None})):
                self._write(name, png.with_suffix(suffix), lambda path, suffix=suffix, metadata=metadata: figure.savefig(
                    path, format=suffix[1:], dpi=150, bbox_inches="tight", metadata=metadata))
        self._write(name, png.with_suffix(".csv"), lambda path: path.write_text(
            data.to_csv(index=False, lineterminator="\n"), encoding="utf-8", newline="\n"))
        return png

    def record(self, **notes) -> None:
        """Add facts to the manifest (e.g. the hash of the calibration tokens)."""
        self._notes.update(_plain(notes))

    def elapsed(self) -> float:
        """Seconds since :func:`start`."""
        return time.perf_counter() - self._clock

    def peak_memory(self) -> int:
        """Peak resident memory of this process so far, in bytes."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def finish(self) -> None:
        """Write one manifest beside each result and print where they are.

        Raises
        ------
        SfmpError
            If a result that was asked for has not been written.
        """
        missing = [name for name in self.out if name not in self._written]
        if missing:
            raise SfmpError(f"{self.notebook}: outputs {missing} were not written; save each of them before finish()")
        outputs = [{"name": name, "path": _relative(path), **environment.fingerprint(path)}
                   for name, paths in self._written.items() for path in paths]
        manifest = {
            "notebook": self.notebook,
            "parameters": _plain(self.parameters),
            "seed": self.seed,
            "inputs": self._inputs_read,
            "outputs": outputs,
            "code": environment.code_state(self.notebook),
            "versions": environment.versions(),
            "hardware": environment.hardware(),
            "started": self._started.isoformat(timespec="seconds"),
            "wall_seconds": round(self.elapsed(), 3),
            "peak_memory_bytes": self.peak_memory(),
            "peak_gpu_memory_bytes": environment.peak_gpu_memory(),
            "notes": self._notes,
        }
        text = json.dumps(manifest, indent=2) + "\n"
        for name in self._written:
            path = self._written[name][-1].with_suffix(".png") if len(self._written[name]) > 1 else self._written[name][0]
            write_atomically(manifest_path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))
            print(f"{_relative(path)}  (how: {manifest_path(path).name})")
        print(f"{self.notebook}: {self.elapsed():.1f} s, peak memory {self.peak_memory() / 2**20:.0f} MiB")


def start(notebook: str, parameters: Mapping, seed: int = 0) -> Run:
    """Begin a notebook: seed every generator, pin numerics, check the inputs, print what it runs on.

    Parameters
    ----------
    notebook : str
        Name of the notebook without its suffix, e.g. ``"02_salience"``.
    parameters : Mapping
        Its parameters, with `out` (name → path) and `inputs` (name → path or list of paths).
    seed : int
        Seeds Python, NumPy and, where the notebook has imported it, torch.

    Returns
    -------
    Run

    Raises
    ------
    SfmpError
        If an input does not exist.
    """
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.manual_seed(seed)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.use_deterministic_algorithms(True, warn_only=True)
    run = Run(notebook, parameters, seed)
    shown = {name: version for name, version in environment.versions().items() if name in ("python", "torch", "transformers")}
    print(f"{notebook}: seed {seed}, {', '.join(f'{name} {version}' for name, version in shown.items())}, "
          f"{environment.hardware()['cpu']}, {len(run.inputs.files())} input files")
    return run


def _relative(path: Path) -> str:
    """`path` relative to the base directory where it lies inside, so that manifests name no one's home."""
    path, base = Path(path), base_directory()
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)


def _plain(value):
    """JSON types of `value`: NumPy scalars and arrays, paths, tuples, sets and mappings converted; NaN → None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if hasattr(value, "tolist"):  # NumPy scalar or array, torch tensor
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value))
    if isinstance(value, Path):
        return _relative(value)
    raise SfmpError(f"cannot store {type(value).__name__} in JSON: {value!r}; convert it to plain data first")
