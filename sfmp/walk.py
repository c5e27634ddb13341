"""Walk a model layer by layer: find the layers, catch what enters them, run them one at a time.

Nothing here knows an architecture.  Layers are the entries of the outermost ``nn.ModuleList`` that holds
planned linears; a model with none is one single layer.  The model is run once up to its first layer; after
that hidden states are carried from layer to layer, so only one layer has to be on the fast device at a
time.

Source: METHOD.md sections 1.6, 1.7; DESIGN.md section 7.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn


class _Stop(Exception):
    """Ends a forward pass when everything wanted from it has been caught."""


@dataclass
class Batch:
    """One batch on its way through the layers: the hidden state, and what else each layer is called with."""

    hidden: torch.Tensor
    calls: list = field(default_factory=list)  # per layer: (key of the hidden state, args, kwargs)

    def arguments(self, index: int):
        """Positional and keyword arguments for layer `index`, float32 where floating."""
        key, args, kwargs = self.calls[index] if self.calls else (0, (None,), {})
        args, kwargs = list(args), dict(kwargs)
        if key == 0:
            args[0] = self.hidden
        else:
            kwargs[key] = self.hidden
        return [as_float32(a) for a in args], {k: as_float32(v) for k, v in kwargs.items()}


def as_float32(value):
    """Cast floating tensors, also inside tuples, lists and dicts; leave everything else alone."""
    if isinstance(value, torch.Tensor):
        return value.to(torch.float32) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(as_float32(v) for v in value)
    if type(value) is dict:
        return {k: as_float32(v) for k, v in value.items()}
    return value


def first_tensor(output) -> torch.Tensor:
    """The hidden state in a module's output: the output itself, or its first entry."""
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output


def find_layers(model: nn.Module, names) -> list[list[tuple[str, nn.Module]]]:
    """Stacks of layers that hold the planned linears, outermost first: lists of (dotted name, module).

    Parameters
    ----------
    model : nn.Module
    names : iterable of str
        Dotted names of the planned linears.

    Returns
    -------
    list of list of (str, nn.Module)
        One list per stack (an encoder-decoder has two); empty when no ModuleList holds a planned linear.
    """
    names, stacks, taken = list(names), [], []
    for prefix, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(prefix.startswith(t + ".") for t in taken):
            continue
        if any(name.startswith(prefix + ".") for name in names):
            taken.append(prefix)
            # _modules, not named_children: a layer used twice is run twice.
            stacks.append([(f"{prefix}.{key}", child) for key, child in module._modules.items()])
    return stacks


def run_model(model: nn.Module, windows: torch.Tensor) -> None:
    """Run a model for its hooks' sake: no cache, no gradient, stops quietly when a hook has seen enough."""
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad(), contextlib.suppress(_Stop):
        model(windows, **extra)


def capture(model: nn.Module, layers: list[nn.Module], groups: list[torch.Tensor]) -> list[Batch]:
    """Inputs of the first layer for every group of windows, and the other arguments of every layer.

    Parameters
    ----------
    model : nn.Module
    layers : list of nn.Module
    groups : list of Tensor [b, ...]
        Batches of windows.

    Returns
    -------
    list of Batch
        Hidden states in float32.

    Notes
    -----
    In decoder-only models masks and position embeddings depend on the shape of a batch only.  Where arguments
    depend on the data (found by comparing two batches of one shape), every batch runs in full.
    """
    batches: list[Batch] = []
    templates: dict[tuple, list] = {}
    data_dependent, count = False, Counter()
    for windows in groups:
        shape = tuple(windows.shape)
        count[shape] += 1
        full = data_dependent or count[shape] <= 2
        batch = _capture_one(model, layers, windows, full)
        if not full:
            batch.calls = templates[shape]
        elif shape in templates and not data_dependent:
            data_dependent = not same(batch.calls, templates[shape])
        templates.setdefault(shape, batch.calls)
        batches.append(batch)
    return batches


def _capture_one(model, layers, windows, full: bool) -> Batch:
    """Run one batch, catching the arguments of all layers (`full`) or of the first only."""
    batch, device = Batch(None, []), next(model.parameters()).device

    def hook(module, args, kwargs):
        key, value = _hidden_argument(args, kwargs)
        if not batch.calls:
            batch.hidden = as_float32(value.detach())
        # Later hidden states are not kept: only one layer's worth of activations lives at a time.
        rest = dict(kwargs)
        if key != 0:
            rest[key] = None
        batch.calls.append((key, (None, *args[1:]) if key == 0 else args, rest))
        if not full or len(batch.calls) == len(layers):
            raise _Stop

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in dict.fromkeys(layers)]
    try:
        run_model(model, windows.to(device))
    finally:
        for handle in handles:
            handle.remove()
    return batch


def is_chain(model: nn.Module, layers: list[nn.Module], windows: torch.Tensor) -> bool:
    """Whether every layer runs once, in order, on exactly what the layer before it returned."""
    seen, outputs = [], []

    def before(module, args, kwargs):
        value = _hidden_argument(args, kwargs)[1] if args or kwargs else None
        broken = bool(outputs) and not (isinstance(value, torch.Tensor) and same(value, outputs[-1]))
        seen.append(None if broken else module)

    def after(module, args, output):
        outputs.append(first_tensor(output).clone())

    handles = []
    for layer in dict.fromkeys(layers):
        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after))
    try:
        run_model(model, windows.to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return len(seen) == len(layers) and all(a is b for a, b in zip(seen, layers, strict=True))


def _hidden_argument(args, kwargs):
    """Position (0) or keyword, and value, of the hidden state in a layer's call."""
    if args:
        return 0, args[0]
    key = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return key, kwargs[key]


def same(a, b) -> bool:
    """Equality of nested arguments, tensors by value."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a is b or (type(a) is type(b) and not hasattr(a, "__dict__") and a == b)


def run_layer(layer: nn.Module, batch: Batch, index: int) -> torch.Tensor:
    """Output hidden state float32 of one layer on one batch."""
    args, kwargs = batch.arguments(index)
    with torch.no_grad():
        return first_tensor(layer(*args, **kwargs))


@contextlib.contextmanager
def observe(modules: dict[str, nn.Module], see):
    """Call ``see(name, args, kwargs)`` before every forward of the named modules inside the context."""
    def hook(name):
        return lambda _, args, kwargs: see(name, args, kwargs)

    handles = [m.register_forward_pre_hook(hook(name), with_kwargs=True) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def in_float32(module: nn.Module, leave: tuple[type, ...] = ()):
    """Hold a module's floating parameters and buffers in float32; give the original dtypes back on exit.

    Parameters
    ----------
    module : nn.Module
    leave : tuple of type
        Submodules of these types are not touched (packed matrices keep their stored fp16 numbers).
    """
    held = []
    for part in module.modules():
        if isinstance(part, leave):
            continue
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float32:
                held.append((tensor, tensor.dtype))
    for tensor, _ in held:
        tensor.data = tensor.data.to(torch.float32)
    try:
        yield
    finally:
        for tensor, dtype in held:
            tensor.data = tensor.data.to(dtype)
