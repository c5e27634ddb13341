"""Hugging Face integration of BitStack: its configuration and quantizer, registered from outside as ``bitstack``.

As for SFMP, ``save_pretrained`` writes a model and ``from_pretrained`` after ``import sfmp`` loads it, after
every size, dtype and digest has been checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from sfmp import hf
from sfmp.baselines.bitstack_linear import BitStackLinear, layout
from sfmp.checks import SfmpError, integer
from sfmp.hf_quantizer import StoredQuantizer

METHOD, FORMAT_VERSION = "bitstack", 1
_FIELDS = ("shape", "levels", "rank", "bias", "sha256")
_REQUANTIZE = "the checkpoint is damaged or was written for another model: download or quantize it again"


class BitStackConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a checkpoint.

    Parameters
    ----------
    format_version : int
    knobs : dict
        Of :func:`sfmp.baselines.bitstack.quantize`, for the record.
    modules : dict
        Name → shape, levels, rank, bias and digest of a matrix.
    source : dict
        ``model`` and ``revision`` that were quantized.

    Raises
    ------
    SfmpError
        Another format version, unknown fields, or a malformed entry.
    """

    def __init__(self, format_version=None, knobs=None, modules=None, source=None, quant_method=METHOD, **unknown):
        if isinstance(format_version, bool) or format_version != FORMAT_VERSION:
            raise SfmpError(f"quantization_config.format_version: expected {FORMAT_VERSION}, found "
                            f"{format_version!r}; load it with the version of sfmp that wrote it")
        if unknown or quant_method != METHOD or not isinstance(modules, Mapping) or not modules:
            raise SfmpError(f"quantization_config: expected quant_method {METHOD!r} and the sizes of each matrix, "
                            f"found {quant_method!r}, modules {type(modules).__name__} and other fields "
                            f"{sorted(unknown)}; {_REQUANTIZE}")
        for name, entry in modules.items():
            check_entry(name, entry)
        self.quant_method, self.format_version = METHOD, FORMAT_VERSION
        self.knobs, self.modules, self.source = dict(knobs or {}), dict(modules), dict(source or {})


def check_entry(name: str, entry) -> dict:
    """Return the config entry of one matrix after checking its fields; the digest may be absent."""
    label = f"quantization_config.modules[{name}]"
    if not isinstance(entry, Mapping) or not set(_FIELDS[:-1]) <= set(entry) <= set(_FIELDS):
        found = sorted(entry) if isinstance(entry, Mapping) else type(entry).__name__
        raise SfmpError(f"{label}: expected the fields {', '.join(_FIELDS)}, found {found}; {_REQUANTIZE}")
    shape = entry["shape"]
    if not isinstance(shape, list | tuple) or len(shape) != 2:
        raise SfmpError(f"{label}.shape: expected [out_features, in_features], found {shape!r}; {_REQUANTIZE}")
    if not isinstance(entry["bias"], bool):
        raise SfmpError(f"{label}.bias: expected true or false, found {entry['bias']!r}; {_REQUANTIZE}")
    return {"shape": tuple(integer(f"{label}.shape", size, 1) for size in shape),
            **{key: integer(f"{label}.{key}", entry[key], 1) for key in ("levels", "rank")},
            "bias": entry["bias"], "sha256": entry.get("sha256")}


def describe(layer: BitStackLinear) -> dict:
    """Return what config.json says about one matrix."""
    return {"shape": [layer.out_features, layer.in_features], "levels": layer.levels, "rank": layer.rank,
            "bias": layer.bias is not None, "sha256": digest(layer)}


def digest(layer: BitStackLinear) -> str:
    """Return the sha256 of the stored bytes in the order of `BitStackLinear.stored`."""
    found = hashlib.sha256()
    for key in layer.stored:
        found.update(getattr(layer, key).detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


class BitStackQuantizer(StoredQuantizer):
    """Loads and saves BitStackLinear layers."""

    layer_class = BitStackLinear
    halves = ("left", "right")
    check_entry, describe = staticmethod(check_entry), staticmethod(describe)

    @staticmethod
    def empty(entry):
        sizes = {key: entry[key] for key in ("levels", "rank", "bias")}
        return BitStackLinear.empty(*entry["shape"], **sizes, device="meta")

    @staticmethod
    def layout(entry):
        return layout(*entry["shape"], entry["levels"], entry["rank"], entry["bias"])

    @staticmethod
    def check_layer(name, layer, entry):
        for key in ("left", "right", "bias"):
            tensor = getattr(layer, key)
            wrong = 0 if tensor is None else int((~tensor.isfinite()).sum())
            if wrong:
                raise SfmpError(f"{name}.{key}: expected finite values, found {wrong} NaN or infinite; {_REQUANTIZE}")
        if entry["sha256"] is not None and digest(layer) != entry["sha256"]:
            raise SfmpError(f"{name}.signs: expected the sha256 {entry['sha256'][:12]}… over its tensors, found "
                            f"{digest(layer)[:12]}…: values were altered; {_REQUANTIZE}")


def quantized_layers(model: nn.Module) -> dict[str, BitStackLinear]:
    """Return name → BitStackLinear in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BitStackLinear)}


def attach(model: nn.Module, knobs: Mapping, source=None) -> nn.Module:
    """Make a model with BitStackLinear layers one that ``save_pretrained`` saves; see :func:`sfmp.hf.attach`."""
    layers = quantized_layers(model)
    if not layers:
        raise SfmpError("model: expected at least one BitStackLinear, found none; quantize the model first")
    modules = {name: describe(layer) for name, layer in layers.items()}
    return hf.adopt(model, layers, BitStackQuantizer,
                    lambda source: BitStackConfig(FORMAT_VERSION, knobs, modules, source), source)


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(BitStackConfig)
    register_quantizer(METHOD)(BitStackQuantizer)
