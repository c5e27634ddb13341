"""Closing steps: pages of executed notebooks, and publication of small evidence with its manifests."""

import json
from pathlib import Path

import nbformat
import pytest

from sfmp.report import publish, render_notebooks
from sfmp.spec import SfmpError


def result(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    manifest = {
        "notebook": "e1",
        "started": "now",
        "wall_seconds": 1.0,
        "outputs": [{"path": path.as_posix()}],
    }
    Path(f"{path}.manifest.json").write_text(json.dumps(manifest))


def test_publish_copies_small_evidence_with_its_manifests(tmp_path):
    source, target = tmp_path / "results", tmp_path / "reference"
    result(source, "tables/e1.csv", "a\n")
    result(source, "claims.csv", "b\n")
    result(source, "figures/big.svg", "c\n")
    publish(source, target)
    assert sorted(p.name for p in target.rglob("*") if p.is_file()) == [
        "claims.csv",
        "e1.csv",
        "manifests.jsonl",
    ]
    assert len((target / "manifests.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "flaw, message", [("no manifest", "no manifest says"), ("too large", "too large to commit")]
)
def test_publish_refuses(tmp_path, flaw, message):
    result(tmp_path, "claims.csv", "b" * (400_000 if flaw == "too large" else 1))
    if flaw == "no manifest":
        Path(f"{tmp_path / 'claims.csv'}.manifest.json").unlink()
    with pytest.raises(SfmpError, match=message):
        publish(tmp_path, tmp_path / "reference")


def test_executed_notebooks_become_pages(tmp_path):
    cells = [nbformat.v4.new_code_cell("a = 1\nprint(a)")]
    (tmp_path / "logs/eval").mkdir(parents=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "logs/eval/x.ipynb")
    render_notebooks(tmp_path / "logs", tmp_path / "html/index.html")
    assert 'href="eval/x.html"' in (tmp_path / "html/index.html").read_text()
    assert "print" in (tmp_path / "html/eval/x.html").read_text()
    with pytest.raises(SfmpError, match="expected executed notebooks"):
        render_notebooks(tmp_path / "none", tmp_path / "html/index.html")
