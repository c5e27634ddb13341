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
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sfmp.checkpoint import (
    FORMAT_VERSION,
    SIZES,
    check_entry,
    check_headers,
    check_tensors,
    describe,
    layout,
    read_headers,
)
from sfmp.checks import SfmpError
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


class SFMPQuantizer(HfQuantizer):
    """Builds SFMPLinear layers for `from_pretrained` and checks their tensors before the model is handed
    out."""

    requires_calibration = True  # transformers then refuses to quantize on the fly: quantize_model does that

    def preprocess_model(self, model, *args, **kwargs):
        """Swap the layers on the meta device, then check the files before any tensor is read."""
        super().preprocess_model(model, *args, **kwargs)
        files = kwargs.get("checkpoint_files")
        if files:
            self._check_files(model, files)

    def _process_model_before_weight_loading(self, model, **kwargs):
        self._names = {}  # name in the config → name in this model
        for name, entry in self.quantization_config.modules.items():
            found = _find(model, name)
            if found is None:
                continue
            linear, entry = model.get_submodule(found), check_entry(name, entry)
            shape = (getattr(linear, "out_features", None), getattr(linear, "in_features", None))
            if not isinstance(linear, nn.Linear) or shape != entry["shape"]:
                raise SfmpError(f"{name}: expected a linear layer of {list(entry['shape'])} as the "
                                f"checkpoint says, found {type(linear).__name__} {list(shape)} in "
                                f"{type(model).__name__}; is config.json of another model?")
            sizes = {key: entry[key] for key in ("group_size", "block_rows", "plane_words", "bias")}
            model.set_submodule(found, SFMPLinear.empty(*shape, **sizes, device="meta"))
            self._names[name] = found

    def _check_files(self, model, files):
        loaded = _renamed(read_headers(files), model, self)
        for name, found in self._names.items():
            entry = check_entry(name, self.quantization_config.modules[name])
            expected = layout(*(entry[key] for key in SIZES), entry["bias"])
            here = {key: loaded[f"{found}.{key}"] for key in expected if f"{found}.{key}" in loaded}
            check_headers(name, here, expected)

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name, found in self._names.items():
            layer = model.get_submodule(found)
            entry = check_entry(name, self.quantization_config.modules[name])
            for key in ("alpha", "beta"):  # a keep-in-float32 rule of the architecture may have widened them
                if getattr(layer, key).dtype == torch.float32:
                    setattr(layer, key, getattr(layer, key).half())
            sizes = (entry[key] for key in SIZES)
            check_tensors(name, layer.packed.tensors(), *sizes, entry["sha256"])
        return model

    def get_state_dict_and_metadata(self, model):
        """Describe the layers as they are now, digests included; transformers calls this first when it
        saves."""
        config = self.quantization_config
        config.modules = {name: describe(layer.packed) for name, layer in quantized_layers(model).items()}
        model.config.quantization_config = config
        return None, {}

    def _dequantize(self, model, dtype=None):
        for name, layer in quantized_layers(model).items():
            weight = layer.packed.dequantize().to(dtype or model.dtype)
            biased = layer.bias is not None
            linear = nn.Linear(layer.in_features, layer.out_features, bias=biased, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            if biased:
                linear.bias = nn.Parameter(layer.bias.to(weight.dtype), requires_grad=False)
            model.set_submodule(name, linear)
        return model

    def is_serializable(self, *args, **kwargs):
        return True

    @property
    def is_trainable(self):
        return False


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
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "save_pretrained"):
        return model
    _untie(model, layers)
    _restore_rotary(model)
    modules = {name: describe(layer.packed, with_digest=False) for name, layer in layers.items()}
    source = _source(config, source)
    config.quantization_config = SFMPConfig(FORMAT_VERSION, plan.spec.to_dict(), modules, plan.hash, source)
    config._is_quantized = True
    model.hf_quantizer = SFMPQuantizer(config.quantization_config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, METHOD
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
        `folder` exists and holds no checkpoint: it is left alone.
    """
    from sfmp.card import save_model_card

    folder = Path(folder)
    foreign = folder.is_file() or folder.is_dir() and any(folder.iterdir())
    if foreign and not (folder / "config.json").exists():
        raise SfmpError(f"{folder}: expected a checkpoint or nothing, found something else; choose another "
                        "folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        model.save_pretrained(new, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        save_model_card(model, new)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    finally:
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
    return folder


def _find(model, name):
    """The name of a checkpoint's module in this model, None if this is the bare base model and the module a
    head."""
    prefix = model.base_model_prefix + "."
    names = dict(model.named_modules())
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if candidate in names:
            return candidate
    if model.base_model is model and not name.startswith(prefix):
        return None
    raise SfmpError(f"{name}: expected this module in {type(model).__name__}, found none of that name; is "
                    "config.json of another model?")


def _renamed(headers, model, quantizer):
    """Headers under the names the loader will give them (architectures may rename on loading)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model, None, quantizer)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    state = model.state_dict()
    prefix = model.base_model_prefix
    return {key if key in state else rename_source_key(key, renamings, [], prefix, state)[0]: header
            for key, header in headers.items()}


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
