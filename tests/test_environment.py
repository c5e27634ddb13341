"""The environment: one set of pins in three files, the README's two commands, small evidence."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
TEST_COMMAND = "pip install -r requirements.lock && pytest"
RUN_COMMAND = "pip install -r requirements.lock && snakemake --cores 8"


def lines(name: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in text if line.strip() and not line.startswith("#")]


def lock() -> dict[str, str]:
    return {
        canonicalize_name(name): version
        for name, version in (pin.split("==") for pin in lines("requirements.lock")[:-1])
    }


def test_lock_pins_every_package_once_and_ends_with_the_project():
    *pins, last = lines("requirements.lock")
    assert last == "-e ."
    loose = [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", pin)]
    assert not loose, f"not pinned exactly: {loose}"
    names = [canonicalize_name(pin.split("==")[0]) for pin in pins]
    assert len(names) == len(set(names))
    assert lock()["torch"] == "2.13.0"


def test_conda_environment_has_the_pins_of_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    [pip] = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert pip == lines("requirements.lock")
    assert "python=3.11" in environment["dependencies"]


def test_requirements_of_the_project_admit_the_lock():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [text for group in project["optional-dependencies"].values() for text in group]
    for requirement in map(Requirement, project["dependencies"] + extras):
        pinned = lock().get(canonicalize_name(requirement.name))
        assert pinned is not None, f"{requirement.name} is not in requirements.lock"
        assert requirement.specifier.contains(pinned), f"{requirement} does not admit {pinned}"
    for version in ("3.11.0", "3.12.0"):
        assert Requirement(f"python{project['requires-python']}").specifier.contains(version)


def test_lock_is_closed_under_the_requirements_of_what_is_installed():
    """Every installed package of the lock finds its own requirements in the lock, at a version it accepts."""
    pins, wrong = lock(), []
    for name in pins:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, distribution.requires or []):
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            pinned = pins.get(canonicalize_name(requirement.name))
            cuda = requirement.name.startswith(
                ("nvidia-", "cuda-toolkit", "triton")
            )  # pinned by torch's metadata
            if not cuda and (pinned is None or not requirement.specifier.contains(pinned, prereleases=True)):
                wrong.append(f"{name} needs {requirement}, lock has {pinned}")
    assert not wrong, wrong


def test_installed_versions_are_those_of_the_lock():
    """Elsewhere (a GPU machine with its own torch) the tests may run too, but then they say so."""
    pins, other = lock(), {}
    for name in (
        "torch",
        "transformers",
        "numpy",
        "snakemake",
        "papermill",
        "numba",
        "lm-eval",
        "tokenizers",
    ):
        installed = importlib.metadata.version(name).split("+")[
            0
        ]  # a build label such as +cpu is the same version
        if installed != pins[name]:
            other[name] = f"{installed}, lock {pins[name]}"
    if other:
        pytest.skip(f"this environment was not made from requirements.lock: {other}")


@pytest.mark.parametrize("command", [TEST_COMMAND, RUN_COMMAND])
def test_readme_gives_the_two_commands(command):
    commands = [
        line.split("  #")[0].strip() for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    ]
    assert command in commands, f"README.md has no line with the command: {command}"


def test_ci_runs_the_readme_command():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    pattern = re.search(r"grep -m1 -oE '([^']+)' README\.md", script).group(1)
    assert re.fullmatch(pattern, TEST_COMMAND)
    assert "snakemake --cores 2" in script
    assert subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")]).returncode == 0
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert any(".ci/run" in step.get("run", "") for step in workflow["jobs"]["replicate"]["steps"])


def test_import_of_the_package_is_light():
    code = "import sys, sfmp.workflow, sfmp.provenance; print(sorted({'torch', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_committed_evidence_is_small():
    files = [path for path in (ROOT / "results" / "reference").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4_000_000


def test_licence_and_citation_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["license"] == project["license"] == "Apache-2.0"
    assert citation["version"] == project["version"]
    assert "The SFMP replication authors" in (ROOT / "LICENSE").read_text(encoding="utf-8")
