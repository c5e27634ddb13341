"""Who reads what inside a layer: seen by running it, told by the identity of tensors, not by names.

Source: METHOD.md section 1.6.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from sfmp.walk import Batch, run_layer


@dataclass
class Trace:
    """What a layer did on the probe: calls of its linears, norms and routers, in order.

    Attributes
    ----------
    inputs : dict of str to tuple
        Modules with a 2-D weight (linears, and routers of experts) → identity of the tensor they read (address,
        elements).
    outputs : dict of str to tuple
        Modules with a weight that return one tensor → its identity.
    norms : list of str
    repeated : set of str
        Modules called more than once; they are in no group.
    result : Tensor float32
        Output of the layer.
    """

    inputs: dict[str, tuple]
    outputs: dict[str, tuple]
    norms: list[str]
    repeated: set[str]
    result: torch.Tensor

    def readers(self, tensor: tuple) -> tuple[str, ...]:
        """Modules with a 2-D weight that read this very tensor."""
        return tuple(name for name, key in self.inputs.items() if key == tensor)

    def after_norms(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Norms whose output some module with a 2-D weight reads, and these modules."""
        for norm in self.norms:
            readers = self.readers(self.outputs[norm])
            if readers:
                yield norm, readers

    def together(self, names) -> Iterator[tuple[str, ...]]:
        """The named modules, each with all that read the same tensor."""
        done = set()
        for name in names:
            if name not in done:
                readers = self.readers(self.inputs[name])
                done.update(readers)
                yield readers

    def linears_before(self, names) -> list[str]:
        """Modules with a 2-D weight that ran before the first of the named, the last one first."""
        order = [name for name in self.outputs if name not in self.norms]
        return order[: min(order.index(name) for name in names if name in self.outputs)][::-1]


def trace(layer: nn.Module, probe: Batch, index: int) -> Trace:
    """Run the layer on the probe and note which tensor went into and came out of each linear, norm and router."""
    found = Trace({}, {}, [], set(), probe.hidden)
    alive, handles = [], []  # tensors are kept so that an address names one tensor only

    def hook(name, is_norm):
        def see(module, args, output):
            if not args or not isinstance(args[0], torch.Tensor) or not args[0].is_floating_point():
                return
            returned = isinstance(output, torch.Tensor)
            if is_norm and (not returned or output.ndim < 1 or output.shape[-1] != module.weight.numel()):
                return
            if name in found.inputs or name in found.outputs:
                found.repeated.add(name)
            alive.extend((args[0], output))
            if is_norm:
                found.norms.append(name)
            else:
                found.inputs[name] = (args[0].data_ptr(), args[0].numel())
            if returned:
                found.outputs[name] = (output.data_ptr(), output.numel())

        return see

    for name, module in layer.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim in (1, 2):
            handles.append(module.register_forward_hook(hook(name, weight.ndim == 1)))
    try:
        found.result = run_layer(layer, probe, index)
    finally:
        for handle in handles:
            handle.remove()
    return found


def shared_inputs(layer: nn.Module, probe: Batch, index: int, names) -> dict[str, str]:
    """For each named linear the first one that reads the same tensor (itself when it reads alone)."""
    seen = trace(layer, probe, index)
    first, leaders = {}, {}
    for name in names:
        if name in seen.inputs and name not in seen.repeated:
            leaders[name] = first.setdefault(seen.inputs[name], name)
    return leaders
