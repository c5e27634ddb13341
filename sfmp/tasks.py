"""Zero-shot tasks on the embedded model: four-way multiple-choice items built at run time from held-out Python
modules.

``next_line``   the line that follows, against other lines of the same file with the same indentation.
``identifier``  the name used next, against other names in sight, all of which occur earlier in the context.
``docstring``   the first line of a function's documentation, against those of other functions of the module.

Items are a function of (documents, seed) only. They run through lm-eval like any other task (:mod:`sfmp.evaluate`).
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterable

from sfmp.corpus import Document, stdlib_documents
from sfmp.spec import SfmpError

CHOICES = 4
CONTEXT_LINES = 5  # lines of code before the question
ITEMS = 300

Item = dict[str, object]  # {"question": str, "choices": [str] * 4, "answer": int}


def next_line_items(document: Document) -> Iterable[Item]:
    """Yield items that ask for the next line; choices are distinct lines of equal indentation, 12 to 60 characters
    long."""
    lines = document.text.splitlines()
    for position in range(CONTEXT_LINES, len(lines)):
        line = lines[position]
        if not _is_code(line):
            continue
        indent = len(line) - len(line.lstrip())
        rivals = {x for x in lines if _is_code(x) and len(x) - len(x.lstrip()) == indent and x != line}
        context = lines[position - CONTEXT_LINES : position]
        if len(rivals) >= CHOICES - 1 and line not in context and all(x.strip() for x in context[-2:]):
            yield {"question": "\n".join(context) + "\n", "right": line, "wrong": sorted(rivals)}


def identifier_items(document: Document) -> Iterable[Item]:
    """Yield items that ask for the name used next; right and wrong names all stand in the context (its topic is no
    help)."""
    lines = document.text.splitlines()
    for node in ast.walk(ast.parse(document.text)):
        if not isinstance(node, ast.Name) or node.lineno <= CONTEXT_LINES or not lines[node.lineno - 1].isascii():
            continue
        line = lines[node.lineno - 1]
        context = "\n".join([*lines[node.lineno - 1 - CONTEXT_LINES : node.lineno - 1], line[: node.col_offset]])
        names = {name for name in re.findall(r"[A-Za-z_]\w{2,}", context) if name not in _WORDS}
        if node.id in names and len(names) >= CHOICES and line[: node.col_offset].strip():
            yield {"question": context, "right": node.id, "wrong": sorted(names - {node.id})}


def docstring_items(document: Document) -> Iterable[Item]:
    """Yield items that ask for the first line of a function's docstring, given its signature."""
    lines = document.text.splitlines()
    nodes = ast.walk(ast.parse(document.text))
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(n)]
    firsts = {ast.get_docstring(n).splitlines()[0].strip() for n in functions}
    firsts = {text for text in firsts if 10 <= len(text) <= 100}
    for node in functions:
        text = ast.get_docstring(node).splitlines()[0].strip()
        header = "\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1])
        if text in firsts and len(firsts) >= CHOICES and len(header) <= 300:
            indent = " " * node.body[0].col_offset
            yield {"question": f'{header}\n{indent}"""', "right": text, "wrong": sorted(firsts - {text})}


TASKS = {"next_line": next_line_items, "identifier": identifier_items, "docstring": docstring_items}
_WORDS = frozenset(
    "and for not del try def self None True False else elif from with while class return import raise pass the".split()
)


def build(task: str, items: int = ITEMS, seed: int = 0, documents: list[Document] | None = None) -> list[Item]:
    """Build the items of one task.

    Parameters
    ----------
    task : {"next_line", "identifier", "docstring"}
    items : int
        Number of items, drawn evenly at random from all that the documents offer.
    seed : int
        Fixes the draw, the wrong choices and the position of the right one.
    documents : list of Document, optional
        The evaluation split of the standard library by default.

    Returns
    -------
    list of dict
        ``question`` (str), ``choices`` (four distinct str), ``answer`` (index of the right one).

    Raises
    ------
    SfmpError
        If the task is unknown or the documents offer fewer items than asked for.
    """
    if task not in TASKS:
        raise SfmpError(f"task {task!r}: expected one of {', '.join(TASKS)}; choose one")
    documents = stdlib_documents("evaluation") if documents is None else documents
    candidates = [item for document in documents for item in TASKS[task](document)]
    if len(candidates) < items:
        raise SfmpError(
            f"task {task!r}: expected {items} items, found {len(candidates)} in {len(documents)} documents; ask "
            "for fewer or add text"
        )
    rng = random.Random(f"{task}:{seed}")
    return [_shuffled(item, rng) for item in rng.sample(candidates, items)]


def _shuffled(item: Item, rng: random.Random) -> Item:
    choices = [item["right"], *rng.sample(item["wrong"], CHOICES - 1)]
    rng.shuffle(choices)
    return {"question": item["question"], "choices": choices, "answer": choices.index(item["right"])}


def _is_code(line: str) -> bool:
    return 12 <= len(line.strip()) and len(line) <= 60 and not line.lstrip().startswith(("#", '"""', "'''"))
