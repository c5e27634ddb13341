"""Products where the surroundings are not a developer's: no folder to write to, Numba's workqueue, a forked child."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels_numba.cpu import drive, targets

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(targets.detect()[0] is None, reason=targets.detect()[1])]
ROOT = Path(__file__).resolve().parents[1]
START = """
import os, signal, sys, threading, warnings
import torch
sys.path[:0] = [{root!r}, {tests!r}]
from cases import packed_case
import kernels_numba
torch.set_num_threads(2)
packed = packed_case(0, rows=300, cols=700, bias=True)
x = torch.randn(3, 700, generator=torch.Generator().manual_seed(0))
expected = x @ packed.dequantize().T + packed.bias
bad = x.clone()
bad[0, 3] = float("nan")

def check(backend="cpu"):
    for row in (x[:1], x):
        found = kernels_numba.matmul(row, packed, backend)
        torch.testing.assert_close(found, expected[:len(row)], rtol=1e-3, atol=1e-2)
    assert kernels_numba.matmul(bad, packed, backend)[0].isnan().all()
"""


def _run(code, root=ROOT, **environment):
    script = START.format(root=str(root), tests=str(ROOT / "tests")) + code
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2", "OMP_NUM_THREADS": "2", **environment}
    environment = {name: value for name, value in environment.items() if value is not None}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_no_folder_for_compiled_code(backend):
    """As where the package cannot be written to and there is no home either: Numba has no locator then."""
    _run(f"""
from numba.core.caching import CacheImpl
CacheImpl._locator_classes = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    check({backend!r})
assert any("NUMBA_CACHE_DIR" in str(warning.message) for warning in caught)
""")


def test_python_threads_under_a_layer_that_allows_one():
    """Numba's workqueue ends the process if two threads enter it at once."""
    _run("""
check()
import numba
assert numba.threading_layer() == "workqueue"

def work():
    for _ in range(100):
        kernels_numba.matmul(x, packed, "cpu")
        kernels_numba.matmul(bad, packed, "cpu")

workers = [threading.Thread(target=work) for _ in range(3)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
check()
""", NUMBA_THREADING_LAYER="workqueue")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("layer", [None, "workqueue"])
def test_a_forked_child_does_not_wait_for_threads_it_has_not(layer):
    _run("""
check()
torch.randn(600, 600) @ torch.randn(600, 600)
child = os.fork()
if child == 0:
    signal.alarm(60)
    check()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
""", NUMBA_THREADING_LAYER=layer)


def test_everything_that_shapes_machine_code_is_part_of_its_key():
    """Modules that drive and panel import, and what those import; of launch only the prefetch, of arena nothing."""
    folder = Path(drive.__file__).parent
    found, left = set(), ["drive", "panel"]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kernels_numba.cpu"):
                module = node.module.removeprefix("kernels_numba.cpu").lstrip(".")
                left += [module] if module else [alias.name for alias in node.names]
    assert found - {"launch", "arena"} == set(drive.SOURCES)
