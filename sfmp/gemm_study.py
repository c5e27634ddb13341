"""What notebook 07 shows of the GPU kernels: which lane reads what, and the kernels' own source run without a GPU.

``python -m sfmp.gemm_study REQUEST`` multiplies in Numba's CUDA simulator and prints the results. The simulator is
chosen when Numba is first imported, so `simulated` gives it a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import torch

from sfmp.bench.random_model import random_packed
from sfmp.checks import SfmpError

SHAPE = (32, 512)  # of the matrix that the simulator multiplies: each of its threads is a thread of Python
GROUP_SIZE, BLOCK_ROWS, WBITS = 128, 16, 3.0
CASES = (  # kernel, options of its plan, tokens
    *(("lut", {"width": width, "shares": 2, "warps": 2}, 1) for width in (2, 4, 6, 8)),
    ("lut", {"width": 4, "shares": 1, "warps": 2}, 3),
    *(("mma", {"warps": 2}, tokens) for tokens in (1, 3)),
)
SWITCH = 5e-5  # seconds; threads of the simulator wait for each other more than they work
LONGEST = 300  # seconds the simulator may take before something is wrong


def small_matrix(seed: int = 0):
    """Return a random PackedMatrix [32, 512] of 2-, 3- and 4-bit blocks, both sides permuted."""
    return random_packed(*SHAPE, WBITS + 32 / GROUP_SIZE, GROUP_SIZE, BLOCK_ROWS, seed, mixed=True)


def activations(tokens: int, seed: int = 0) -> torch.Tensor:
    """Return standard normal float16 activations [tokens, 512]."""
    x = np.random.default_rng(seed).standard_normal((tokens, SHAPE[1]))
    return torch.from_numpy(x).to(torch.float16)


def lane_reads(layout, row: int = 0) -> pd.DataFrame:
    """What each lane of a warp does with one row of the first line: 16 rows × 256 columns of one plane.

    Parameters
    ----------
    layout : LutLayout
    row : int, 0 to 15

    Returns
    -------
    pandas.DataFrame
        `lane`, `permuted_columns` and `natural_columns` of its byte (first to last, lowest bit first), `byte`: the
        index it looks up, `word`: where that entry is in the lane-private tables, `bank` of that word, and
        `bank_if_shared`: of the same entry if all lanes read one table of 256 float32.

    Source: CUDA.md section 5.
    """
    lane = np.arange(32)
    byte = _bytes(layout)[0, row]
    per_lane = layout.segment // 8
    first = layout.segments[: 256 // layout.segment][lane // per_lane] * layout.segment + lane % per_lane * 8
    columns = first[:, None] + np.arange(8)
    word = 32 * byte.astype(int) + lane
    natural = layout.columns[columns]
    return pd.DataFrame({
        "lane": lane, "permuted_columns": [f"{start}–{start + 7}" for start in first],
        "natural_columns": [" ".join(map(str, found)) for found in natural.tolist()],
        "byte": byte, "word": word, "bank": word % 32, "bank_if_shared": byte % 32})


def _bytes(layout):
    """Bytes of all lines: uint8 [lines, 16 rows, 32 lanes]."""
    return layout.lines.view(np.uint8).reshape(-1, 32, 16).transpose(0, 2, 1)


def bank_conflicts(seed: int = 0) -> pd.DataFrame:
    """How many passes a look-up of a warp takes, counted over every look-up of a random 512×1024 matrix of 3 bits.

    Lanes that read different words of one bank wait for each other; the same word is read once for all.

    Returns
    -------
    pandas.DataFrame
        `tables, shared_bytes, passes_mean, passes_most`.
    """
    from kernels_numba.gpu.lut_layout import make_layout

    layout = make_layout(random_packed(512, 1024, WBITS + 32 / GROUP_SIZE, GROUP_SIZE, 512, seed, mixed=False))
    index = _bytes(layout).reshape(-1, 32).astype(np.int64)
    lane, size = np.arange(32), 256
    kinds = {"one table a lane, float32": (index * 32 + lane, size * 32, 4),
             "one table for all lanes, float32": (index, size, 4),
             "one table for all lanes, float16": (index // 2, size // 2, 4)}
    found = []
    for name, (word, words, word_bytes) in kinds.items():
        asked = np.zeros((len(index), words), bool)
        np.put_along_axis(asked, word, True, axis=1)
        passes = asked.reshape(len(index), -1, 32).sum(1).max(1)  # distinct words of the busiest bank
        found.append((name, words * word_bytes, passes.mean(), int(passes.max())))
    return pd.DataFrame(found, columns=["tables", "shared_bytes", "passes_mean", "passes_most"])


def simulated(seed: int = 0, cases=CASES) -> pd.DataFrame:
    """Multiply `small_matrix` by the kernels' source in Numba's CUDA simulator, and in float64.

    Outputs and scratch memory start as NaN, so that an element that is not written is seen.

    Returns
    -------
    pandas.DataFrame
        `kernel, table_width, tokens, launches, thread_blocks, error`; error = ‖y − y₆₄‖ / ‖y₆₄‖ with float16
        activations and results.

    Raises
    ------
    SfmpError
        The simulator failed.
    """
    request = json.dumps({"seed": seed, "cases": [list(case) for case in cases]})
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    command = [sys.executable, "-m", "sfmp.gemm_study", request]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LONGEST)
        results = [json.loads(line) for line in done.stdout.splitlines()] if done.returncode == 0 else None
    except subprocess.TimeoutExpired as error:
        raise SfmpError(f"simulator: expected products within {LONGEST} s, found none; try on a quieter machine"
                        ) from error
    if results is None:
        raise SfmpError(f"simulator: expected products of {SHAPE[0]}×{SHAPE[1]}, found {done.stderr[-600:]!r}; check "
                        "that numba and numba-cuda are those of requirements.lock")
    dense, rows = small_matrix(seed).dequantize().double(), []
    for (kernel, options, tokens), result in zip(cases, results, strict=True):
        exact = activations(tokens, seed).double() @ dense.T
        error = (torch.tensor(result["y"]).double().reshape(exact.shape) - exact).norm() / exact.norm()
        rows.append((kernel, options.get("width"), tokens, result["launches"], result["thread_blocks"], error.item()))
    frame = pd.DataFrame(rows, columns=["kernel", "table_width", "tokens", "launches", "thread_blocks", "error"])
    return frame.astype({"table_width": "Int64"})


def on_device(seed: int = 0) -> pd.DataFrame:
    """The products of `simulated` on the GPU of this machine, `kernel, tokens, error`.

    Where there is none, or its kernels cannot run: no rows, and `attrs["not_run"]` says why.
    """
    import kernels_numba

    columns = ["kernel", "tokens", "error"]
    reason = "no GPU here: not run" if not torch.cuda.is_available() else kernels_numba.available()["cuda"]
    rows = []
    if torch.cuda.is_available() and reason.startswith("yes"):
        packed = small_matrix(seed)
        there, dense = packed.to("cuda"), packed.dequantize().double()
        for kernel in kernels_numba.MODES["cuda"]:
            for tokens in (1, 3):
                x = activations(tokens, seed)
                y = kernels_numba.matmul(x.cuda(), there, backend="cuda", mode=kernel)
                exact = x.double() @ dense.T
                rows.append((kernel, tokens, ((y.cpu().double() - exact).norm() / exact.norm()).item()))
        reason = ""
    frame = pd.DataFrame(rows, columns=columns)
    frame.attrs["not_run"] = reason
    return frame


def _multiply(kernel, options, tokens, seed):
    """One product in the simulator: {"y": its values, "launches", "thread_blocks"}."""
    from kernels_numba.gpu import launches, lut_layout, lut_run, mma_layout, mma_run

    packed, x = small_matrix(seed), activations(tokens, seed)
    layouts, runs = {"lut": (lut_layout, lut_run), "mma": (mma_layout, mma_run)}[kernel]
    layout = layouts.make_layout(packed)
    plan = runs.plan(layout, tokens, "float16", **options)
    blank = {"f": (np.float32, np.nan), "h": (np.uint16, 0x7FFF), "u": (np.uint32, 0x7FFFFFFF),
             "i": (np.int32, 0x7FFFFFFF)}
    scratch = {name: np.full(size, blank[letter][1], blank[letter][0]) for name, (size, letter) in plan.scratch.items()}
    y = np.full(tokens * SHAPE[0], 0x7FFF, np.uint16)  # NaN
    launches.run(plan, {**runs.layout_arrays(layout), **scratch, "x": x.view(torch.uint16).numpy().reshape(-1), "y": y,
                        "bias": np.zeros(SHAPE[0], np.float32)})
    blocks = sum(launch.grid[0] * launch.grid[1] for launch in plan.launches)
    return {"y": y.view(np.float16).astype(float).tolist(), "launches": len(plan.launches), "thread_blocks": blocks}


if __name__ == "__main__":
    sys.setswitchinterval(SWITCH)
    torch.set_num_threads(1)
    asked = json.loads(sys.argv[1])
    for case in asked["cases"]:
        print(json.dumps(_multiply(*case, asked["seed"])), flush=True)
