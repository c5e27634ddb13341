"""A model named on the command line: a local folder, ``embedded``, or a repository of the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from sfmp.checks import SfmpError


def load(source: str, dtype: str = "auto", device: str = "auto"):
    """Load a model, quantized or not, and its tokenizer.

    Parameters
    ----------
    source : str
        ``embedded``, a local folder, or ``owner/name[@revision]``.
    dtype : str
        Of what is not quantized; ``auto`` is the stored one, except float16 on a CPU, which becomes float32 (its
        gradients underflow and it is slow there).
    device : str
        A torch device; ``auto`` is cuda if there is one.

    Returns
    -------
    (transformers.PreTrainedModel, tokenizer)
        In evaluation mode.

    Raises
    ------
    SfmpError
        There is no such model or tokenizer, it cannot be read, or there is no such device.
    """
    import torch

    from sfmp.stages import load_model

    device = chosen_device(device)
    _check_folder(source)
    try:
        model, tokenizer = load_model(source, dtype)
    except SfmpError:
        raise
    except (OSError, ValueError) as error:  # what transformers raises for what it cannot find or does not know
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SfmpError(f"model {source!r}: expected a causal language model with its tokenizer, found: {reason}; "
                        "check the name, the revision, your access and the network") from error
    if dtype == "auto" and device.type == "cpu" and model.dtype == torch.float16:
        model.float()
    return model.to(device), tokenizer


def chosen_device(name: str):
    """Return the torch device of this name; raises SfmpError if this machine has none such."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SfmpError(f"device {name!r}: expected cpu, or cuda where there is one, found: "
                        f"{str(error).splitlines()[0]}; choose --device cpu") from error
    return device


def context_of(model, most: int) -> int:
    """Return `most` tokens, or the length of the model's context if that is shorter."""
    return min(most, getattr(model.config.get_text_config(), "max_position_embeddings", None) or most)


def source_record(source: str, base_model: str | None = None) -> dict | None:
    """Return ``{"model", "revision"}`` for the checkpoint's config, None to take what the loaded model says.

    Raises SfmpError if `base_model` is no ``owner/name[@revision]``.
    """
    if base_model is None:
        return {"model": "embedded", "revision": None} if source == "embedded" else None
    name, _, revision = base_model.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise SfmpError(f"base model {base_model!r}: expected OWNER/NAME or OWNER/NAME@REVISION of the Hub; correct it")
    return {"model": name, "revision": revision or None}


def check_new(folder, overwrite: bool = False) -> Path:
    """Return the path of an output folder that may be written.

    Raises
    ------
    SfmpError
        It exists and `overwrite` is false, or it is something else than a checkpoint or an empty folder.
    """
    folder = Path(folder)
    if not folder.exists():
        return folder
    if not overwrite:
        raise SfmpError(f"{folder}: expected no such file or folder, found one; choose another, or pass --overwrite to "
                        "replace a checkpoint")
    if not folder.is_dir() or any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise SfmpError(f"{folder}: expected a checkpoint to overwrite, found something else; choose another folder")
    return folder


def _check_folder(source):
    path = Path(source)
    if source != "embedded" and path.is_dir() and not (path / "config.json").is_file():
        raise SfmpError(f"model {source!r}: expected a folder with config.json, found none in it; give the folder of a "
                        "checkpoint")
