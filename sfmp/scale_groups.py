"""Scale groups: where an AWQ scale can be folded away without changing what the model computes.

Dividing an operation's output channels by ``s`` and multiplying the matching input columns of the linears
that read it by ``s`` changes nothing, if nobody else reads that output and everything in between is linear
in it.  Groups of known layers are declared as data; for all other layers they are discovered: a norm and
the linears that receive its very output tensor, and pairs of linears (value -> output projection, also
under grouped-query attention; up -> down). Declared or discovered, a group is used only after a numerical
test on the layer at hand.

Source: METHOD.md sections 1.6 and 1.12 (defects 11, 12, 17).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sfmp.walk import Batch, run_layer

# (previous operation, linears that read it, module whose output error is inspected), names inside the layer.
_LLAMA = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn"),
    ("self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj"),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
    ("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj"),
)
_OPT = (
    ("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn"),
    ("self_attn.v_proj", ("self_attn.out_proj",), "self_attn.out_proj"),
    ("final_layer_norm", ("fc1",), "fc1"),
    ("fc1", ("fc2",), "fc2"),
)
DECLARED = {
    "LlamaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _LLAMA,
    "OPTDecoderLayer": _OPT,
}

# Last path components of the projections whose products with each other go through a softmax; clipping is not
# searched for them because their own output error says little about the attention it causes (METHOD 1.6).
NO_CLIP = frozenset({
    "q_proj", "k_proj", "q", "k", "wq", "wk", "query", "key", "q_lin", "k_lin", "to_q", "to_k",
    "qkv", "qkv_proj", "qkv_linear", "query_key_value", "Wqkv", "W_pack", "c_attn", "in_proj",
})  # fmt: skip

TOLERANCE = 1e-3  # of what the layer adds to its input; a false group misses by 0.1 and more
_FORMS = ("weight", "one_plus_weight")  # norms that multiply by w, and by 1 + w


@dataclass(frozen=True)
class ScaleGroup:
    """One foldable scale.

    Attributes
    ----------
    previous : str
        Operation whose output channels are divided by the scale.
    linears : tuple of str
        All linears that read it; their input columns are multiplied.
    inspect : str
        Module whose output error the search minimises.
    form : str
        ``weight`` or ``one_plus_weight`` for a norm, ``rows`` for a linear.
    head_dim : int
        For grouped-query attention: previous channels come in heads of this size, each read by several
        heads in a row; 0 when channels correspond one to one.
    """

    previous: str
    linears: tuple[str, ...]
    inspect: str
    form: str
    head_dim: int = 0

    def channels(self, layer: nn.Module) -> torch.Tensor:
        """Channel of the previous operation that feeds each input column of the linears, int64 [K]."""
        previous = layer.get_submodule(self.previous).weight
        weight = layer.get_submodule(self.linears[0]).weight
        index = torch.arange(previous.shape[0], device=weight.device)
        if self.head_dim:
            repeats = weight.shape[1] // previous.shape[0]
            index = index.view(-1, 1, self.head_dim).expand(-1, repeats, -1).reshape(-1)
        return index


def fold(layer: nn.Module, group: ScaleGroup, scale: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
    """Divide the previous operation by `scale` and multiply the linears by it, in place.

    Parameters
    ----------
    layer : nn.Module
        In float32.
    group : ScaleGroup
    scale : Tensor float32 [channels of the previous operation]
        Positive.
    dtype : torch.dtype
        The dtype the previous operation will be stored in.

    Returns
    -------
    Tensor float32 [K]
        Scale of each input column, as really applied: a norm weight is rounded to `dtype` first and the
        linears get the ratio that this rounding left, so folding changes nothing even in half precision.
    """
    previous = layer.get_submodule(group.previous)
    with torch.no_grad():
        if group.form == "rows":
            previous.weight.div_(scale[:, None])
        else:
            offset = 1.0 if group.form == "one_plus_weight" else 0.0
            old = previous.weight + offset
            previous.weight.copy_((old / scale - offset).to(dtype))
            new = previous.weight + offset
            scale = torch.where(new == 0, scale, old / torch.where(new == 0, 1.0, new))
            scale = torch.where(scale > 0, scale, 1.0)
        if getattr(previous, "bias", None) is not None:
            previous.bias.div_(scale)
        columns = scale[group.channels(layer)]
        for name in group.linears:
            layer.get_submodule(name).weight.mul_(columns)
    return columns


@dataclass
class Trace:
    """What a layer did on the probe: calls of its linears and norms, in order.

    ``inputs`` and ``outputs`` map a module name to the identity of its tensor (address, elements); a module
    called more than once is in ``repeated`` and in no group.
    """

    inputs: dict[str, tuple]
    outputs: dict[str, tuple]
    norms: list[str]
    repeated: set[str]
    result: torch.Tensor


def trace(layer: nn.Module, probe: Batch, index: int) -> Trace:
    """Run the layer on the probe and note which tensor went into and came out of each linear and norm."""
    found = Trace({}, {}, [], set(), probe.hidden)
    alive, handles = [], []  # tensors are kept so that an address names one tensor only

    def hook(name, linear):
        def see(module, args, output):
            if not args or not isinstance(args[0], torch.Tensor) or not isinstance(output, torch.Tensor):
                return
            if not linear and (output.ndim < 1 or output.shape[-1] != module.weight.numel()):
                return
            if name in found.outputs:
                found.repeated.add(name)
            alive.extend((args[0], output))
            found.inputs[name] = (args[0].data_ptr(), args[0].numel())
            found.outputs[name] = (output.data_ptr(), output.numel())
            if not linear:
                found.norms.append(name)

        return see

    for name, module in layer.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Linear) or (weight is not None and weight.ndim == 1):
            handles.append(module.register_forward_hook(hook(name, isinstance(module, nn.Linear))))
    try:
        found.result = run_layer(layer, probe, index)
    finally:
        for handle in handles:
            handle.remove()
    return found


def find_groups(layer: nn.Module, probe: Batch, index: int, planned, shared=frozenset()):
    """Scale groups of a layer, each proved on the probe.

    Parameters
    ----------
    layer : nn.Module
        In float32, evaluation mode.
    probe : Batch
        A short batch; `index` is the layer's place among the batch's calls.
    planned : collection of str
        Linears that will be quantized, names inside the layer; groups without any are left out.
    shared : collection of int
        ``id`` of parameters used in more than one place of the model; they are never scaled.

    Returns
    -------
    groups : list of ScaleGroup
        In the order of execution.
    refused : list of str
        One sentence per declared or norm group that did not pass, naming what is lost.
    """
    seen = trace(layer, probe, index)
    declared = DECLARED.get(type(layer).__name__)
    candidates = _declared(layer, seen, declared) if declared else _norm_groups(seen)
    groups, refused, covered = [], [], set()
    for previous, linears, inspected in candidates:
        if not any(name in planned for name in linears):
            continue
        covered.update(linears)
        group = _prove(layer, probe, index, seen, previous, linears, inspected, shared)
        if group is None:
            tied = any(id(p) in shared for n in linears for p in layer.get_submodule(n).parameters())
            why = "would change a shared weight" if tied else f"changes the output of {type(layer).__name__}"
            refused.append(f"dividing {previous} and multiplying {', '.join(linears)} {why}; "
                           "these linears are quantized without an AWQ scale")
        else:
            groups.append(group)
    for linears in _readers(seen, [n for n in planned if n in seen.inputs and n not in covered]):
        order = [n for n in seen.outputs if n not in seen.norms]
        earlier = order[: min(order.index(n) for n in linears)]
        inspected = linears[0] if len(linears) == 1 else _ancestor(linears)
        for previous in reversed(earlier):
            group = _prove(layer, probe, index, seen, previous, linears, inspected, shared)
            if group is not None:
                groups.append(group)
                break
    return groups, refused


def _declared(layer, seen, table):
    names = {name for name, _ in layer.named_modules()}
    for previous, linears, inspected in table:
        if {previous, *linears, inspected} <= names and all(n in seen.inputs for n in linears):
            yield previous, linears, inspected


def _norm_groups(seen):
    """Norms with the linears that receive their very output tensor."""
    for norm in seen.norms:
        readers = tuple(
            n for n, key in seen.inputs.items() if n not in seen.norms and key == seen.outputs[norm]
        )
        if readers:
            yield norm, readers, readers[0] if len(readers) == 1 else _ancestor(readers)


def _readers(seen, names):
    """Linears of `names`, grouped with all linears that read the same tensor."""
    done = set()
    for name in names:
        if name not in done:
            readers = tuple(
                n for n, key in seen.inputs.items() if n not in seen.norms and key == seen.inputs[name]
            )
            done.update(readers)
            yield readers


def _ancestor(names) -> str:
    """Deepest module that contains all names ("" is the layer itself)."""
    parts = [name.split(".")[:-1] for name in names]
    depth = 0
    while all(len(p) > depth for p in parts) and len({p[depth] for p in parts}) == 1:
        depth += 1
    return ".".join(parts[0][:depth])


def _prove(layer, probe, index, seen, previous, linears, inspected, shared):
    """First variant of a candidate that leaves the layer's output unchanged under a random scale, or None."""
    if seen.repeated & {previous, *linears}:
        return None
    touched = [layer.get_submodule(previous), *(layer.get_submodule(n) for n in linears)]
    parameters = [p for module in touched for p in module.parameters(recurse=False)]
    if any(id(p) in shared for p in parameters) or touched[0]._parameters.get("weight") is None:
        return None
    produced, read = touched[0].weight.shape[0], touched[1].in_features
    if isinstance(touched[0], nn.Linear):
        forms = [("rows", 0)] if produced == read else []
        if read > produced and read % produced == 0:
            known = getattr(touched[0], "head_dim", None) or _head_dim(layer)
            sizes = [d for d in range(produced, 0, -1) if produced % d == 0]
            forms = [("rows", d) for d in sorted(sizes, key=lambda d: (d != known, -d))]
    else:
        forms = [(form, 0) for form in _FORMS] if produced == read else []
    saved = [p.detach().clone() for p in parameters]
    noise = torch.Generator().manual_seed(0)
    scale = torch.exp(torch.rand(produced, generator=noise) * 1.4 - 0.7).to(parameters[0].device)
    update = seen.result - probe.hidden if seen.result.shape == probe.hidden.shape else seen.result
    for form, head_dim in forms:
        group = ScaleGroup(previous, tuple(linears), inspected, form, head_dim)
        fold(layer, group, scale)
        change = (run_layer(layer, probe, index) - seen.result).abs().max()
        for parameter, value in zip(parameters, saved, strict=True):
            parameter.data.copy_(value)
        if float(change) <= TOLERANCE * float(update.square().mean().sqrt()):
            return group
    return None


def _head_dim(layer) -> int:
    """Head size as some module of the layer declares it, or 0."""
    sizes = (getattr(module, "head_dim", 0) for module in layer.modules())
    return next((size for size in sizes if isinstance(size, int) and size > 0), 0)
