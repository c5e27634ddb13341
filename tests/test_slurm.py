"""The workflow on a real Slurm: layers shared by jobs give the bytes of a local run.

    tests/slurm_node.sh start /tmp/slurm    # as root; see there
    SFMP_TEST_SLURM=1 pytest tests/test_slurm.py
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import contents

ROOT = Path(__file__).resolve().parents[1]
RUN = "embedded.sfmp-awq.bpw3.00.g128.b64"
TARGET = f"results/embedded/quantized/{RUN}.json"
SMALL = ("n_windows=4", "seqlen=128")  # what is compared does not depend on how much there is of it


def _missing():
    """Why there is nothing to test here, None if there is."""
    if os.environ.get("SFMP_TEST_SLURM") != "1":
        return "submits jobs: set SFMP_TEST_SLURM=1 where Slurm may be used, or see tests/slurm_node.sh"
    if shutil.which("sinfo") is None:
        return "no Slurm here: see tests/slurm_node.sh"
    asked = subprocess.run(["sinfo"], capture_output=True, text=True, timeout=60)
    return f"Slurm does not answer: {asked.stderr.strip()}" if asked.returncode else None


pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.skipif(bool(_missing()), reason=str(_missing()))]


@pytest.fixture
def checkout(tmp_path):
    """What the quantization of one run needs, in a folder that the nodes share with this process."""
    place = tmp_path / "checkout"
    for name in ("config", "notebooks", "profiles", "report", "rules", "sfmp", "kernels_numba"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", place)
    return place


def _snakemake(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *arguments], cwd=folder, text=True, timeout=1500, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(folder)})
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def test_pieces_on_slurm_have_the_bytes_of_a_local_run(checkout):
    _snakemake(checkout, "--cores", "1", TARGET, "--config", *SMALL)
    results = checkout / "results" / "embedded"
    local = contents(results / "models" / RUN), (checkout / TARGET).read_bytes()
    results.rename(checkout / "local")
    gpus = ["--set-resources", "piece:gpu=1"] if "gpu" in _node() else []
    text = _snakemake(checkout, TARGET, "--workflow-profile", "profiles/slurm", "--jobs", "4", "--config", *SMALL,
                      "scatter=3", *gpus, *_without_accounting())
    assert (contents(results / "models" / RUN), (checkout / TARGET).read_bytes()) == local
    submitted = dict.fromkeys(re.findall(r"SLURM jobid (\d+)", text))
    shown = subprocess.run(["scontrol", "show", "jobs"], capture_output=True, text=True, timeout=60).stdout
    known = {found[1]: job for job in shown.split("\n\n") if (found := re.search(r"JobId=(\d+)", job))}
    jobs = [known[number] for number in submitted]
    assert len(submitted) == 8  # windows, salience, plan, inputs, three pieces, and gathering them
    assert all("JobState=COMPLETED" in job for job in jobs)
    if gpus:
        assert sum("gres/gpu" in job or "gres:gpu" in job for job in jobs) == 3
    assert not list((results / "scatter").rglob("*.safetensors"))  # what jobs handed on is gone


def _node():
    return subprocess.run(["sinfo", "--noheader", "--format=%G"], capture_output=True, text=True, timeout=60).stdout


def _without_accounting():
    """What the profile asks to be added where no database keeps the jobs."""
    shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=60).stdout
    if "accounting_storage/slurmdbd" in shown:
        return []
    return ["--slurm-status-command", "squeue", "--slurm-no-account", "--slurm-init-seconds-before-status-checks", "3",
            "--seconds-between-status-checks", "3"]
