"""What the notebooks of tables and claims read: declared result files, or those of the embedded tier."""

from __future__ import annotations

from sfmp.checks import SfmpError
from sfmp.claims import load_tables
from sfmp.provenance import base_directory
from sfmp.records import load_results
from sfmp.tables import read_paper_values

EMBEDDED = {
    "runs": "config/runs.tsv",
    "paper": "config/paper_values.tsv",
    "claims": "config/claims.tsv",
    "evals": "results/embedded/eval",
    "quantized": "results/embedded/quantized",
    "tables": ["results/embedded/tables", "results/embedded/timing"],
    "cpu_bench": "results/reference/cpu/bench.json",
    "timing": [f"results/embedded/timing/{part}" for part in ("quantization", "rival", "salience")],
}


def declared(run, name: str):
    """Path, or list of paths, of a results input; of the embedded tier where the notebook was given none."""
    if name in run.inputs:
        return run.inputs[name]
    named = EMBEDDED[name]
    paths = [base_directory() / path for path in ([named] if isinstance(named, str) else named)]
    if missing := [path for path in paths if not path.exists()]:
        raise SfmpError(
            f"{missing[0]}: expected the results of the embedded tier, found none; run `snakemake --cores 8` first."
        )
    return paths[0] if isinstance(named, str) else paths


def results(run):
    """The design joined with every evaluation and record of quantization
    (:func:`sfmp.records.load_results`).
    """
    return load_results(declared(run, "runs"), declared(run, "evals"), declared(run, "quantized"))


def paper_values(run):
    """Numbers transcribed from the paper (:func:`sfmp.tables.read_paper_values`)."""
    return read_paper_values(declared(run, "paper"))


def tables(run, **more):
    """Every result table by name (:func:`sfmp.claims.load_tables`), and frames computed on the spot."""
    found = declared(run, "tables")
    return load_tables(found if isinstance(found, list) else [found], **more)
