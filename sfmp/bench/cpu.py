"""The CPU bench: which candidates meet in which part, and the parts one after another, each in a process of its own.

A part starts from clean memory with its threads pinned to processors, and a peer that crashes takes only its part
with it. The result is one JSON file: machine, versions, commit, settings, and rows with every sample.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sfmp.checks import SfmpError, write_atomically

SHAPES = ((4096, 4096), (14336, 4096))  # out × in
BATCHES = (2, 4, 8, 16, 32, 64, 128)
BITS = (2, 2.5, 3, 3.5, 4)
ROUNDS = {"product": 21, "batch": 9, "width": 9, "decode": 5}
QUICK = {"product": 3, "batch": 2, "width": 2, "decode": 1}


def parts(shapes=SHAPES, batches=BATCHES, models=("embedded", "1.1B")) -> list[dict]:
    """Everything that is measured, as arguments of `run_part`."""
    found = [{"part": "product", "shape": list(shape)} for shape in shapes]
    found += [{"part": "batch", "shape": list(shapes[0]), "batch": batch} for batch in batches]
    found += [{"part": "width", "shape": list(shapes[0])}, {"part": "accuracy", "shape": list(shapes[0])}]
    return found + [{"part": "decode", "model": model} for model in models]


def measure(parts: list[dict], quick: bool, threads: int, path: Path, log=print) -> dict:
    """Run the parts; write and return {"kind", "date", "machine", …, "parts": [{**part, "rows"} or with "failed"]}.

    The file is written after each part, so an interrupted run keeps what it measured.

    Raises
    ------
    SfmpError
        More threads than processors, or a file that cannot be written: said before anything is measured.
    """
    from sfmp import environment

    cpus = sorted(os.sched_getaffinity(0))[:threads] if hasattr(os, "sched_getaffinity") else list(range(threads))
    if len(cpus) < threads:
        raise SfmpError(f"--threads: expected at most {len(cpus)} processors, found {threads}; ask for fewer")
    found = {"kind": "cpu", "date": time.strftime("%Y-%m-%d"), "threads": threads,
             "rounds": QUICK if quick else ROUNDS, "machine": environment.hardware(),
             "versions": {**environment.versions(), **_peer_versions()}, **environment.git_state(), **_kernels(),
             "parts": []}
    try:
        write(found, path)
    except OSError as error:
        raise SfmpError(f"--out: expected a file that can be written, found {path} ({error}); choose another"
                        ) from error
    for part in parts:
        start = time.perf_counter()
        rows = _in_a_process(part, quick, cpus)
        log(f"{describe(part)}: {time.perf_counter() - start:.0f} s{'' if 'rows' in rows else ', FAILED'}", flush=True)
        found["parts"].append({**part, **rows})
        write(found, path)
    return found


def describe(part: dict) -> str:
    """One line about a part."""
    shape = "×".join(map(str, part.get("shape", [])))
    words = [part["part"], shape, part.get("model", ""), f"batch {part['batch']}" if "batch" in part else ""]
    return " ".join(word for word in words if word)


def _kernels():
    import kernels_numba
    from kernels_numba.cpu import launch

    return {"kernels": kernels_numba.available()["cpu"], "launch": launch.table()}


def _peer_versions():
    import importlib.metadata

    found = {}
    for name in ("onnxruntime", "openvino", "llvmlite"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _in_a_process(part, quick, cpus):
    """{"rows": …}, or {"failed": the last lines of what it said}."""
    environment = {**os.environ, "GOMP_CPU_AFFINITY": " ".join(map(str, cpus)), "NUMBA_NUM_THREADS": str(len(cpus)),
                   "OMP_NUM_THREADS": str(len(cpus))}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.json"
        command = [sys.executable, "-X", "faulthandler", "-m", "sfmp.bench.cpu", json.dumps(part), str(int(quick)),
                   str(output)]
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if output.exists():
            return json.loads(output.read_text())
        return {"failed": done.stderr.splitlines()[-8:] or [f"exit status {done.returncode}"]}


def run_part(part: dict, quick: bool, cpus: list[int]) -> dict:
    """Measure one part in this process; return {"rows": […], "absent": peers that could not be measured, and why}."""
    import torch

    torch.set_num_threads(len(cpus))
    rounds = (QUICK if quick else ROUNDS).get(part["part"])
    absent: dict[str, str] = {}
    rows = {"product": _product, "batch": _batch, "width": _width, "accuracy": _accuracy,
            "decode": _decode}[part["part"]](part, rounds, cpus, absent)
    return {"rows": rows, "absent": absent}


def _modes():
    """Modes of this processor's kernels, fastest first."""
    from kernels_numba.cpu import targets

    return sorted(targets.MODES[targets.detect()[0]], key=("lut8", "lut16", "exact").index)


def _product(part, rounds, cpus, absent):
    """One token: our modes by bits, what reading alone costs, all peers."""
    import torch

    from sfmp.bench import roof, timing
    from sfmp.bench.cpu_kernels import Matrices

    rows, columns = part["shape"]
    x, candidates = torch.randn(1, columns, generator=torch.Generator().manual_seed(1)), []
    modes = _modes()
    for bits in BITS:
        matrices = Matrices(rows, columns, bits)
        candidates += matrices.candidates(x, modes) + roof.candidates(matrices.images, matrices.label)
    candidates += Matrices(rows, columns, 3, mixed=True).candidates(x, modes)
    candidates += Matrices(rows, columns, 3, natural=True).candidates(x, modes)
    return timing.measure(candidates + _peers(rows, columns, x, cpus, absent), rounds)


def _peers(rows, columns, x, cpus, absent):
    """All peers that are installed and run here; the others go to `absent`."""
    import torch

    from sfmp.bench import cpu_peers as peers

    makers = {"torch bfloat16": lambda: peers.torch_dense(rows, columns, x, torch.bfloat16),
              "torch float32": lambda: peers.torch_dense(rows, columns, x, torch.float32),
              "torch int4pack": lambda: peers.torch_int4(rows, columns, x),
              "torch int8pack": lambda: peers.torch_int8(rows, columns, x)}
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)  # pools other than OpenMP's inherit the mask of the main thread
    for bits, kind in ((2, "acc4"), (4, "acc4"), (8, "acc4"), (2, "lut"), (4, "acc1")):
        makers[f"onnxruntime {kind} {bits}"] = lambda bits=bits, kind=kind: peers.onnxruntime(
            rows, columns, x, bits, kind, len(cpus), cpus)
    for bits in (2, 4):
        makers[f"openvino u{bits}"] = lambda bits=bits: peers.openvino(rows, columns, x, bits, len(cpus))
    found = []
    for name, make in makers.items():
        missing = [package for package in PACKAGES.get(name.split()[0], ()) if not peers.importable(package)]
        if missing:
            absent[name] = f"{' and '.join(missing)} not installed"
            continue
        try:
            found.append(make())
        except (RuntimeError, ValueError, ImportError, AttributeError) as error:
            # What a peer raises when it lacks an operator or this processor; the result says so, and why.
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return found


PACKAGES = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("openvino",)}


def _batch(part, rounds, cpus, absent):
    """Several tokens: through tables and through panels, and the peers."""
    import torch

    from sfmp.bench import timing
    from sfmp.bench.cpu_kernels import Matrices

    rows, columns = part["shape"]
    x = torch.randn(part["batch"], columns, generator=torch.Generator().manual_seed(1))
    candidates = []
    for bits in (2, 3, 4):
        matrices = Matrices(rows, columns, bits)
        for mode in _modes():
            candidates += matrices.both_ways(x, mode)
    return timing.measure(candidates + _peers(rows, columns, x, cpus, absent), rounds)


def _width(part, rounds, cpus, absent):
    """Tables over 2, 4 and 8 activations in plain Numba, beside the product's exact mode and torch."""
    import torch

    from sfmp.bench import cpu_peers, table_width, timing
    from sfmp.bench.cpu_kernels import Matrices

    rows, columns = part["shape"]
    x = torch.randn(1, columns, generator=torch.Generator().manual_seed(1))
    candidates = [cpu_peers.torch_dense(rows, columns, x, torch.float32)]
    for bits in (2, 3, 4):
        candidates += table_width.candidates(rows, columns, x[0].numpy(), bits)
        candidates += Matrices(rows, columns, bits).candidates(x, ("exact",))
    return timing.measure(candidates, rounds)


def _accuracy(part, rounds, cpus, absent):
    from sfmp.bench.cpu_kernels import accuracy

    return accuracy(*part["shape"], _modes())


def _decode(part, rounds, cpus, absent):
    """Tokens per second of generate."""
    from sfmp.bench import decode

    return decode.measure_decode(decode.decoders_of(part["model"], modes=_modes()[::-1]), rounds=rounds)


def write(result: dict, path: Path) -> None:
    """Write the result, one row a line."""
    parts = []
    for part in result["parts"]:
        rows = ",\n".join("   " + json.dumps(row, allow_nan=False) for row in part.get("rows", []))
        facts = json.dumps({key: value for key, value in part.items() if key != "rows"})[:-1]
        parts.append(f'  {facts}, "rows": [\n{rows}\n  ]}}' if rows else f"  {facts}}}")
    head = json.dumps({key: value for key, value in result.items() if key != "parts"}, indent=1)[:-2]
    text = head + ',\n "parts": [\n' + ",\n".join(parts) + "\n ]\n}\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


if __name__ == "__main__":
    given, brief, target = sys.argv[1:]
    bound = [int(cpu) for cpu in os.environ["GOMP_CPU_AFFINITY"].split()]
    measured = run_part(json.loads(given), bool(int(brief)), bound)
    write_atomically(Path(target), lambda path: path.write_text(json.dumps(measured)))
