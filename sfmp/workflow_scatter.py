"""What rules/scatter.smk calls: the pieces of a run, and the files that its jobs hand on. No torch."""

from __future__ import annotations

import json
import shlex

from sfmp.code_hash import code_hash
from sfmp.design import Design, run_spec

__all__ = ["Scatter"]


class Scatter:
    """Files and commands of the jobs that share the decoder layers of one run (`sfmp.scatter`).

    Methods whose argument is `wildcards` are input or parameter functions of Snakemake.

    Attributes
    ----------
    jobs : int
        Pieces of a run.
    runs : list of str
        Runs that are cut: those whose layers AWQ quantizes. Under GPTQ a layer is given what the quantized layers
        before it return, so its layers have an order; rounding to nearest takes less time than a job to start.
    folder : str
        Of everything that jobs hand on to others.
    """

    def __init__(self, design: Design):
        self.design, self.jobs = design, design.config.get("scatter", 0)
        self.runs = [run for run in design.planned if run_spec(design.runs[run]).method == "awq"]
        self.folder = f"{design.results}/scatter"
        self.code = code_hash("sfmp.scatter_job")

    def inputs(self) -> list[str]:
        """What enters the first layer of each piece, by the wildcard `model`: the same for every run of a model."""
        return [f"{self.folder}/inputs/{{model}}/{piece}.safetensors" for piece in range(self.jobs)]

    def inputs_of_piece(self, wildcards) -> str:
        """The one of `inputs` that a piece begins with."""
        model = self.design.runs[wildcards.run]["model"]
        return f"{self.folder}/inputs/{model}/{wildcards.piece}.safetensors"

    def layers(self) -> list[str]:
        """Folder of each piece's quantized layers, by the wildcard `run`."""
        return [f"{self.folder}/layers/{{run}}/{piece}" for piece in range(self.jobs)]

    def source(self, wildcards) -> str:
        """The model, as `sfmp.scatter_job` takes it."""
        model = getattr(wildcards, "model", None) or self.design.runs[wildcards.run]["model"]
        return self.design.models[model]["source"]

    def gpus(self, wildcards) -> int:
        """GPUs of a piece: one, which holds a layer, where its model is on any."""
        return 0 if self.design.config["device"] == "cpu" else 1

    def settings(self, wildcards) -> str:
        """Options of `sfmp.scatter_job` that say what a run's plan is to be."""
        row = self.design.runs[wildcards.run]
        spec = json.dumps(run_spec(row).to_dict())
        return f"--spec {shlex.quote(spec)} --budget {row['budget']}"
