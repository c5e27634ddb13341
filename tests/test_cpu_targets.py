"""Choice of kernels by processor features, forced targets, and compiled code that survives the process."""

import json
import os
import subprocess
import sys

import pytest

import kernels_numba
from kernels_numba.cpu import targets

BEST = set(targets.NEEDS["avx512_vbmi"])


@pytest.fixture
def processor(monkeypatch):
    monkeypatch.delenv(targets.VARIABLE, raising=False)

    def pretend(features, forced=None):
        monkeypatch.setattr(targets, "features", lambda: frozenset(features))
        if forced is not None:
            monkeypatch.setenv(targets.VARIABLE, forced)
        return targets.detect()

    return pretend


def test_best_target_that_the_processor_has(processor):
    assert processor(BEST)[0] == "avx512_vbmi"
    assert processor(BEST - {"avx512vnni"})[0] == "avx512f"
    assert processor(BEST - {"avx512bw"} | {"avx2", "fma"})[0] == "avx2"
    assert processor({"neon", "dotprod"}) == ("neon", "neon (untested on hardware), found on this processor")
    assert processor({"neon"})[0] == processor({"avx2"})[0] == "generic"
    assert processor(set()) == ("generic", "generic, found on this processor")
    assert kernels_numba.available()["cpu"] == "yes: generic, found on this processor; modes exact"


def test_forced_target(processor):
    assert processor(BEST, "avx512f") == ("avx512f", "avx512f, forced by SFMP_CPU_TARGET")
    assert processor(BEST, "generic")[0] == "generic"
    target, why = processor({"avx512f", "avx512bw", "f16c"}, "avx512_vbmi")
    assert target is None and why.endswith("this processor lacks avx512vbmi, avx512vnni")
    assert kernels_numba.available()["cpu"].startswith("no: SFMP_CPU_TARGET=avx512_vbmi, but")
    target, why = processor(BEST, "sse")
    assert target is None and "none of avx512_vbmi, avx512f, avx2, neon, generic" in why


def test_features_numba_may_not_use_do_not_count(monkeypatch):
    from numba import config

    monkeypatch.setattr(config, "CPU_FEATURES", "+avx2,-avx512f")
    targets.features.cache_clear()
    try:
        assert targets.features() <= {"avx2"}
    finally:
        targets.features.cache_clear()


SCRIPT = """
import json, sys, time
sys.path.insert(0, "tests")
from cases import packed_case
import torch, kernels_numba
from kernels_numba.cpu import drive
packed, x = packed_case(0, group_size=128), torch.ones(1, 100)
start = time.process_time()
mode = sys.argv[1] if len(sys.argv) > 1 else None
y = kernels_numba.matmul(x, packed, backend="cpu", mode=mode)
spent = time.process_time() - start
error = float((y - x @ packed.dequantize().T).norm() / y.norm())
run = drive.runner()
print(json.dumps({"seconds": spent, "error": error, "hits": sum(run.stats.cache_hits.values()),
                  "available": kernels_numba.available()["cpu"]}))
"""


def _run(tmp_path, *arguments, **variables):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), **variables}
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], env=environment, capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr


@pytest.mark.cpu
@pytest.mark.slow
def test_compiled_code_is_cached_for_the_next_process(tmp_path):
    first, second = _run(tmp_path), _run(tmp_path)
    assert first["hits"] == 0 and first["seconds"] < 10
    assert second["hits"] == 1 and second["seconds"] < first["seconds"] / 2
    assert first["error"] == second["error"] < 1e-4


@pytest.mark.slow
def test_a_target_without_kernels_is_an_error_that_says_so(tmp_path):
    assert "SFMP_CPU_TARGET=sse is none of" in _run(tmp_path, SFMP_CPU_TARGET="sse")
