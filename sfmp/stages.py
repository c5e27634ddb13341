"""What a notebook works on: the files Snakemake hands in or, when a reader presses "Run all", small ones
made on the spot.

Every function takes the notebook's :class:`sfmp.provenance.Run`. If the input is declared it is read; if
not, a small stand-in is computed from the model and the installed Python's own text, so no notebook depends
on another one having been run.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path

from sfmp import places
from sfmp.checks import SfmpError

# tqdm says so, with a path of this machine, when it is imported where ipywidgets is not installed
warnings.filterwarnings("ignore", message="IProgress not found")

SMALL = {"n_windows": 4, "seqlen": 128}  # stand-ins: seconds on one core, enough to see every effect
TEXTS = {
    "embedded": ("python:calibration", "python:evaluation"),
    "hub": ("dataset:c4", "dataset:wikitext2"),
}


def load_model(source: str, dtype: str | None = None, **options):
    """Load a model of ``config/models.tsv`` and its tokenizer.

    Parameters
    ----------
    source : str
        ``"embedded"``, a local folder, or a Hugging Face id, optionally ``id@revision``.
    dtype : str, optional
        Torch type of the weights in memory. By default a named model is loaded as the job's environment says
        (`sfmp.places.placement`), a folder as float32 on the CPU.
    options
        Passed to ``from_pretrained``, such as ``device_map``.

    Returns
    -------
    (transformers.PreTrainedModel, tokenizer)
        In evaluation mode, on the CPU unless `options` or the environment say otherwise.

    Raises
    ------
    SfmpError
        If `source` looks like a folder and is none, or the environment names a device that is not there or too small.
    """
    if dtype is None and (source == "embedded" or not Path(source).is_dir()):
        return load_placed(source)
    _no_bars()
    dtype = dtype or "float32"
    if source == "embedded":
        from sfmp import embedded

        return embedded.load(dtype=dtype, **options)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, chosen = located(source)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **chosen, **options)
    repository, _, revision = source.partition("@")
    if name not in (source, repository):  # a copy: the checkpoint made from it must name the model, not the copy
        model.config._name_or_path = repository
        model.config._commit_hash = revision or places.copied_revision(Path(name))
    return model.eval(), AutoTokenizer.from_pretrained(name, **chosen)


def load_placed(source: str):
    """Load a model, or a checkpoint in a folder, in the dtype and on the device of the job's environment.

    Raises SfmpError if there is no such device, or the GPUs of the job together are too small for the model.
    """
    device, dtype = places.placement()
    if device == "cpu":
        return load_model(source, dtype)
    from sfmp.model_source import chosen_device

    chosen_device("cuda")
    model, tokenizer = load_model(source, dtype, device_map="auto" if device == "spread" else {"": "cuda:0"})
    away = sorted({parameter.device.type for parameter in model.parameters()} - {"cuda"})
    if away:
        raise SfmpError(f"model {source!r}: expected room for it on the GPUs of this job, found parts on "
                        f"{', '.join(away)}; give the job more GPUs (gpu_gb in config/models.tsv)")
    return model, tokenizer


def located(source: str) -> tuple[str, dict]:
    """Return what ``from_pretrained`` is to be called with: a folder or ``owner/name``, and the revision if any.

    The folder may be the copy that the machine's models root holds. Raises SfmpError if `source` looks like a folder
    and is none, or the root has no such copy.
    """
    if source == "embedded":
        from sfmp.embedded import FOLDER

        return str(FOLDER), {}
    name, _, revision = source.partition("@")
    if Path(source).is_dir():
        return source, {}
    if name.startswith((".", "/")) or name.count("/") != 1:
        raise SfmpError(f"model {source!r}: expected embedded, a checkpoint folder or owner/name@revision; check the "
                        "path.")
    if (copy := places.local_model(name, revision or None)) is not None:
        return str(copy), {}
    return name, {"revision": revision} if revision else {}


def _no_bars():
    """Silence what is noise in an executed notebook: bars of loading, and the length of text that is cut
    later.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)


def documents(source: str, split: str) -> list[str]:
    """Text for a model: the installed Python's own for local models, C4 and WikiText-2 for those of the Hub.

    `split` is ``"calibration"`` or ``"evaluation"``; no document is in both. Source: METHOD §1.2 and §1.10.
    """
    from sfmp import data

    if split not in ("calibration", "evaluation"):
        raise SfmpError(f"split {split!r}: expected calibration or evaluation.")
    local = source == "embedded" or Path(source).is_dir()
    name = TEXTS["embedded" if local else "hub"][split == "evaluation"]
    return data.load_text(name, blank=split == "evaluation" and not local)


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


def load_tokenizer(source: str):
    """Tokenizer of a model without its weights."""
    _no_bars()
    from transformers import AutoTokenizer

    name, options = located(source)
    return AutoTokenizer.from_pretrained(name, **options)
