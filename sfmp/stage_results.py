"""What the notebooks of tables and claims read: declared result files, or those of the embedded tier."""

from __future__ import annotations

from sfmp.checks import SfmpError
from sfmp.claims import load_tables
from sfmp.gpu_evidence import COMMANDS, read_evidence
from sfmp.notebook_paths import GPU_FOLDER, base_directory
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
    "memory_bench": "results/reference/cpu/memory.json",
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


def gpu_evidence(run) -> dict[str, dict]:
    """What was measured on a GPU (:func:`sfmp.gpu_evidence.read_evidence`): the inputs `gpu_kernels` and `gpu_decode`.

    The committed files where the notebook was given neither; {} while there are none.
    """
    given = {name: run.inputs[f"gpu_{name}"] for name in COMMANDS if f"gpu_{name}" in run.inputs}
    committed = {name: base_directory() / GPU_FOLDER / f"{name}.json" for name in COMMANDS}
    return read_evidence(given or {name: path for name, path in committed.items() if path.exists()})


def tables(run, **more):
    """Every result table by name (:func:`sfmp.claims.load_tables`), and frames computed on the spot."""
    found = declared(run, "tables")
    return load_tables(found if isinstance(found, list) else [found], **more)
