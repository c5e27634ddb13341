"""StoredQuantizer: what any checkpoint of `StoredLinear` layers needs to be loaded and saved by transformers.

A format is a subclass: which layer, what config.json says about one, which tensors that implies, how they are
checked.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import HfQuantizer

from sfmp.checkpoint import check_headers, read_headers
from sfmp.checks import SfmpError
from sfmp.unfuse import RoutedExperts, expose_linears, fuse_linears


class StoredQuantizer(HfQuantizer):
    """Builds the layers for `from_pretrained` and checks their tensors before the model is handed out.

    Attributes
    ----------
    layer_class : subclass of StoredLinear
    halves : names of the float16 buffers
    check_entry : callable (name, entry of config.json) -> checked entry with ``shape``
    describe : callable (layer) -> entry
    empty : callable (entry) -> layer on the meta device
    layout : callable (entry) -> name to (dtype, shape)
    check_layer : callable (name, layer, entry), raises SfmpError
    """

    requires_calibration = True  # transformers then refuses to quantize on the fly: quantize_model does that

    def preprocess_model(self, model, *args, **kwargs):
        """Swap the layers on the meta device, then check the files before any tensor is read."""
        super().preprocess_model(model, *args, **kwargs)
        files = kwargs.get("checkpoint_files")
        if files:
            self._check_files(model, files)

    def _process_model_before_weight_loading(self, model, **kwargs):
        self._names = {}  # name in the config → name in this model
        prefix = model.base_model_prefix + "."
        expose_linears(model, [form for name in self.quantization_config.modules for form in _forms(name, prefix)])
        for name, entry in self.quantization_config.modules.items():
            found = _find(model, name)
            if found is None:
                continue
            linear, entry = model.get_submodule(found), self.check_entry(name, entry)
            shape = (getattr(linear, "out_features", None), getattr(linear, "in_features", None))
            if not isinstance(linear, nn.Linear) or shape != entry["shape"]:
                raise SfmpError(f"{name}: expected a linear layer of {list(entry['shape'])} as the "
                                f"checkpoint says, found {type(linear).__name__} {list(shape)} in "
                                f"{type(model).__name__}; is config.json of another model?")
            model.set_submodule(found, self.empty(entry))
            self._names[name] = found
            # Some models initialise weights of their children by name (GPT-2 its c_proj): they find one that is done.
            done = torch.empty(0)
            done._is_hf_initialized = True
            model.get_submodule(found).weight = done

        self._unfused = [f"{path}.{name}" for path, module in model.named_modules()
                         if isinstance(module, RoutedExperts) for name in module.state_dict()]

    def update_weight_conversions(self, weight_conversions, *model):
        """Leave out what would fuse experts that are stored one by one, as a bare base model would have it."""
        kept = [conversion for conversion in weight_conversions if not isinstance(conversion, WeightConverter)
                or all(conversion.rename_source_key(name)[1] is None for name in self._unfused)]
        return super().update_weight_conversions(kept, *model)  # transformers 5.17 passes no model

    def _check_files(self, model, files):
        loaded = _renamed(read_headers(files), model, self)
        for name, found in self._names.items():
            expected = self.layout(self.check_entry(name, self.quantization_config.modules[name]))
            here = {key: loaded[f"{found}.{key}"] for key in expected if f"{found}.{key}" in loaded}
            check_headers(name, here, expected)

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name, found in self._names.items():
            layer = model.get_submodule(found)
            del layer.weight
            for key in self.halves:  # a keep-in-float32 rule of the architecture may have widened them
                if getattr(layer, key).dtype == torch.float32:
                    setattr(layer, key, getattr(layer, key).half())
            self.check_layer(name, layer, self.check_entry(name, self.quantization_config.modules[name]))
        return model

    def get_state_dict_and_metadata(self, model):
        """Describe the layers as they are now, digests included; transformers calls this first when it
        saves."""
        config = self.quantization_config
        config.modules = {name: self.describe(layer) for name, layer in self._layers(model).items()}
        model.config.quantization_config = config
        keep_names(model)
        return None, {}

    def _dequantize(self, model, dtype=None):
        for name, layer in self._layers(model).items():
            weight = layer.dequantize().to(dtype or model.dtype)
            biased = layer.bias is not None
            linear = nn.Linear(layer.in_features, layer.out_features, bias=biased, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            if biased:
                linear.bias = nn.Parameter(layer.bias.to(weight.dtype), requires_grad=False)
            model.set_submodule(name, linear)
        with torch.device("meta"):
            original = type(model)(model.config)
        fuse_linears(model, original)
        model._weight_conversions = None  # the architecture's own again
        return model

    def _layers(self, model):
        return {name: layer for name, layer in model.named_modules() if isinstance(layer, self.layer_class)}

    def is_serializable(self, *args, **kwargs):
        return True

    @property
    def is_trainable(self):
        return False


def keep_names(model) -> None:
    """Make transformers save tensors under the names that they have in the model, which are those in config.json.

    It would rename to what the architecture's first checkpoints had (Mixtral's ``mlp`` to ``block_sparse_moe``).
    """
    model._weight_conversions = []


def _find(model, name):
    """The name of a checkpoint's module in this model, None if this is the bare base model and the module a
    head."""
    prefix = model.base_model_prefix + "."
    names = dict(model.named_modules())
    for candidate in _forms(name, prefix):
        if candidate in names:
            return candidate
    if model.base_model is model and not name.startswith(prefix):
        return None
    raise SfmpError(f"{name}: expected this module in {type(model).__name__}, found none of that name; is "
                    "config.json of another model?")


def _forms(name, prefix):
    """A module's name as stored, and as it is with or without the head of the model."""
    return name, name.removeprefix(prefix), prefix + name


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
