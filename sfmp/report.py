"""Closing steps of the workflow: executed notebooks to HTML, the summary and the table of costs, publication.

``python -m sfmp.report html|summary|publish``; called by the Snakefile.
"""

from __future__ import annotations

import argparse
import html
import json
import shutil
from pathlib import Path

from sfmp.checks import SfmpError, write_atomically
from sfmp.design import load_design, read_yaml
from sfmp.readme import update_readme
from sfmp.workflow import closing_words

PUBLISHED = (".csv", ".md", ".png")
LARGEST_FILE, LARGEST_TOTAL = 300_000, 2_000_000  # bytes of committed evidence


def render_notebooks(logs: Path, index: Path) -> list[Path]:
    """Render every executed notebook under `logs` to HTML beside `index`, and write the page that links them.

    Parameters
    ----------
    logs : Path
        Folder of executed notebooks, searched recursively.
    index : Path
        ``index.html`` to write.

    Returns
    -------
    list of Path
        The pages, in the order of the index.

    Raises
    ------
    SfmpError
        If there is no executed notebook.
    """
    import nbformat
    from nbconvert import HTMLExporter

    sources = sorted(logs.rglob("*.ipynb"))
    if not sources:
        raise SfmpError(
            f"{logs}: expected executed notebooks, found none; run the workflow first (snakemake)"
        )
    exporter = HTMLExporter(template_name="basic")
    pages = []
    for source in sources:
        body, _ = exporter.from_notebook_node(nbformat.read(source, as_version=4))
        page = index.parent / source.relative_to(logs).with_suffix(".html")
        title = source.relative_to(logs).with_suffix("").as_posix()
        _write(page, _page(title, body))
        pages.append(page)
    links = "".join(
        f'<li><a href="{page.relative_to(index.parent).as_posix()}">'
        f"{html.escape(page.relative_to(index.parent).with_suffix('').as_posix())}</a></li>\n"
        for page in pages
    )
    _write(index, _page("Executed notebooks", f"<h1>Executed notebooks</h1>\n<ul>\n{links}</ul>"))
    print(f"{len(pages)} pages under {index.parent}")
    return pages


STYLE = """body{max-width:60em;margin:2em auto;padding:0 1em;font:16px/1.5 sans-serif;color:#222}
pre{background:#f6f6f6;padding:.6em;overflow-x:auto;font-size:13px}img{max-width:100%}
table{border-collapse:collapse;font-size:13px}td,th{padding:.2em .6em;text-align:right;
border-bottom:1px solid #ddd}
.jp-InputPrompt,.jp-OutputPrompt,.prompt{color:#999;font-size:11px}"""


def _page(title: str, body: str) -> str:
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def publish(results: Path, reference: Path) -> list[Path]:
    """Copy tables, claims and figures, and one line per manifest, to the folder that git tracks.

    Raises
    ------
    SfmpError
        If a result has no manifest, or the evidence is too large to commit.
    """
    files = [
        path
        for folder in ("tables", "figures")
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
    sizes = {path: path.stat().st_size for path in files}
    large = [f"{path} ({size} bytes)" for path, size in sizes.items() if size > LARGEST_FILE]
    if large or sum(sizes.values()) > LARGEST_TOTAL:
        raise SfmpError(
            f"evidence too large to commit ({sum(sizes.values())} bytes in all): {large}; expected at most "
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
    lines = [
        json.dumps(json.loads(path.read_text()))
        for path in manifests
        if path.parent.name in ("tables", "figures") or path.name.startswith("claims")
    ]
    _write(reference / "manifests.jsonl", "\n".join(lines) + "\n")
    print(f"{len(copies)} files copied to {reference}; review and commit them")
    return copies


def write_cost(timings: list[Path], output: Path) -> None:
    """Write the table of times and peak memory of the runs that were timed alone."""
    from sfmp.tables import cost_table

    _write(output, cost_table(timings).to_csv(index=False, lineterminator="\n"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sfmp.report", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    pages = commands.add_parser("html", help="render the executed notebooks")
    pages.add_argument("--logs", type=Path, required=True)
    pages.add_argument("--index", type=Path, required=True)
    summary = commands.add_parser("summary", help="write the closing summary and the table of costs")
    summary.add_argument("--tier", required=True)
    summary.add_argument("--text", type=Path, required=True)
    summary.add_argument("--cost", type=Path, required=True)
    summary.add_argument("--timing", type=Path, nargs="*", default=[])
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
        write_cost(arguments.timing, arguments.cost)
        _write(arguments.text, closing_words(design) + "\n")


if __name__ == "__main__":
    main()
