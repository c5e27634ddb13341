"""Closing steps: pages of executed notebooks, and publication of small evidence with its manifests."""

import json
import re
from pathlib import Path

import nbformat
import pytest

from sfmp.report import publish, render_notebooks
from sfmp.spec import SfmpError
from sfmp.workflow import NOTEBOOKS


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
    again = Path(f"{source}/tables/e1.md.manifest.json")  # another result of the same execution
    again.write_text((source / "tables/e1.csv.manifest.json").read_text())
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
    result(tmp_path, "claims.csv", "b" * (600_000 if flaw == "too large" else 1))
    if flaw == "no manifest":
        Path(f"{tmp_path / 'claims.csv'}.manifest.json").unlink()
    with pytest.raises(SfmpError, match=message):
        publish(tmp_path, tmp_path / "reference")


def test_executed_notebooks_become_pages(tmp_path):
    cells = [nbformat.v4.new_code_cell("a = 1\nprint(a)")]
    (tmp_path / "logs/evaluation").mkdir(parents=True)
    for name in ("evaluation/x", "evaluation/y", "e1", "overview"):
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"logs/{name}.ipynb")
    pages = render_notebooks(tmp_path / "logs", tmp_path / "html/index.html")
    names = [page.relative_to(tmp_path / "html").as_posix() for page in pages]
    assert names == ["overview.html", "evaluation/x.html", "evaluation/y.html", "e1.html"]  # as in the pipeline
    index = (tmp_path / "html/index.html").read_text()
    assert re.findall(r'href="([^"]+)"', index) == names
    page = (tmp_path / "html/evaluation/x.html").read_text()
    assert "print" in page and 'href="../index.html"' in page
    with pytest.raises(SfmpError, match="expected executed notebooks"):
        render_notebooks(tmp_path / "none", tmp_path / "html/index.html")


def test_every_formula_of_the_notebooks_is_drawn_without_a_network(tmp_path):
    notebooks = Path(__file__).resolve().parents[1] / "notebooks"
    (tmp_path / "logs").mkdir()
    formulas = 0
    for rule, (stem, _) in NOTEBOOKS.items():
        text = (notebooks / f"{stem}.ipynb").read_text("utf-8")
        (tmp_path / f"logs/{rule}.ipynb").write_text(text, "utf-8")
    for page in render_notebooks(tmp_path / "logs", tmp_path / "html/index.html"):
        text = page.read_text("utf-8")
        formulas += text.count("<math")
        prose = re.sub(r'<div class="highlight.*?</pre>', "", text, flags=re.S)
        assert "$" not in prose and "\\frac" not in prose, page
        assert not re.search(r'(?:src|href)="https?:', text), page
    assert formulas >= 40
