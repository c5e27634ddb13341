"""LayerStream: a model of which one decoder layer is in memory at a time.

The architecture is on the meta device; embeddings, norms and output layer, which lie outside the stack of layers, are
loaded. Where each weight of a layer lies on disk is known to accelerate's index of offloaded weights, which follows
every renaming and fusing that transformers does on loading; a layer is read from there when its turn comes.

Source: DESIGN.md section 7; METHOD.md section 3, items 7 and 8 (memory bounded by one layer).
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from sfmp.checks import SfmpError
from sfmp.heap import give_back
from sfmp.salience import linear_modules
from sfmp.unfuse import expose_linears, linears_exposed
from sfmp.walk import capture, find_layers, is_chain, same
from sfmp.windows import probe_of


class NotStreamable(SfmpError):
    """This model cannot be run one layer at a time; the message says why."""


class LayerStream:
    """A model with one layer in memory.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Parameters of its layers on the meta device, all others loaded.
    weights : mapping of dotted parameter name to tensor
        Reads a parameter of a layer from disk.
    layers : list of (str, nn.Module)
        Prefix and module of each layer, in the order they run.

    Attributes
    ----------
    rests : dict of int to tuple or None
        What each layer returns beside the hidden state, None if it returns that alone; known after `check`.
    exposed : collection of str or None
        Linear layers that are wanted as such in the layer in memory (`sfmp.unfuse.expose_linears`); None for all.
    """

    def __init__(self, model: nn.Module, weights: Mapping, layers: list[tuple[str, nn.Module]]):
        self.model, self.layers, self._weights = model, layers, weights
        self.device = next(model.parameters()).device
        self.rests, self.exposed = {}, None
        self._index, self._held, self._replaced = None, [], []

    def __len__(self):
        return len(self.layers)

    @contextlib.contextmanager
    def resident(self, index: int):
        """Hold one layer in memory inside the context; gives the layer. Its parameters want no gradient."""
        self._load(index)
        try:
            yield self.layers[index][1]
        finally:
            self._free()

    @contextlib.contextmanager
    def running(self):
        """Inside the context the model can be run as a whole: each layer is read when it is called."""
        def before(index, *_):
            if self._index != index:
                self._load(index)

        handles = [layer.register_forward_pre_hook(functools.partial(before, index))
                   for index, (_, layer) in enumerate(self.layers)]
        try:
            yield self.model
        finally:
            for handle in handles:
                handle.remove()
            self._free()

    def check(self, windows: torch.Tensor) -> None:
        """Raise NotStreamable unless each layer depends on the others by their hidden state only.

        Parameters
        ----------
        windows : int64 [n, seqlen]
            A short part of the first is run.

        Notes
        -----
        Masks, position embeddings and the like must be what they are when every layer hands on its input unchanged;
        otherwise gradients of later layers would reach earlier ones on ways that a walk back layer by layer misses.
        """
        modules, probe = [layer for _, layer in self.layers], probe_of(windows)
        kind = type(self.model).__name__

        def note(index, module, args, output):
            self.rests[index] = None if isinstance(output, torch.Tensor) else tuple(output[1:])

        handles = [layer.register_forward_hook(functools.partial(note, index)) for index, layer in enumerate(modules)]
        try:
            with self.running():
                if not is_chain(self.model, modules, probe):
                    raise NotStreamable(f"{kind} does not run its layers once each, in order, each on what the one "
                                        "before returned")
                found, = capture(self.model, modules, [probe])
        finally:
            for handle in handles:
                handle.remove()
        with passed_through(self, found.calls):
            unchanged, = capture(self.model, modules, [probe])
        if not same(found.calls, unchanged.calls):
            raise NotStreamable(f"layers of {kind} are given more than the hidden state that depends on earlier layers")

    def finish(self) -> None:
        """Leave the layer in memory as it has become, without its numbers: it will not be read again."""
        self.layers[self._index][1].to("meta")
        self._held, self._replaced = [], []

    def _load(self, index):
        self._free()
        prefix, layer = self.layers[index]
        for path, module in layer.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    tensor = self._weights[".".join(part for part in (prefix, path, key) if part)]
                    # A copy: what is read is a map of the file, and scales are folded in place.
                    tensor = tensor.to(self.device, parameter.dtype, copy=True)
                    self._held.append((module, key, parameter))
                    module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
        wanted = self.exposed
        if wanted is not None:
            wanted = [name.removeprefix(f"{prefix}.") for name in wanted if name.startswith(f"{prefix}.")]
        self._replaced = expose_linears(layer, wanted)
        layer.requires_grad_(False)
        self._index = index

    def _free(self):
        for path, module in self._replaced:
            self.layers[self._index][1].set_submodule(path, module)
        for module, key, parameter in self._held:
            module._parameters[key] = parameter
        self._index, self._held, self._replaced = None, [], []
        give_back()


@contextlib.contextmanager
def passed_through(stream: LayerStream, calls, last=None):
    """Inside the context every layer returns the hidden state that it is given, and reads no weights.

    Parameters
    ----------
    stream : LayerStream
    calls : list of (key, args, kwargs)
        How each layer is called (`sfmp.walk.Batch`).
    last : callable () -> Tensor, optional
        What the last layer returns.
    """
    def forward(index, *args, **kwargs):
        key, rest = calls[index][0], stream.rests[index]
        hidden = last() if last is not None and index == len(stream) - 1 else args[0] if key == 0 else kwargs[key]
        return hidden if rest is None else (hidden, *rest)

    layers = [layer for _, layer in stream.layers]
    try:
        for index, layer in enumerate(layers):
            layer.forward = functools.partial(forward, index)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def open_stream(source: str, empty: nn.Module, dtype: str, device, skip, scratch) -> LayerStream:
    """Open a model for streaming.

    Parameters
    ----------
    source, dtype : see `sfmp.model_source.load`
    empty : nn.Module
        Its `sfmp.model_source.skeleton`.
    device : torch.device
        Where the layer in memory is, and all that is outside of the layers.
    skip : names of linear layers that will not be quantized
    scratch : path
        Folder for weights that cannot be read from the checkpoint as they are (fused on loading).

    Returns
    -------
    LayerStream
        In evaluation mode.

    Raises
    ------
    NotStreamable
        The linear layers are not all in one stack of layers, or layers share weights.
    SfmpError
        As `sfmp.model_source.load`.
    """
    from sfmp.model_source import load_placed

    with linears_exposed(empty):
        names = list(linear_modules(empty, skip))
    stacks = find_layers(empty, names)
    kind = type(empty).__name__
    if len(stacks) != 1:
        raise NotStreamable(f"{kind} has {len(stacks)} stacks of layers; one is expected")
    prefixes = [prefix for prefix, _ in stacks[0]]
    outside = [name for name in names if not any(name.startswith(f"{prefix}.") for prefix in prefixes)]
    if outside:
        raise NotStreamable(f"{outside[0]} is to be quantized and lies outside the layers of {kind}")
    uses = Counter(id(p) for _, p in empty.named_parameters(remove_duplicate=False))
    if any(uses[id(parameter)] > 1 for _, layer in stacks[0] for parameter in layer.parameters()):
        raise NotStreamable(f"layers of {kind} share weights")
    place = dict(_placement(empty, "", prefixes, str(device)))
    with quiet("accelerate.big_modeling"):  # it warns of what is asked for: weights that stay on disk
        model, _ = load_placed(source, dtype, device, place, scratch)
    weights = _offloaded(model)
    for tensor in model.parameters():
        if not tensor.is_meta:
            tensor.data = tensor.data.clone()  # a view would keep the whole file mapped
    layers = [(prefix, model.get_submodule(prefix)) for prefix in prefixes]
    if next(model.parameters()).is_meta:
        raise NotStreamable(f"{kind} begins with a layer")
    return LayerStream(model, weights, layers)


def _placement(module, path, prefixes, device):
    """Device of every part of a model: layers on disk, all else on `device`."""
    if path in prefixes:
        yield path, "disk"
    elif any(prefix.startswith(f"{path}." if path else "") for prefix in prefixes):
        for key in (*module._parameters, *module._buffers):
            yield f"{path}.{key}" if path else key, device
        for key, child in module.named_children():
            yield from _placement(child, f"{path}.{key}" if path else key, prefixes, device)
    else:
        yield path, device


def _offloaded(model):
    """Accelerate's reader of the weights on disk; its hooks, which would read weight by weight, are removed."""
    from accelerate.hooks import remove_hook_from_submodules

    maps = [getattr(getattr(module, "_hf_hook", None), "weights_map", None) for module in model.modules()]
    found = next((entry.dataset for entry in maps if entry is not None), None)
    remove_hook_from_submodules(model)
    for module in model.modules():  # hooks leave the method of the class as an attribute, which copies would inherit
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward
    if found is None:
        raise NotStreamable(f"accelerate found no weights of {type(model).__name__} on disk")
    return found


@contextlib.contextmanager
def quiet(*names: str):
    """Keep loggers from warning inside the context."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
