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

from sfmp.checks import SfmpError

# tqdm says so, with a path of this machine, when it is imported where ipywidgets is not installed
warnings.filterwarnings("ignore", message="IProgress not found")

SMALL = {"n_windows": 4, "seqlen": 128}  # stand-ins: seconds on one core, enough to see every effect
TEXTS = {
    "embedded": ("python:calibration", "python:evaluation"),
    "hub": ("hub:allenai/c4:en:train", "hub:Salesforce/wikitext:wikitext-2-raw-v1:test"),
}


def load_model(source: str, dtype: str = "float32", **options):
    """Load a model of ``config/models.tsv`` and its tokenizer.

    Parameters
    ----------
    source : str
        ``"embedded"``, a local folder, or a Hugging Face id, optionally ``id@revision``.
    dtype : str
        Torch type of the weights in memory.
    options
        Passed to ``from_pretrained``, such as ``device_map``.

    Returns
    -------
    (transformers.PreTrainedModel, tokenizer)
        In evaluation mode, on the CPU unless `options` say otherwise.

    Raises
    ------
    SfmpError
        If `source` looks like a folder and is none.
    """
    _no_bars()
    if source == "embedded":
        from sfmp import embedded

        return embedded.load(dtype=dtype, **options)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, chosen = located(source)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **chosen, **options)
    return model.eval(), AutoTokenizer.from_pretrained(name, **chosen)


def located(source: str) -> tuple[str, dict]:
    """Return what ``from_pretrained`` is to be called with: a folder or ``owner/name``, and the revision if any.

    Raises SfmpError if `source` looks like a folder and is none.
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


def load_tokenizer(source: str):
    """Tokenizer of a model without its weights."""
    _no_bars()
    from transformers import AutoTokenizer

    name, options = located(source)
    return AutoTokenizer.from_pretrained(name, **options)
