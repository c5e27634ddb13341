"""Zero-shot tasks on the embedded model: four-way multiple-choice items built at run time from held-out Python
modules.

``next_line``   the line that follows, against other lines of the same file with the same indentation.
``identifier``  the name used next, against other names in sight, all of which occur earlier in the context.
``docstring``   the code that follows a signature and its documentation, against that of other functions of the file.

Items are a function of (documents, seed) only. They run through lm-eval like any other task (:mod:`sfmp.evaluate`).
"""

from __future__ import annotations

import ast
import random
import re
from collections import defaultdict
from collections.abc import Iterable

from sfmp.corpus import Document, stdlib_documents
from sfmp.spec import SfmpError

CHOICES = 4
CONTEXT_LINES = 4  # lines of code before the question
ITEMS = 300

Item = dict[str, object]  # built: question, choices (4 str), answer (index); candidate: question, right, wrong (pool)


def next_line_items(document: Document) -> Iterable[Item]:
    """Yield items that ask for the next line; choices are distinct lines of equal indentation, 12 to 60 characters
    long."""
    lines = document.text.splitlines()
    by_indent = defaultdict(list)
    for line in sorted(set(filter(_is_code, lines))):
        by_indent[_indent(line)].append(line)
    for position in range(CONTEXT_LINES, len(lines)):
        line = lines[position]
        if not _is_code(line):
            continue
        rivals = by_indent[_indent(line)]  # shared: the line itself is among them
        context = lines[position - CONTEXT_LINES : position]
        if len(rivals) >= CHOICES and line not in context and all(x.strip() for x in context[-2:]):
            yield {"question": "\n".join(context) + "\n", "right": line, "wrong": rivals}


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
            yield {"question": context, "right": node.id, "wrong": sorted(names)}


def docstring_items(document: Document) -> Iterable[Item]:
    """Yield items that ask for the first line of a function's body, given its signature and docstring."""
    lines = document.text.splitlines()
    found = {}  # signature and docstring → first line of the body
    for node in ast.walk(ast.parse(document.text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            question = "\n".join(lines[node.lineno - 1 : node.body[0].end_lineno]) + "\n"
            right = lines[node.body[1].lineno - 1]
            if len(question) <= 800 and len(right) <= 100:
                found[question] = right
    firsts = sorted(set(found.values()))
    if len(firsts) >= CHOICES:
        yield from ({"question": question, "right": right, "wrong": firsts} for question, right in found.items())


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
    wrong = [choice for choice in item["wrong"] if choice != item["right"]]
    choices = [item["right"], *rng.sample(wrong, CHOICES - 1)]
    rng.shuffle(choices)
    return {"question": item["question"], "choices": choices, "answer": choices.index(item["right"])}


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _is_code(line: str) -> bool:
    return 12 <= len(line.strip()) and len(line) <= 60 and not line.lstrip().startswith(("#", '"""', "'''"))
