"""Hash of the code a notebook runs: the syntax trees of every module of this repository it reaches by import.

Snakemake sees a notebook change, but not a change in the modules the notebook imports; this hash goes into a
rule's ``params`` so that a real edit reruns the rule, and an edit of comments, docstrings or layout does not.
"""

from __future__ import annotations

import ast
import hashlib
import json
from functools import cache
from pathlib import Path

from sfmp.checks import SfmpError

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("sfmp", "kernels_numba")

# Modules that decide what runs and how it is shown, never a number: an edit there must not rerun hours.
BYSTANDERS = frozenset(
    {
        "sfmp",
        "sfmp.workflow",
        "sfmp.design",
        "sfmp.environment",
        "sfmp.locks",
        "sfmp.code_hash",
        "sfmp.report",
        "sfmp.provenance",
        "sfmp.notebook_paths",
    }
)


def _path(module: str) -> Path | None:
    """File of a module of this repository, None for anything else."""
    if module.split(".")[0] not in PACKAGES:
        return None
    stem = ROOT.joinpath(*module.split("."))
    for path in (stem.with_suffix(".py"), stem / "__init__.py"):
        if path.is_file():
            return path
    return None


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def _public_names() -> dict[str, str]:
    """Lazy names of ``sfmp/__init__.py``: name → module (the literal ``_PUBLIC`` there)."""
    for node in _tree(ROOT / "sfmp" / "__init__.py").body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_PUBLIC":
            return {name: f"sfmp.{module}" for name, module in ast.literal_eval(node.value).items()}
    return {}


def imported_modules(tree: ast.AST, module: str = "", is_package: bool = False) -> set[str]:
    """Modules of this repository that a syntax tree imports, anywhere in it (function bodies included).

    Parameters
    ----------
    tree : ast.AST
    module : str
        Dotted name of the file the tree comes from, to resolve relative imports.
    is_package : bool
        Whether that file is an ``__init__.py``.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base] if base else parts)
            names = [base] + [f"{base}.{alias.name}" for alias in node.names]
            if base == "sfmp":
                names += [_public_names().get(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "sfmp":
            names = [f"sfmp.{node.attr}", _public_names().get(node.attr, "")]
        else:
            continue
        found.update(name for name in names if name and _path(name))
    return found


def closure(roots: set[str]) -> list[str]:
    """Every module of this repository reachable by import from `roots`, sorted, bystanders left out."""
    todo, seen = set(roots), set()
    while todo:
        name = todo.pop()
        if name in seen or name in BYSTANDERS:
            continue
        seen.add(name)
        path = _path(name)
        if path is None:
            raise SfmpError(
                f"code hash: module {name} has no file under {', '.join(PACKAGES)}; correct its name"
            )
        todo |= imported_modules(_tree(path), name, path.name == "__init__.py") - seen
    return sorted(seen)


def _strip_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
    return tree


@cache
def module_hash(module: str) -> str:
    """Return the sha256 of one module's syntax tree without docstrings, comments and positions."""
    tree = _strip_docstrings(ast.parse(_path(module).read_text(encoding="utf-8")))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


@cache
def code_hash(*modules: str) -> str:
    """Hash of the import closure of one or more modules.

    Examples
    --------
    >>> len(code_hash("sfmp.spec"))
    16

    Raises
    ------
    SfmpError
        If a module does not exist in this repository.
    """
    lines = [f"{name} {module_hash(name)}" for name in closure(set(modules))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def notebook_source(path: Path) -> str:
    """Python source of a notebook's code cells (lines of magics dropped, so that it parses)."""
    try:
        cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SfmpError(
            f"{path}: expected a Jupyter notebook (nbformat 4), found {error!r}; restore the file"
        ) from error
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return "\n".join(line for line in code.splitlines() if not line.lstrip().startswith(("%", "!")))


def notebook_hash(path: Path) -> str:
    """Hash of the modules a notebook reaches by import; the notebook itself is a rule's input."""
    try:
        tree = ast.parse(notebook_source(path), filename=str(path))
    except SyntaxError as error:
        raise SfmpError(
            f"{path}: its code cells are not valid Python ({error.msg}: {error.text!r}); correct the notebook"
        ) from error
    roots = imported_modules(tree) - BYSTANDERS
    return code_hash(*sorted(roots))
