"""What a notebook works on: the files Snakemake hands in or, when a reader presses "Run all", small ones
made on the spot.

Every function takes the notebook's :class:`sfmp.provenance.Run`. If the input is declared it is read; if
not, a small stand-in is computed from the model and the installed Python's own text, so no notebook depends
on another one having been run.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

from sfmp.checks import SfmpError
from sfmp.provenance import base_directory

SMALL = {"n_windows": 4, "seqlen": 128}  # stand-ins: seconds on one core, enough to see every effect
EMBEDDED = {
    "runs": "config/runs.tsv",
    "paper": "config/paper_values.tsv",
    "claims": "config/claims.tsv",
    "evals": "results/embedded/eval",
    "quantized": "results/embedded/quantized",
    "tables": "results/embedded/tables",
}
TEXTS = {
    "embedded": ("python:calibration", "python:evaluation"),
    "hub": ("hub:allenai/c4:en:train", "hub:Salesforce/wikitext:wikitext-2-raw-v1:test"),
}


def declared(run, name: str):
    """Path, or list of paths, of a results input; of the embedded tier where the notebook was given none."""
    if name in run.inputs:
        return run.inputs[name]
    path = base_directory() / EMBEDDED[name]
    if not path.exists():
        raise SfmpError(
            f"{path}: expected the results of the embedded tier, found none; run `snakemake --cores 8` first."
        )
    return path


def results(run):
    """The design joined with every evaluation and record of quantization
    (:func:`sfmp.records.load_results`).
    """
    from sfmp.records import load_results

    return load_results(declared(run, "runs"), declared(run, "evals"), declared(run, "quantized"))


def paper_values(run):
    """Numbers transcribed from the paper (:func:`sfmp.tables.read_paper_values`)."""
    from sfmp.tables import read_paper_values

    return read_paper_values(declared(run, "paper"))


def tables(run, **more):
    """Every result table by name (:func:`sfmp.claims.load_tables`), and frames computed on the spot."""
    from sfmp.claims import load_tables

    found = declared(run, "tables")
    return load_tables(found if isinstance(found, list) else [found], **more)


def load_model(source: str, dtype: str = "float32"):
    """Load a model of ``config/models.tsv`` and its tokenizer.

    Parameters
    ----------
    source : str
        ``"embedded"``, a local folder, or a Hugging Face id, optionally ``id@revision``.
    dtype : str
        Torch type of the weights in memory.

    Returns
    -------
    (transformers.PreTrainedModel, tokenizer)
        In evaluation mode, on the CPU.

    Raises
    ------
    SfmpError
        If `source` looks like a folder and is none.
    """
    _no_bars()
    if source == "embedded":
        from sfmp import embedded

        return embedded.load(dtype=dtype)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, _, revision = source.partition("@")
    if not Path(name).is_dir() and (name.startswith((".", "/")) or name.count("/") != 1):
        raise SfmpError(
            f"model {source!r}: expected embedded, a checkpoint folder or owner/name@revision; check the "
            f"path."
        )
    chosen = {"revision": revision} if revision else {}
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **chosen)
    return model.eval(), AutoTokenizer.from_pretrained(name, **chosen)


def _no_bars():
    """Progress bars of loading and saving are noise in an executed notebook: hundreds of lines in its HTML."""
    from transformers.utils import logging

    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm, where ipywidgets is missing
    logging.disable_progress_bar()


def documents(source: str, split: str) -> list[str]:
    """Text for a model: the installed Python's own for local models, C4 and WikiText-2 for those of the Hub.

    `split` is ``"calibration"`` or ``"evaluation"``; no document is in both. Source: METHOD §1.2 and §1.10.
    """
    from sfmp import data

    if split not in ("calibration", "evaluation"):
        raise SfmpError(f"split {split!r}: expected calibration or evaluation.")
    local = source == "embedded" or Path(source).is_dir()
    return data.load_text(TEXTS["embedded" if local else "hub"][split == "evaluation"])


def evaluation_set(source: str, tokenizer, n_windows: int, seqlen: int):
    """Windows for perplexity, int64 [n, seqlen], and the UTF-8 bytes per token of their text.

    Texts of the Hub are used whole, as the paper's protocol does; of the Python corpus, `n_windows` evenly
    spaced windows are taken, so that every run of the embedded tier costs seconds. Source: METHOD §1.10.
    """
    from sfmp import data

    found, bytes_per_token = data.evaluation_windows(documents(source, "evaluation"), tokenizer, seqlen)
    if source == "embedded" or Path(source).is_dir():
        found = found[:: max(1, len(found) // n_windows)][:n_windows].contiguous()
    return found, bytes_per_token


def windows(run, tokenizer, split: str = "calibration"):
    """Token windows, int64 [n, seqlen]: the declared input ``windows``, or a few cut from the Python
    corpus.
    """
    from sfmp import data

    if "windows" in run.inputs:
        return data.load_windows(run.inputs["windows"])[0]
    return data.calibration_windows(documents("embedded", split), tokenizer, **SMALL, seed=run.seed)


def salience(run, model, tokenizer) -> Mapping:
    """Salience by matrix, float32 [N, K]: the declared input ``salience``, or the Fisher salience of a
    few windows.
    """
    from sfmp.salience import fisher_salience, load_salience

    if "salience" in run.inputs:
        return load_salience(run.inputs["salience"])
    return fisher_salience(model, windows(run, tokenizer))


def checkpoint(run, spec: Mapping | None = None) -> Path:
    """Folder of a quantized checkpoint: the declared input ``checkpoint``, or the embedded model quantized by
    rounding.

    `spec` holds fields of :class:`sfmp.spec.QuantSpec` for the stand-in.
    """
    if "checkpoint" in run.inputs:
        return run.inputs["checkpoint"]
    from sfmp.allocate import make_plan
    from sfmp.apply import quantize_model
    from sfmp.hf import save_checkpoint
    from sfmp.spec import QuantSpec

    model, tokenizer = load_model("embedded")
    chosen = {"bpw": 3.0, "group_size": 128, "block_rows": 64, "method": "rtn", **(spec or {})}
    plan = make_plan(salience(run, model, tokenizer), QuantSpec.from_dict(chosen), model)
    quantize_model(model, plan, windows(run, tokenizer))
    folder = Path(tempfile.mkdtemp(prefix="sfmp-checkpoint-"))
    save_checkpoint(model, folder, tokenizer)
    return folder


def load_for_evaluation(run, source: str):
    """The model to evaluate and its tokenizer: the declared input ``checkpoint``, or the unquantized
    `source`.
    """
    if "checkpoint" not in run.inputs:
        return load_model(source)
    import sfmp.hf  # registers the quantizer  # noqa: F401

    model, _ = load_model(str(run.inputs["checkpoint"]))
    return model, load_tokenizer(source)


def load_tokenizer(source: str):
    """Tokenizer of a model without its weights."""
    from transformers import AutoTokenizer

    if source == "embedded":
        from sfmp.embedded import FOLDER

        return AutoTokenizer.from_pretrained(FOLDER)
    name, _, revision = source.partition("@")
    return AutoTokenizer.from_pretrained(name, **({"revision": revision} if revision else {}))


def perplexity(model, tokens, seqlen: int) -> float:
    """:func:`sfmp.evaluate.perplexity`, with each packed matrix dequantized once instead of at every call."""
    from sfmp import evaluate

    with _dequantized_once(model):
        return evaluate.perplexity(model, tokens, seqlen)


def zero_shot(model, tokenizer, names, seed: int = 0) -> dict[str, dict[str, float]]:
    """Scores of the named zero-shot tasks (see :func:`sfmp.evaluate.accuracy`); empty if none is named."""
    from sfmp import evaluate, tasks

    if not names:
        return {}
    with _dequantized_once(model):
        return evaluate.accuracy(model, tokenizer, {name: tasks.build(name, seed=seed) for name in names})


def _dequantized_once(model):
    from sfmp.linear import SFMPLinear, keep_dequantized

    packed = any(isinstance(module, SFMPLinear) for module in model.modules())
    return keep_dequantized(model) if packed else contextlib.nullcontext()
