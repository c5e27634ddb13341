"""A model named on the command line: a local folder, ``embedded``, or a repository of the Hub."""

from __future__ import annotations

import json
import re
from pathlib import Path

from sfmp.checks import SfmpError, integer


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
        A torch device; ``auto`` is cuda if there is one; ``spread`` lets accelerate spread the layers over all GPUs,
        then the CPU, for models larger than one GPU.

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

    if device == "spread":
        return load_placed(source, dtype, torch.device("cpu"), "auto")
    device = chosen_device(device)
    model, tokenizer = load_placed(source, dtype, device)
    return model.to(device), tokenizer


def load_placed(source: str, dtype: str, device, device_map=None, offload_folder=None):
    """Load a model by a device map of accelerate; see `load`.

    Parameters
    ----------
    device : torch.device
        Float16 becomes float32 if this is a CPU and `dtype` is ``auto``; nothing is moved there.
    device_map : str or dict, optional
        As ``from_pretrained`` takes it.
    offload_folder : path, optional
        For weights on ``disk`` that the checkpoint does not hold as the model does.
    """
    import torch

    from sfmp.stages import load_model

    placed = {} if device_map is None else {"device_map": device_map, "offload_folder": offload_folder}
    model, tokenizer = _read(source, lambda: load_model(source, dtype, **placed))
    if dtype == "auto" and device.type == "cpu" and model.dtype == torch.float16:
        if device_map is None:
            model.float()
        else:  # what is on disk is cast when it is read, so it must be asked for
            model, tokenizer = _read(source, lambda: load_model(source, "float32", **placed))
    return model, tokenizer


def skeleton(source: str):
    """Return the architecture of a model on the meta device and its tokenizer; errors as in `load`.

    Raises SfmpError also if the model is quantized.
    """
    import torch

    def read():
        from transformers import AutoConfig, AutoModelForCausalLM

        from sfmp.stages import load_tokenizer, located

        name, options = located(source)
        config = AutoConfig.from_pretrained(name, **options)
        check_unquantized(source, config)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config), load_tokenizer(source)

    return _read(source, read)


def check_unquantized(source: str, config) -> None:
    """Raise SfmpError if a model's configuration says that it is quantized."""
    found = getattr(config, "quantization_config", None)
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
        raise SfmpError(f"model {source!r}: expected one that is not quantized, found quant_method {method}; give the "
                        "model it was made from")


def _read(source, load):
    """Call `load`; what transformers raises for what it cannot find, read or does not know becomes an SfmpError."""
    from safetensors import SafetensorError

    _check_folder(source)
    try:
        return load()
    except SfmpError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SfmpError(f"model {source!r}: expected a causal language model with its tokenizer, found: {reason}; "
                        "check the name, the revision, your access and the network") from error


def chosen_device(name: str):
    """Return the torch device of this name; raises SfmpError if this machine has none such."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # not on the meta device, which holds no numbers
    except (RuntimeError, AssertionError) as error:
        raise SfmpError(f"device {name!r}: expected cpu, or cuda where there is one, found: "
                        f"{str(error).splitlines()[0]}; choose --device cpu") from error
    return device


def context_of(model, most: int) -> int:
    """Return `most` tokens, or the length of the model's context if that is shorter."""
    return min(most, getattr(model.config.get_text_config(), "max_position_embeddings", None) or most)


def window_length(model, asked: int | None, usual: int) -> int:
    """Return the tokens of a window: `asked`, by default `usual` or the model's context if that is shorter.

    Raises SfmpError if it is no number of at least 2, or longer than the context: such a model was not trained on that.
    """
    length = integer("seqlen", context_of(model, usual) if asked is None else asked, 2)
    if (context := context_of(model, length)) < length:
        raise SfmpError(f"seqlen: expected at most the {context} tokens of the model's context, found {length}; ask "
                        "for shorter windows")
    return length


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
        It exists and `overwrite` is false, or it is something else than a quantized checkpoint or an empty folder.
    """
    folder = Path(folder)
    if not folder.exists():
        return folder
    if not overwrite:
        raise SfmpError(f"{folder}: expected no such file or folder, found one; choose another, or pass --overwrite to "
                        "replace a checkpoint")
    if not folder.is_dir() or any(folder.iterdir()) and not _is_quantized(folder):
        raise SfmpError(f"{folder}: expected a quantized checkpoint to overwrite, found something else; choose another "
                        "folder, or remove that one")
    return folder


def _is_quantized(folder):
    """Whether config.json says so; a model that is not may be the only copy of its weights."""
    try:
        return "quant_method" in json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_folder(source):
    path = Path(source)
    if source != "embedded" and path.is_dir() and not (path / "config.json").is_file():
        raise SfmpError(f"model {source!r}: expected a folder with config.json, found none in it; give the folder of a "
                        "checkpoint")
