"""Products of cases by CUDA kernels in Numba's simulator, from one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
ROUNDING = {"float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}  # of one result
SUMS = 1e-6  # of float32 sums over a few hundred terms


def simulate(cases):
    """Relative errors of cases, from one process with the simulator."""
    folders = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, str(TESTS / "cudasim.py"), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
