"""The text every Python machine already has: the installed library itself, read at run time.

Nothing of it is stored in the repository. The unit of the split is a top-level standard-library module (``json``,
``asyncio``…): the sha256 of its *name* decides whether it is training, calibration or evaluation text, so every
machine draws the same line. Packages installed with the environment are training text only, and whatever repeats
held-out lines (back-ports, vendored copies) is left out of training.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import string
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Generated tables, editors, tests, and modules that newer Python versions dropped: no use as text, or not on every
# machine.
SKIPPED_MODULES = frozenset(
    """test idlelib lib2to3 turtledemo ensurepip encodings distutils asynchat asyncore imp smtpd antigravity this
    pydoc_data""".split()
)
SKIPPED_FOLDERS = frozenset("test tests testing _testing site-packages __pycache__ _vendor vendor data".split())
# Import names of packages pinned in requirements.lock whose code reads like library Python.
PACKAGES = tuple(
    """numpy scipy pandas matplotlib sklearn sympy networkx sqlalchemy seaborn numba torch transformers datasets
    huggingface_hub accelerate snakemake papermill nbconvert nbformat nbclient jupyter_server IPython ipykernel
    traitlets tornado aiohttp jinja2 click docutils fsspec jedi parso joblib mpmath nltk pydantic hypothesis _pytest
    rich prompt_toolkit requests urllib3 yaml pyparsing fontTools PIL git typer anyio httpx dill multiprocess evaluate
    lm_eval safetensors psutil dateutil narwhals bs4 markdown_it attr cloudpickle tqdm packaging filelock jsonschema
    referencing babel""".split()
)
PACKAGE_BYTES = 6_000_000  # no package may dominate: at most this much of each
FILE_BYTES = 300_000  # longer files are tables more often than programs
SPLITS = ("train", "calibration", "evaluation")
_ASCII_LETTERS = string.ascii_letters.encode()


@dataclass(frozen=True)
class Document:
    """One source file: ``name`` is its dotted module name, ``text`` its content."""

    name: str
    text: str


def split_of(module: str) -> str:
    """Say which split a top-level standard-library module belongs to.

    Parameters
    ----------
    module : str
        Top-level name; only the name is hashed, never the content, so the split is the same for every Python version.

    Returns
    -------
    str
        ``"train"`` (12 of 16 on average), ``"calibration"`` (1 of 16) or ``"evaluation"`` (3 of 16).

    Examples
    --------
    >>> split_of("json") == split_of("json")
    True
    """
    bucket = hashlib.sha256(module.encode()).digest()[0] % 16
    return {0: "calibration", 1: "evaluation", 5: "evaluation", 6: "evaluation"}.get(bucket, "train")


def stdlib_documents(split: str) -> list[Document]:
    """Read the standard-library modules of one split, sorted by dotted name.

    Parameters
    ----------
    split : {"train", "calibration", "evaluation"}

    Returns
    -------
    list of Document
        For ``"train"`` this includes the interpreter's own help topics (``pydoc_data``).
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(sys.stdlib_module_names - SKIPPED_MODULES)
    documents = [doc for name in names if split_of(name) == split for doc in _module_documents(root, name)]
    if split == "train":
        documents += _help_topics(root)
    return documents


def package_documents(packages: Iterable[str] = PACKAGES) -> list[Document]:
    """Read the code of installed packages (training text only), at most ``PACKAGE_BYTES`` of each, sorted by name.

    A package that is not installed is passed over: the corpus is what the environment has.
    """
    documents = []
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        root, used = Path(spec.submodule_search_locations[0]), 0
        # By hash of the path rather than alphabetically, so that a capped package is sampled over all its parts.
        for path in sorted(
            _python_files(root), key=lambda p: hashlib.sha256(str(p.relative_to(root)).encode()).digest()
        ):
            text = _read(path)
            if text and used + len(text) <= PACKAGE_BYTES:
                used += len(text)
                documents.append(Document(_dotted(package, path.relative_to(root)), text))
    return sorted(documents, key=lambda doc: doc.name)


def without_copies(documents: Iterable[Document], held_out: Iterable[Document], share: float = 0.05) -> list[Document]:
    """Drop documents that repeat held-out text.

    Parameters
    ----------
    documents, held_out : iterable of Document
    share : float
        A document goes when more than this share of its long lines (32 characters and more, stripped), and at least
        four of them, stand in a held-out one.

    Returns
    -------
    list of Document
    """
    seen = {line for doc in held_out for line in _long_lines(doc.text)}
    return [doc for doc in documents if not _copies(doc, seen, share)]


def _copies(doc: Document, seen: set[str], share: float) -> bool:
    lines = list(_long_lines(doc.text))
    repeated = sum(line in seen for line in lines)
    return repeated >= 4 and repeated > share * len(lines)


def _long_lines(text: str) -> Iterator[str]:
    return (line for line in map(str.strip, text.splitlines()) if len(line) >= 32)


def _module_documents(root: Path, name: str) -> list[Document]:
    files = _python_files(root / name) if (root / name).is_dir() else [root / f"{name}.py"]
    found = ((path, _read(path)) for path in sorted(files) if path.is_file())
    return [Document(_dotted("", path.relative_to(root)), text) for path, text in found if text]


def _python_files(root: Path) -> Iterator[Path]:
    for path in root.rglob("*.py"):
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts[:-1]) and path.stat().st_size <= FILE_BYTES:
            yield path


def _read(path: Path) -> str:
    """Return the file as text, or "" where it is no program in UTF-8: another encoding, a stub, generated one-liners,
    a table of numbers."""
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        return ""
    lines, letters = text.count("\n") + 1, len(text) - len(text.encode().translate(None, _ASCII_LETTERS))
    return text if len(text) >= 200 and len(text) / lines <= 80 and letters >= len(text) / 2 else ""


def _help_topics(root: Path) -> list[Document]:
    path = root / "pydoc_data" / "topics.py"
    if not path.is_file():
        return []
    tree = ast.parse(path.read_text("utf-8"))
    topics = next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
    return [Document(f"help.{name}", text) for name, text in sorted(topics.items())]


def _dotted(prefix: str, relative: Path) -> str:
    parts = [prefix, *relative.with_suffix("").parts] if prefix else list(relative.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
