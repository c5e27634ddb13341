"""Closing steps of the workflow: executed notebooks to HTML, the summary, publication.

``python -m sfmp.report html|summary|publish``; called by the Snakefile.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import re
import shutil
from pathlib import Path

from sfmp.checks import SfmpError, write_atomically
from sfmp.design import load_design, read_yaml
from sfmp.readme import update_readme
from sfmp.workflow import NOTEBOOKS, closing_words

PUBLISHED = (".csv", ".md", ".png")
LARGEST_FILE, LARGEST_TOTAL = 500_000, 3_900_000  # bytes of committed evidence
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", re.S)


def render_notebooks(logs: Path, index: Path) -> list[Path]:
    """Render every executed notebook under `logs` to HTML beside `index`, and write the page that links them.

    The pages need no network: figures are inside, formulas are MathML.

    Parameters
    ----------
    logs : Path
        Folder of executed notebooks, searched recursively.
    index : Path
        ``index.html`` to write.

    Returns
    -------
    list of Path
        The pages, in the order of the index: that of the pipeline, then by name.

    Raises
    ------
    SfmpError
        If there is no executed notebook.
    """
    import nbformat
    from nbconvert import HTMLExporter

    steps = list(NOTEBOOKS)
    found = {path: path.relative_to(logs).with_suffix("").parts for path in logs.rglob("*.ipynb")}
    known = {path: parts for path, parts in found.items() if parts[0] in steps}
    sources = sorted(known, key=lambda path: (steps.index(known[path][0]), path))
    if not sources:
        raise SfmpError(
            f"{logs}: expected executed notebooks, found none; run the workflow first (snakemake)"
        )
    exporter = HTMLExporter(template_name="basic")
    pages, links = [], {}
    for source in sources:
        notebook = nbformat.read(source, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = FORMULA.sub(_mathml, cell.source)
        body, _ = exporter.from_notebook_node(notebook)
        page = index.parent / source.relative_to(logs).with_suffix(".html")
        step, *run = known[source]
        title = html.escape(" ".join([NOTEBOOKS[step][0], *run]))
        back = Path(os.path.relpath(index, page.parent)).as_posix()
        _write(page, _page(title, f'<p><a href="{back}">all notebooks</a></p>\n{body}'))
        link = f'<a href="{page.relative_to(index.parent).as_posix()}">{title}</a>'
        links.setdefault(step, []).append(link)
        pages.append(page)
    lists = "".join(map(_list, links, links.values()))
    _write(index, _page("Executed notebooks", f"<h1>Executed notebooks</h1>\n{lists}"))
    print(f"{len(pages)} pages under {index.parent}")
    return pages


def _list(step: str, links: list[str]) -> str:
    """Links to the pages of one notebook; many are folded under one line."""
    if len(links) == 1:
        return f"<p>{links[0]}</p>\n"
    items = "\n".join(f"<li>{link}</li>" for link in links)
    return f"<details><summary>{NOTEBOOKS[step][0]}: {len(links)} runs</summary><ul>\n{items}\n</ul></details>\n"


def _mathml(formula: re.Match) -> str:
    """A formula as MathML, which browsers draw without a script and without a network."""
    from latex2mathml.converter import convert

    block, inline = formula.groups()
    return convert(block or inline, display="block" if block else "inline")


EVIDENCE = ("tables", "figures", "timing")  # folders whose own files are published; timing alone holds clock readings

STYLE = """body{max-width:60em;margin:2em auto;padding:0 1em;font:16px/1.5 sans-serif;color:#222}
pre{background:#f6f6f6;padding:.6em;overflow-x:auto;font-size:13px}img{max-width:100%}
table{border-collapse:collapse;font-size:13px}td,th{padding:.2em .6em;text-align:right;
border-bottom:1px solid #ddd}
summary{margin:.6em 0;cursor:pointer}math[display=block]{margin:1em 0}.anchor-link{display:none}
.jp-InputPrompt,.jp-OutputPrompt,.prompt{color:#999;font-size:11px}"""


def _page(title: str, body: str) -> str:
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def publish(results: Path, reference: Path) -> list[Path]:
    """Copy tables, claims, figures and costs, and one line per execution of a notebook, to the folder that git tracks.

    Raises
    ------
    SfmpError
        If a result has no manifest, or the evidence is too large to commit.
    """
    files = [
        path
        for folder in EVIDENCE
        for path in sorted((results / folder).glob("*"))
        if path.suffix in PUBLISHED
    ] + [results / "claims.csv"]
    manifests = sorted(results.rglob("*.manifest.json"))
    described = {output["path"] for path in manifests for output in json.loads(path.read_text())["outputs"]}
    orphans = [str(path) for path in files if path.as_posix() not in described]
    if orphans:
        raise SfmpError(
            f"{orphans}: no manifest says how these came about; rerun their rules before publishing"
        )
    small = [path for path in manifests if path.parent.name in EVIDENCE or path.name.startswith("claims")]
    # An execution writes the same manifest beside each of its results.
    lines = "".join(dict.fromkeys(json.dumps(json.loads(path.read_text())) + "\n" for path in small))
    sizes = {path: path.stat().st_size for path in files}
    large = [f"{path} ({size} bytes)" for path, size in sizes.items() if size > LARGEST_FILE]
    total = sum(sizes.values()) + len(lines)
    if large or total > LARGEST_TOTAL:
        raise SfmpError(
            f"evidence too large to commit ({total} bytes in all): {large}; expected at most "
            f"{LARGEST_FILE} bytes a file and {LARGEST_TOTAL} in all"
        )
    if reference.is_dir():
        shutil.rmtree(reference)
    copies = []
    for path in files:
        copy = reference / path.relative_to(results)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        copies.append(copy)
    _write(reference / "manifests.jsonl", lines)
    print(f"{len(copies)} files copied to {reference}; review and commit them")
    return copies


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sfmp.report", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    pages = commands.add_parser("html", help="render the executed notebooks")
    pages.add_argument("--logs", type=Path, required=True)
    pages.add_argument("--index", type=Path, required=True)
    summary = commands.add_parser("summary", help="write the closing summary")
    summary.add_argument("--tier", required=True)
    summary.add_argument("--text", type=Path, required=True)
    publication = commands.add_parser("publish", help="copy the evidence to results/reference")
    publication.add_argument("--tier", required=True)
    arguments = parser.parse_args()
    if arguments.command == "html":
        render_notebooks(arguments.logs, arguments.index)
    elif arguments.command == "publish":
        publish(Path("results") / arguments.tier, Path("results/reference") / arguments.tier)
        if arguments.tier == "embedded":
            update_readme(Path("README.md"), Path("results/reference/embedded"))
    else:
        design = load_design({**read_yaml(Path("config/config.yaml")), "tier": arguments.tier})
        _write(arguments.text, closing_words(design) + "\n")


if __name__ == "__main__":
    main()
