"""Rules of the notebooks (DESIGN §1, STYLE §2 and §3), read from their syntax trees: no notebook is run
here.
"""

import ast
import json
import re
from pathlib import Path

import pytest

from sfmp.workflow import COMMON, NOTEBOOKS

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
FORBIDDEN = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.Try,
    ast.Lambda,
)
MAGIC = ("%", "!")


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(path):
    """(source, tags) of each code cell."""
    cells = [cell for cell in load(path)["cells"] if cell["cell_type"] == "code"]
    return [("".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in cells]


def imported(path):
    """Names a notebook imports from the project: the module or the object each stands for."""
    names = {}
    for source, _ in code_cells(path):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in (
                "sfmp",
                "kernels_numba",
            ):
                names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def project_calls(source, names):
    """Calls of the project's functions in one cell; classes (capitalised) only hold settings and do not
    count.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            target, parts = node.func, []
            while isinstance(target, ast.Attribute):
                parts.append(target.attr)
                target = target.value
            if isinstance(target, ast.Name) and target.id in names and not target.id[0].isupper():
                found.append(".".join([target.id, *reversed(parts)]))
    return found


def parameters(path):
    """name → (annotation, value) of the parameters cell."""
    (source,) = [source for source, tags in code_cells(path) if "parameters" in tags]
    tree = ast.parse(source)
    assert all(isinstance(node, ast.AnnAssign) for node in tree.body), (
        "parameters are typed: name: type = value"
    )
    return {node.target.id: (node.annotation.id, ast.literal_eval(node.value)) for node in tree.body}


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def notebook(request):
    return request.param


def test_every_rule_has_its_notebook_and_every_notebook_its_rule():
    assert {name for name, _ in NOTEBOOKS.values()} == {path.stem for path in PATHS}


def test_committed_without_outputs(notebook):
    content = load(notebook)
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
        assert set(cell["metadata"]) <= {"tags"}
    kernel = content["metadata"]["kernelspec"]
    assert (kernel["name"], kernel["language"]) == ("python3", "python")
    assert content["metadata"]["language_info"] == {"name": "python"}  # no version of whoever saved it last


def test_cell_ids_are_unique(notebook):
    ids = [cell["id"] for cell in load(notebook)["cells"]]
    assert len(set(ids)) == len(ids)


def test_narrative_comes_first_and_is_not_shorter_than_the_code(notebook):
    cells = load(notebook)["cells"]
    kinds = [cell["cell_type"] for cell in cells]
    assert kinds[0] == "markdown" and kinds.count("markdown") >= kinds.count("code") * 0.5
    words = sum(len("".join(cell["source"]).split()) for cell in cells if cell["cell_type"] == "markdown")
    code_words = sum(len(source.split()) for source, _ in code_cells(notebook))
    assert words >= code_words
    first = "".join(cells[0]["source"])
    assert first.startswith("# ") and all(f"**{part}:**" in first for part in ("Paper", "In", "Out", "Time"))


def test_sizes(notebook):
    cells = code_cells(notebook)
    assert len(cells) <= 25
    for source, _ in cells:
        lines = source.splitlines()
        assert len(lines) <= 12 and max(map(len, lines)) <= 120, source


def test_parameters_are_the_first_code_cell_and_those_the_workflow_sends(notebook):
    assert "parameters" in code_cells(notebook)[0][1]
    found = parameters(notebook)
    (own,) = [own for name, own in NOTEBOOKS.values() if name == notebook.stem]
    assert set(found) == {*COMMON, *own}
    for name, (annotation, value) in found.items():
        assert annotation == type(value).__name__, name
    assert found["out"][1] == {} and found["inputs"][1] == {}  # Run all writes to results/scratch


def test_parameters_are_explained(notebook):
    source = code_cells(notebook)[0][0]
    assert all("  # " in line for line in source.splitlines())  # papermill --help-notebook prints these


def test_no_definitions_loops_or_caught_exceptions(notebook):
    for source, tags in code_cells(notebook):
        assert not source.lstrip().startswith(MAGIC)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Lambda) and "derivation" in tags:
                continue  # a three-number example may state its loss in place
            assert not isinstance(node, FORBIDDEN), f"{type(node).__name__} in:\n{source}"


def test_one_public_function_per_cell(notebook):
    names = imported(notebook)
    for source, tags in code_cells(notebook):
        calls = project_calls(source, names)
        assert len(calls) <= 1, f"{calls} in:\n{source}"
        assert not any(part.startswith("_") for call in calls for part in call.split(".")), "private function"
        if "derivation" in tags:
            assert len(calls) == 1 and "assert" in source, (
                f"a derivation is compared with the module:\n{source}"
            )


def test_nothing_is_imported_and_not_used_or_used_privately(notebook):
    nodes = [node for source, _ in code_cells(notebook) for node in ast.walk(ast.parse(source))]
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    aliases = [a for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for a in node.names]
    bound = {alias.asname or alias.name.split(".")[0] for alias in aliases}
    assert bound <= used, bound - used
    assert not [name for name in bound if name.startswith("_")]


def test_paths_are_never_built(notebook):
    for source, tags in code_cells(notebook):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "parameters" not in tags:
                assert not node.value.startswith(("results/", "/", "../", "config/")), node.value
        assert "pathlib" not in source and "os.path" not in source


def test_starts_with_provenance_and_ends_with_a_manifest(notebook):
    sources = [source for source, _ in code_cells(notebook)]
    starts = [source for source in sources if "start(" in source and "job =" in source]
    assert len(starts) == 1 and f'"{notebook.stem}"' in starts[0]
    for name in parameters(notebook):
        assert f"{name}={name}" in starts[0] or name == "seed", f"start() must record {name}"
    assert sources[-1] == "job.finish()"


def test_claims_are_asserted(notebook):
    nodes = [node for source, _ in code_cells(notebook) for node in ast.walk(ast.parse(source))]
    assert any(isinstance(node, ast.Assert) for node in nodes)


def test_what_is_saved_is_what_the_workflow_expects(notebook):
    """Literal result names in job.write/save_* calls against the Snakefile's named outputs."""
    saved = set()
    for source, _ in code_cells(notebook):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner, method = node.func.value, node.func.attr
                if (
                    isinstance(owner, ast.Name)
                    and owner.id == "job"
                    and (method == "write" or method.startswith("save_"))
                ):
                    saved.add(node.args[0].value)
    (rule,) = [rule for rule, (name, _) in NOTEBOOKS.items() if name == notebook.stem]
    snakefile = (FOLDER.parent / "Snakefile").read_text(encoding="utf-8")
    (body,) = re.findall(rf"\n(?:rule|use rule \w+ as) {rule}(?: with)?:(.*?)\n\n", snakefile, re.S)
    body = body.split("output:")[1].split("log:")[0]
    while (flat := re.sub(r"\([^()]*\)", "", body)) != body:  # arguments of report(...) are no outputs
        body = flat
    assert saved == set(re.findall(r"(\w+)=", body))
