"""What the Snakefile calls: inputs, logs and parameters of rules, resource caps, closing words. No torch."""

from __future__ import annotations

import json
import math
import re
import sys
from functools import partial
from pathlib import Path

from sfmp.checks import SfmpError
from sfmp.code_hash import code_hash, notebook_hash
from sfmp.design import FP, RIVALS, Design, load_design, rival_settings, run_spec
from sfmp.environment import available_cores, available_memory_mb
from sfmp.locks import leave_lock, own_mark, take_lock
from sfmp.notebook_paths import GPU_FOLDER
from sfmp.tiers import TEXTS, begin, check_ready, closing_words, environment, local_files

__all__ = [
    "FIGURES", "NOTEBOOKS", "RUN_NOTEBOOK", "Rules", "SOURCES", "TABLES", "available_cores", "begin", "check_ready",
    "closing_words", "code_hash", "job_threads", "leave_lock", "load_design", "notebook_params", "own_mark",
    "shell_prefix", "stage_code", "take_lock",
]

SOURCES = ("fisher", "magnitude", "activation", "guided", "random")

# Results that are the same to the byte in every run; what reads clocks goes to timing/ (rule e5).
TABLES = (
    "e1_main", "e1_bytes", "e3_reorder", "e3_block", "e3_group", "e3_levels", "e3_salience", "e3_objective", "e3_scope",
    "e3_granularity", "e3_guided", "e3_quantizer", "packing", "lut_gemm", "lut_gemm_simulated", "lut_gemm_traffic",
    "integration", "concentration", "allocation", "allocation_oracle", "mlp_experiment", "guided_agreement",
    *(f"e4_cpu_{part}" for part in ("products", "fits", "reordering", "batches", "crossovers", "accuracy", "widths",
                                    "decoding", "targets", "conditions")),
    *(f"e5_memory_{part}" for part in ("conditions", "sizes", "depth", "steps", "bytes")),
    *(f"e4_gpu_{part}" for part in ("conditions", "products", "fits", "layouts", "reordering", "batches", "crossovers",
                                    "widths", "accuracy", "host", "decoding", "predictions", "targets")),
)
FIGURES = (
    "overview", "salience_before_after", "bit_map", "bits_by_layer", "accuracy_vs_bpw", "perplexity_vs_bpw",
    "retention_vs_bpw", "reorder", "block_shape", "group_size", "levels", "salience_source", "objective", "scope",
    "granularity", "guided", "quantizer", "mlp_curves", "kernel_peers", "kernel_bits", "kernel_batch",
    "kernel_accuracy", "table_width", "decode_speed", "memory_traffic", "gpu_bits", "gpu_kernels", "memory",
)

# rule → (notebook, parameters beyond out, inputs, seed and tier); a test compares it with the notebooks.
NOTEBOOKS = {
    "overview": ("00_start_here", ()),
    "calibration": ("01_calibration", ("model", "n_windows", "seqlen")),
    "salience": ("02_salience", ("model", "source")),
    "reordering": ("03_reordering", ("model", "spec")),
    "allocation": ("04_allocation", ("model", "spec")),
    "quantization": ("05_quantization", ("run", "model", "method", "spec", "budget")),
    "packing": ("06_packing", ()),
    "lut_gemm": ("07_lut_gemm", ()),
    "model_integration": ("08_model_integration", ()),
    "search": ("10_search", ("model", "knobs")),
    "rival": ("11_rivals", ("run", "model", "method", "settings", "knobs")),
    "evaluation": ("09_evaluation", ("run", "model", "tasks", "seqlen")),
    "e1": ("e1_accuracy", ()),
    "e3": ("e3_ablations", ()),
    "e4_cpu": ("e4_cpu", ()),
    "e4_gpu": ("e4_gpu", ()),
    "e5": ("e5_cost", ()),
    "e5_memory": ("e5_memory", ()),
    "e9": ("e9_claims", ()),
}
COMMON = ("out", "inputs", "seed", "tier")
# papermill without a checker of IRIs that jsonschema would import: half of papermill's start-up, in every job.
PAPERMILL = (
    "python -c \"import sys; sys.modules['rfc3987_syntax'] = None; "
    "from papermill.__main__ import papermill; papermill()\""
)
RUN_NOTEBOOK = (
    f"IPYTHONDIR={{resources.tmpdir:q}}/sfmp-ipython {PAPERMILL} {{input.notebook:q}} {{log.notebook:q}} "
    "-y {params.nb:q} -k python3 --no-progress-bar > {log.text:q} 2>&1"
)


def shell_prefix(design: Design) -> str:
    """Return what every job's shell starts with: this Python, one core, where models and data are (`sfmp.tiers`).

    The pools of PyTorch, BLAS and Numba must not multiply with the jobs that run together.
    """
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    return " ".join([
        f"set -euo pipefail; export PATH={str(Path(sys.executable).parent)!r}:$PATH SFMP_WORKFLOW={own_mark()}",
        *(f"{name}=1" for name in threads), "TOKENIZERS_PARALLELISM=false PYTHONHASHSEED=0",
        "PYTHONWARNINGS='ignore:IProgress not found'", f"{environment(design)}; ",
    ])


class Rules:
    """Inputs, logs and parameters that the rules of a tier share: the Snakefile names, this looks up.

    Methods whose argument is `wildcards` are input functions of Snakemake.
    """

    def __init__(self, design: Design):
        self.design = design

    @staticmethod
    def notebook(rule: str) -> str:
        """Path of the notebook of a rule."""
        return f"notebooks/{NOTEBOOKS[rule][0]}.ipynb"

    def logs(self, stem: str) -> dict[str, str]:
        """The executed notebook, a log so that it survives a failure, and what papermill printed."""
        return {
            name: f"{self.design.results}/logs/{stem}.{kind}"
            for name, kind in (("notebook", "ipynb"), ("text", "txt"))
        }

    def params(self, rule: str) -> dict:
        """Parameters of the notebook; its settings alone, and the hash of its modules: a change of either reruns it.

        Snakemake does not compare what is made from inputs and outputs, as `nb` is.
        """
        make = notebook_params(self.design, rule)
        params = {"nb": make, "settings": lambda wildcards: make(wildcards, {}, {}), "code": stage_code(rule)}
        # Revisions of models are in `settings`; those of data sets are in no notebook's parameters.
        used = {"calibration": TEXTS, "evaluation": self.design.config["tasks"]}.get(rule, ())
        known = [name for name in used if name in self.design.datasets and self.design.tier != "embedded"]
        return params | ({"data": {name: self.design.datasets[name]["revision"] for name in known}} if known else {})

    def model(self, wildcards) -> str:
        """Model of a rule whose wildcard is a model or a run; of others the showcase's."""
        run = getattr(wildcards, "run", self.design.showcase)
        return getattr(wildcards, "model", None) or self.design.runs[run]["model"]

    def texts(self, wildcards) -> dict[str, list[str]]:
        """Local copies of the texts of a tier that has them; nothing where they come from the Hub or from Python."""
        found = local_files(self.design, TEXTS)
        return {"texts": found} if found else {}

    def questions(self, wildcards) -> dict[str, list[str]]:
        """Local copies of the tasks of a run, as `texts`."""
        asked = self.design.config["tasks"] if self.design.runs[wildcards.run]["tasks"] == "yes" else []
        found = local_files(self.design, asked)
        return {"questions": found} if found else {}

    def memory(self, wildcards) -> int:
        """Megabytes of a job that holds the model: the tier's, or 7 bytes a parameter (weights, salience, a matrix)."""
        grows = 0 if self.design.tier == "embedded" else 7
        parameters = float(self.design.models[self.model(wildcards)]["parameters_m"])
        return max(self.design.config["job_mem_mb"], int(grows * parameters))

    def gpus(self, wildcards) -> int:
        """GPUs of a job that holds the model."""
        needed = int(self.design.models[self.model(wildcards)]["gpu_gb"])
        return math.ceil(needed / self.design.config.get("gpu_size_gb", 80))

    def weights(self, wildcards) -> list[str]:
        """Files of the repository that hold the weights of the model."""
        return self.design.weights(self.model(wildcards))

    def windows(self, kind: str):
        """Input function: the windows (calibration or evaluation) of the model."""
        return lambda wildcards: f"{self.design.results}/windows/{self.model(wildcards)}.{kind}.safetensors"

    def salience(self, wildcards) -> dict[str, str]:
        """Salience that the run is planned with; nothing for a rival that has its own."""
        source = self.design.runs[wildcards.run]["salience"]
        path = f"{self.design.results}/salience/{self.model(wildcards)}.{source}.safetensors"
        return {} if source == "-" else {"salience": path}

    def search(self, wildcards) -> dict[str, str]:
        """The search that a row of AMQ takes its bits from, and what it cost."""
        if self.design.runs[wildcards.run]["method"] != "amq":
            return {}
        results, model = self.design.results, self.model(wildcards)
        return {"search": f"{results}/search/{model}.json", "search_cost": f"{results}/timing/search/{model}.json"}

    def checkpoint(self, wildcards) -> dict[str, str]:
        """Checkpoint of a quantized run; nothing for the control."""
        quantized = wildcards.run in self.design.quantized
        return {"checkpoint": f"{self.design.results}/models/{wildcards.run}"} if quantized else {}

    def gpu_evidence(self, wildcards) -> dict[str, str]:
        """What was measured on a GPU: those of the two files that there are, none while nothing was measured."""
        folder = Path(self.design.config["gpu_bench"])
        found = {name: folder / f"{name}.json" for name in ("kernels", "decode") if (folder / f"{name}.json").is_file()}
        if not found and folder != Path(GPU_FOLDER):
            raise SfmpError(f"gpu_bench: expected kernels.json or decode.json in {folder}, found none; see README.md")
        return {f"gpu_{name}": str(path) for name, path in found.items()}

    @staticmethod
    def one_of(runs) -> str:
        """Constraint of the wildcard `run`: these runs and no others."""
        return "|".join(map(re.escape, runs)) or "(?!)"

    def timings(self) -> list[str]:
        """Where every quantized run, and every salience that one is planned with, says what it cost."""
        design, rows = self.design, [self.design.runs[run] for run in self.design.quantized]
        salience = sorted({(row["model"], row["salience"]) for row in rows if row["salience"] != "-"})
        return [
            *(f"{design.results}/timing/quantization/{run}.json" for run in design.planned),
            *(f"{design.results}/timing/rival/{run}.json" for run in design.rivals),
            *(f"{design.results}/timing/salience/{model}.{source}.json" for model, source in salience),
        ]

    def executed(self) -> list[str]:
        """Logs that become pages: every executed notebook, of the salience the showcase's."""
        design, stems = self.design, []
        searched = dict.fromkeys(row["model"] for row in design.runs.values() if row["method"] == "amq")
        several = {"calibration": design.models, "salience": [f"{design.showcase_model}.fisher"], "search": searched,
                   "quantization": design.planned, "rival": design.rivals, "evaluation": design.runs}
        for rule in NOTEBOOKS:
            stems += [f"{rule}/{one}" for one in several[rule]] if rule in several else [rule]
        return [self.logs(stem)["notebook"] for stem in stems]


def notebook_params(design: Design, rule: str):
    """Return the ``params`` function of a rule: the parameters of its notebook as one JSON string.

    Every named output becomes an entry of `out` (a figure by its PNG), every named input but `notebook`
    one of `inputs`.
    """
    if rule not in NOTEBOOKS:
        raise SfmpError(f"rule {rule!r} runs no notebook; expected one of {', '.join(NOTEBOOKS)}")
    return partial(_notebook_json, design, rule)


def _notebook_json(design: Design, rule: str, wildcards, input, output) -> str:
    run = getattr(wildcards, "run", design.showcase)
    row = design.runs[run]
    model = getattr(wildcards, "model", row["model"])
    rival = "amq" if rule == "search" else row["method"].removeprefix("sfmp-")
    seeded = row if hasattr(wildcards, "run") else None  # the row whose seed a run has
    if rule == "search":  # it serves the model's runs of AMQ, which refuse a search with another seed than theirs
        seeded = next((r for r in design.runs.values() if (r["method"], r["model"]) == (rival, model)), None)
    available = {
        "run": run,
        "model": design.models[model]["source"],
        "source": getattr(wildcards, "source", None),
        "method": row["method"],
        "spec": None if row["method"] in (FP, *RIVALS) else run_spec(row).to_dict(),
        "budget": row["budget"],
        "settings": rival_settings(row) if row["method"] in RIVALS else {},
        "knobs": design.knobs.get(rival, {}),
        "tasks": design.config["tasks"] if row["tasks"] == "yes" else [],
        "n_windows": design.config["n_windows"],
        "seqlen": design.config["seqlen"],
        "out": {name: _one_path(value) for name, value in output.items()},
        "inputs": {
            name: value if isinstance(value, str) else list(value)
            for name, value in input.items()
            if name != "notebook"
        },
        "seed": design.config["seed"] if seeded is None else int(seeded["seed"]),
        "tier": design.tier,
    }
    return json.dumps({name: available[name] for name in (*COMMON, *NOTEBOOKS[rule][1])})


def _one_path(value) -> str:
    """Path of an output; of a figure (PNG, SVG and CSV) the PNG."""
    if isinstance(value, str):
        return str(value)
    return next(str(path) for path in value if path.endswith(".png"))


def stage_code(rule: str, folder: Path | str = "notebooks") -> str:
    """Hash of the modules a rule's notebook reaches; "" while the notebook is missing (Snakemake says so)."""
    path = Path(folder) / f"{NOTEBOOKS[rule][0]}.ipynb"
    return notebook_hash(path.resolve()) if path.is_file() else ""


def job_threads(cores: int | None, mem_mb: int) -> int:
    """Return the threads a rule asks for, so that jobs running together fit the machine at any ``--cores``.

    A job computes on one core. With ``--cores`` above the machine's it asks for more of them, so that no more
    jobs run together than the machine has cores, or memory for.

    Parameters
    ----------
    cores : int or None
        ``workflow.cores``; None on a cluster, where the scheduler places jobs.
    mem_mb : int
        Peak memory of the job.

    Examples
    --------
    >>> job_threads(None, 2000)
    1
    """
    if not cores or cores >= 2**31:
        return 1
    share = max(1 / available_cores(), mem_mb / available_memory_mb())
    return min(cores, max(1, math.ceil(cores * share - 1e-9)))
