"""What every notebook opens and closes with: results, and a manifest beside each that says how it was made.

Results are written atomically (temporary file, then rename) and are a function of inputs, parameters, seed
and code only. Whatever is not reproducible to the byte - times, memory, host - goes into the manifest,
``<output>.manifest.json``.
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
from functools import partial
from pathlib import Path

from sfmp import environment
from sfmp.checks import SfmpError, write_atomically
from sfmp.notebook_paths import Inputs, Outputs, base_directory, relative


def manifest_path(output: Path | str) -> Path:
    """Path of the manifest of a result file or folder."""
    return Path(f"{output}.manifest.json")


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
        self.out = Outputs(notebook, self.parameters.get("out") or {})
        self.inputs = Inputs(notebook, self.parameters.get("inputs") or {})
        missing = [str(path) for path in self.inputs.files() if not path.exists()]
        if missing:
            raise SfmpError(
                f"{notebook}: inputs {missing} do not exist; run their rules first (snakemake does), or "
                "correct `inputs` in the parameters cell"
            )
        for name in self.out:  # a manifest must never describe a file of an earlier run
            manifest_path(self.out[name]).unlink(missing_ok=True)
        self._written: dict[str, list[Path]] = {}
        self._notes: dict = {}
        self._started = datetime.datetime.now(datetime.UTC)
        self._clock = time.perf_counter()
        self._inputs_read = [_described(path) for path in self.inputs.files()]

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
                raise SfmpError(
                    f"{self.notebook}: nothing was written for output {name!r}; the writer must "
                    "create the path it is given"
                )
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
        return self._write(name, self.out.with_suffix(name, suffix), partial(_write_text, text))

    def save_csv(self, name: str, frame) -> Path:
        """Write a pandas frame without its index; floats in full precision."""
        return self.save_text(name, frame.to_csv(index=False, lineterminator="\n"), ".csv")

    def save_json(self, name: str, value) -> Path:
        """Write plain data as indented JSON; NumPy values are converted, NaN and infinity become null."""
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
            raise SfmpError(
                f"{self.notebook}: output {name!r} is a figure, expected a path ending in .png, found {png}"
            )
        # A fixed salt for the ids of SVG elements and no dates: the same figure is the same bytes.
        with matplotlib.rc_context({"svg.hashsalt": "sfmp", "svg.fonttype": "path"}):
            for kind, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
                draw = partial(figure.savefig, format=kind, dpi=200, bbox_inches="tight", metadata=metadata)
                self._write(name, png.with_suffix(f".{kind}"), draw)
        text = data.to_csv(index=False, lineterminator="\n")
        self._write(name, png.with_suffix(".csv"), partial(_write_text, text))
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
            raise SfmpError(
                f"{self.notebook}: outputs {missing} were not written; save each of them before finish()"
            )
        outputs = [
            {"name": name, **_described(path)} for name, paths in self._written.items() for path in paths
        ]
        manifest = {
            "notebook": self.notebook,
            "parameters": _plain(self.parameters),
            "seed": self.seed,
            "inputs": self._inputs_read,
            "outputs": outputs,
            "code": environment.code_state(base_directory() / "notebooks" / f"{self.notebook}.ipynb"),
            "versions": environment.versions(),
            "hardware": environment.hardware(),
            "started": self._started.isoformat(timespec="seconds"),
            "wall_seconds": round(self.elapsed(), 3),
            "peak_memory_bytes": self.peak_memory(),
            "peak_gpu_memory_bytes": environment.peak_gpu_memory(),
            "notes": self._notes,
        }
        text = json.dumps(manifest, indent=2) + "\n"
        for paths in self._written.values():
            path = next((path for path in paths if path.suffix == ".png"), paths[0])
            write_atomically(manifest_path(path), partial(_write_text, text))
            print(f"{relative(path)}  (how: {manifest_path(path).name})")
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
    versions = environment.versions()
    shown = ", ".join(
        f"{name} {versions.get(name, 'absent')}" for name in ("python", "torch", "transformers")
    )
    print(
        f"{notebook}: seed {seed}, {shown}, {environment.hardware()['cpu']}, "
        f"{len(run.inputs.files())} input files"
    )
    return run


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _described(path: Path) -> dict:
    return {"path": relative(path), **environment.fingerprint(path)}


def _plain(value):
    """JSON types of `value`: NumPy values, paths, tuples, sets and mappings converted; NaN → None."""
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
        return relative(value)
    raise SfmpError(f"cannot store {type(value).__name__} in JSON: {value!r}; convert it to plain data first")
