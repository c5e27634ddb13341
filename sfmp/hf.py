"""Hugging Face integration: SFMPConfig and SFMPQuantizer, registered from outside; attach, save_checkpoint.

    quantize_model(model, plan, windows)                       # calls attach
    model.save_pretrained(folder)                              # or save_checkpoint: atomic, with a model card
    import sfmp; AutoModelForCausalLM.from_pretrained(folder)  # validated before use; no flags to re-type
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from sfmp.checkpoint import (
    FORMAT_VERSION,
    SIZES,
    check_entry,
    check_tensors,
    describe,
    layout,
)
from sfmp.checks import SfmpError
from sfmp.disk import writing_to
from sfmp.hf_quantizer import StoredQuantizer, keep_names
from sfmp.linear import SFMPLinear

METHOD = "sfmp"


class SFMPConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a checkpoint.

    Parameters
    ----------
    format_version : int
    spec : dict
        `QuantSpec.to_dict()` of the run, for the record.
    modules : dict
        Name → sizes and digest of its tensors (`sfmp.checkpoint.describe`).
    plan_hash : str
    source : dict
        ``model`` and ``revision`` that were quantized.

    Raises
    ------
    SfmpError
        Another format version, unknown fields, or a malformed entry.
    """

    def __init__(self, format_version=None, spec=None, modules=None, plan_hash=None, source=None,
                 quant_method=METHOD, **unknown):
        if isinstance(format_version, bool) or format_version != FORMAT_VERSION:
            raise SfmpError(f"quantization_config.format_version: expected {FORMAT_VERSION}, found "
                            f"{format_version!r}; load it with the version of sfmp that wrote it")
        if unknown or quant_method != METHOD:
            raise SfmpError(f"quantization_config: expected no other fields and quant_method {METHOD!r}, "
                            f"found {sorted(unknown)} and {quant_method!r}; the file was altered, download "
                            "it again")
        if not isinstance(modules, Mapping) or not modules:
            raise SfmpError("quantization_config.modules: expected the sizes of each quantized matrix, found "
                            f"{modules!r}; the file was altered, download it again")
        for name, entry in modules.items():
            check_entry(name, entry)
        self.quant_method = METHOD
        self.format_version = FORMAT_VERSION
        self.spec, self.modules = dict(spec or {}), dict(modules)
        self.plan_hash, self.source = plan_hash, dict(source or {})


class SFMPQuantizer(StoredQuantizer):
    """Loads and saves SFMPLinear layers."""

    layer_class = SFMPLinear
    halves = ("alpha", "beta")
    check_entry, describe = staticmethod(check_entry), staticmethod(lambda layer: describe(layer.packed))

    @staticmethod
    def empty(entry):
        sizes = {key: entry[key] for key in ("group_size", "block_rows", "plane_words", "bias")}
        return SFMPLinear.empty(*entry["shape"], **sizes, device="meta")

    @staticmethod
    def layout(entry):
        return layout(*(entry[key] for key in SIZES), entry["bias"])

    @staticmethod
    def check_layer(name, layer, entry):
        check_tensors(name, layer.packed.tensors(), *(entry[key] for key in SIZES), entry["sha256"])


def quantized_layers(model: nn.Module) -> dict[str, SFMPLinear]:
    """Return name → SFMPLinear in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SFMPLinear)}


def attach(model: nn.Module, plan, source=None) -> nn.Module:
    """Make a quantized transformers model one that ``save_pretrained`` saves and ``from_pretrained`` loads.

    Parameters
    ----------
    model : module with SFMPLinear layers
        Returned as it is if it is no transformers model.
    plan : Plan
    source : str or dict with ``model`` and ``revision``, optional
        What was quantized; by default what the config says it was loaded from (of a local folder only the
        last component, so that no checkpoint depends on where it was made).

    Raises
    ------
    SfmpError
        The model has no SFMPLinear.
    """
    layers = quantized_layers(model)
    if not layers:
        raise SfmpError("model: expected at least one SFMPLinear, found none; call quantize_model first")
    modules = {name: describe(layer.packed, with_digest=False) for name, layer in layers.items()}
    return adopt(model, layers, SFMPQuantizer, lambda source: SFMPConfig(
        FORMAT_VERSION, plan.spec.to_dict(), modules, plan.hash, source), source)


def adopt(model, layers, quantizer, config_of, source=None) -> nn.Module:
    """Give a transformers model the configuration and the quantizer of its layers; `attach` for any format.

    Parameters
    ----------
    model : nn.Module
        Returned as it is if it is no transformers model.
    layers : mapping of str to StoredLinear
    quantizer : subclass of `StoredQuantizer`
    config_of : callable (source dict) -> quantization config
    source : as in `attach`
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "save_pretrained"):
        return model
    _untie(model, layers)
    _restore_rotary(model)
    config.quantization_config = config_of(_source(config, source))
    config._is_quantized = True
    model.hf_quantizer = quantizer(config.quantization_config, pre_quantized=True)
    keep_names(model)
    model.is_quantized, model.quantization_method = True, config.quantization_config.quant_method
    return model


def save_checkpoint(model: nn.Module, folder, tokenizer=None, **options) -> Path:
    """Write model, tokenizer and model card beside `folder`, then rename: it appears complete or not at all.

    Parameters
    ----------
    folder : path; an existing checkpoint there is replaced
    tokenizer : optional
    options : passed to ``model.save_pretrained``, e.g. ``max_shard_size``

    Raises
    ------
    SfmpError
        `folder` exists and holds no checkpoint, or nothing can be written there: it is left alone.
    """
    folder = Path(folder)
    foreign = folder.is_file() or folder.is_dir() and any(folder.iterdir())
    if foreign and not (folder / "config.json").exists():
        raise SfmpError(f"{folder}: expected a checkpoint or nothing, found something else; choose another "
                        "folder")
    with writing_to(folder, "choose a place with room where you may write"):
        return _saved(model, folder, tokenizer, options)


def _saved(model, folder, tokenizer, options):
    from sfmp.card import save_model_card

    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        model.save_pretrained(new, **options)
        if tokenizer is not None:
            save_tokenizer(tokenizer, new)
        save_model_card(model, new)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    finally:
        if old.exists() and not folder.exists():  # interrupted between the two
            os.replace(old, folder)
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
    return folder


def save_tokenizer(tokenizer, folder) -> None:
    """Save a tokenizer without what it says about how it was loaded, such as without a network."""
    options = getattr(tokenizer, "init_kwargs", {})
    for key in ("is_local", "local_files_only"):
        options.pop(key, None)
    tokenizer.save_pretrained(folder)


def _untie(model, layers):
    """A packed output layer shares no weight with the embedding any more."""
    tied = getattr(model, "all_tied_weights_keys", {})
    packed = [key for key in tied if key.rpartition(".")[0] in layers]
    for key in packed:
        del tied[key]
    if packed:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def _restore_rotary(model):
    """Recompute rotary frequencies that ``.to(bfloat16)`` rounded, as from_pretrained does: they are not
    saved."""
    for module in model.modules():
        rounded = [key for key in ("inv_freq", "original_inv_freq")
                   if (buffer := module._buffers.get(key)) is not None and buffer.dtype != torch.float32]
        for key in rounded:
            module._buffers[key] = module._buffers[key].float()
        if rounded:
            model._init_weights(module)


def _source(config, source):
    if isinstance(source, Mapping):
        return dict(source)
    name = source or getattr(config, "_name_or_path", "") or None
    if name and (os.path.isdir(name) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)):
        name = Path(name).name
    return {"model": name, "revision": getattr(config, "_commit_hash", None)}


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(SFMPConfig)
    register_quantizer(METHOD)(SFMPQuantizer)
