"""Scale groups: where an AWQ scale can be folded away without changing what the model computes.

Dividing an operation's output channels by ``s`` and multiplying the matching input columns of the linears
that read it by ``s`` changes nothing, if nobody else reads that output and everything in between is linear
in it.  No architecture is known here.  Candidates are a norm and all that reads its very output tensor (linears,
routers, experts), and pairs of linears: value → output projection, also under grouped-query attention and when the
values are a part of a fused projection; up → down, also when up is a part of a fused one.  A candidate becomes a group
only if folding leaves the output of the layer at hand as it is.

The proof folds powers of two.  These scale floating-point numbers exactly, so a true group changes no bit of the
output, in any precision, and no routing decision of experts; only norms that multiply by 1 + w round anew, by 2⁻²⁴ of
each channel.  `TOLERANCE` lets the layer grow that a thousandfold; a false group misses by 0.1 and more.  The powers
reach far (`_REACH`), so that limits which the probe itself stays within, such as clamped queries, keys and values, are
run into.

Source: METHOD.md sections 1.6 and 1.12 (defects 11, 12, 17).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from sfmp.trace import Trace, trace
from sfmp.unfuse import RoutedExperts, all_experts
from sfmp.walk import Batch, run_layer

# Last path components of the projections whose products with each other go through a softmax; clipping is not
# searched for them because their own output error says little about the attention it causes (METHOD 1.6).
NO_CLIP = frozenset({
    "q_proj", "k_proj", "q", "k", "wq", "wk", "query", "key", "q_lin", "k_lin", "to_q", "to_k",
    "qkv", "qkv_proj", "qkv_linear", "query_key_value", "Wqkv", "W_pack", "c_attn", "in_proj",
})  # fmt: skip

TOLERANCE = 2.0**-14  # of what the layer adds to its input (root mean square)
_FORMS = ("weight", "one_plus_weight")  # norms that multiply by w, and by 1 + w
_REACH = {"one_plus_weight": 1}  # largest exponent of two that is folded; elsewhere 8, where nothing rounds


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
    part : (int, int, int) or ()
        Which outputs of a fused linear the linears read: ``run`` of them from ``first``, then from ``first + step``,
        and so on. Empty for all.
    """

    previous: str
    linears: tuple[str, ...]
    inspect: str
    form: str
    head_dim: int = 0
    part: tuple[int, ...] = ()

    def outputs(self, layer: nn.Module) -> torch.Tensor:
        """Outputs of the previous operation that the scale divides, int64 [channels]."""
        weight = layer.get_submodule(self.previous).weight
        index = torch.arange(weight.shape[0], device=weight.device)
        if self.part:
            first, run, step = self.part
            index = index[(index >= first) & ((index - first) % step < run)]
        return index

    def channels(self, layer: nn.Module) -> torch.Tensor:
        """Entry of the scale that multiplies each input column of the linears, int64 [K]."""
        weight = layer.get_submodule(self.linears[0]).weight
        index = torch.arange(len(self.outputs(layer)), device=weight.device)
        if self.head_dim:
            repeats = weight.shape[1] // len(index)
            index = index.view(-1, 1, self.head_dim).expand(-1, repeats, -1).reshape(-1)
        return index


def fold(layer: nn.Module, group: ScaleGroup, scale: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
    """Divide the previous operation by `scale` and multiply the linears by it, in place.

    Parameters
    ----------
    layer : nn.Module
        In float32.
    group : ScaleGroup
    scale : Tensor float32 [channels]
        Positive; one entry for each of ``group.outputs(layer)``.
    dtype : torch.dtype
        The dtype the previous operation will be stored in.

    Returns
    -------
    Tensor float32 [K]
        Scale of each input column, as really applied: a norm weight is rounded to `dtype` first and the
        linears get the ratio that this rounding left, so folding changes nothing even in half precision.
    """
    previous, outputs = layer.get_submodule(group.previous), group.outputs(layer)
    with torch.no_grad():
        if group.form == "rows":
            previous.weight[outputs] /= scale[:, None]
        else:
            offset = 1.0 if group.form == "one_plus_weight" else 0.0
            old = previous.weight + offset
            previous.weight.copy_((old / scale - offset).to(dtype))
            new = previous.weight + offset
            scale = torch.where(new == 0, scale, old / torch.where(new == 0, 1.0, new))
            scale = torch.where(scale > 0, scale, 1.0)
        if getattr(previous, "bias", None) is not None:
            previous.bias[outputs] /= scale
        columns = scale[group.channels(layer)]
        for name in group.linears:
            layer.get_submodule(name).weight.mul_(columns)
    return columns


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
        One sentence per norm whose group did not pass, and per input that several linears read and that no scale can
        be folded into, naming what is lost.
    """
    with all_experts(layer):
        seen = trace(layer, probe, index)
        prove = _Prover(layer, probe, index, seen, shared)
        groups, refused, covered = [], [], set()
        for previous, linears in seen.after_norms():
            if not any(name in planned for name in linears):
                continue
            covered.update(linears)
            proved = prove([(previous, linears)])
            groups += proved
            if not proved:
                tied = any(id(p) in shared for n in linears for p in layer.get_submodule(n).parameters())
                why = "would change a shared weight" if tied else f"changes the output of {type(layer).__name__}"
                refused.append(f"dividing {previous} and multiplying {', '.join(linears)} {why}; "
                               "these linears are quantized without an AWQ scale")
        rest = seen.together([n for n in planned if n in seen.outputs and n not in covered])
        for family in _families(layer, rest):
            found = next(filter(None, map(prove, _predecessors(seen, family))), [])
            groups += found
            # What is read by one alone may come from an activation; what several read would come from a norm.
            refused += [f"found nothing that a scale for {', '.join(linears)} can be folded into; these linears are "
                        "quantized without an AWQ scale" for _, linears in family if len(linears) > 1 and not found]
    order = list(seen.inputs)
    return sorted(groups, key=lambda group: order.index(group.linears[0])), refused


def _families(layer, readers):
    """Sets of linears that one proof decides: (expert, linears) of all experts of a module at once, others alone."""
    experts = [name for name, module in layer.named_modules() if isinstance(module, RoutedExperts)]
    pattern = re.compile("|".join(rf"{re.escape(name + '.' if name else '')}\d+\." for name in experts) or r"(?!)")
    families = {}
    for linears in readers:
        expert = pattern.match(linears[0])
        start = expert.group() if expert else ""
        key = (re.sub(r"\d+\.$", "", start), *(name[len(start):] for name in linears)) if start else linears
        families.setdefault(key, []).append((start, linears))
    return families.values()


def _predecessors(seen, family):
    """Candidates for a family: the linears that ran before, of the same expert where it is experts'."""
    start, linears = family[0]
    for previous in seen.linears_before(linears):
        if previous.startswith(start):
            yield [(other + previous[len(start):], names) for other, names in family]


class _Prover:
    """Tells whether folding a random scale leaves the output of a layer unchanged."""

    def __init__(self, layer, probe: Batch, index: int, seen: Trace, shared):
        self.layer, self.probe, self.index, self.seen, self.shared = layer, probe, index, seen, shared
        update = seen.result - probe.hidden if seen.result.shape == probe.hidden.shape else seen.result
        self.allowed = TOLERANCE * float(update.square().mean().sqrt())
        sizes = (getattr(module, "head_dim", 0) for module in layer.modules())
        self.head_dim = next((size for size in sizes if isinstance(size, int) and size > 0), 0)

    def __call__(self, members) -> list[ScaleGroup]:
        """The groups that (previous, linears) of all members are in the first form that changes nothing, or none."""
        names = {name for previous, linears in members for name in (previous, *linears)}
        touched = [self.layer.get_submodule(name) for name in names]
        parameters = [p for module in touched for p in module.parameters(recurse=False)]
        if names & self.seen.repeated or any(id(p) in self.shared for p in parameters):
            return []
        saved = [p.detach().clone() for p in parameters]
        for form in self._forms(*members[0]):
            groups = [ScaleGroup(previous, linears, linears[0] if len(linears) == 1 else _ancestor(linears), *form)
                      for previous, linears in members]
            noise = torch.Generator().manual_seed(0)
            for group in groups:
                reach = _REACH.get(group.form, 8)
                exponents = torch.randint(-reach, reach + 1, (len(group.outputs(self.layer)),), generator=noise)
                fold(self.layer, group, torch.exp2(exponents.to(parameters[0])))
            change = (run_layer(self.layer, self.probe, self.index) - self.seen.result).abs().max()
            for parameter, value in zip(parameters, saved, strict=True):
                parameter.data.copy_(value)
            if float(change) <= self.allowed:
                return groups
        return []

    def _forms(self, previous, linears):
        """(form, head_dim, part) worth a proof, by shapes."""
        produced = self.layer.get_submodule(previous).weight.shape[0]
        read = self.layer.get_submodule(linears[0]).weight.shape[1]
        if previous in self.seen.norms:
            return [(form, 0, ()) for form in _FORMS] if produced == read else []
        forms = [("rows", size, ()) for size in self._heads(produced, read)]
        if produced == 2 * read:  # gate and up, one after the other or in turns
            forms += [("rows", 0, part) for part in ((read, read, produced), (0, read, produced), (1, 1, 2), (0, 1, 2))]
        values, odd = divmod(produced - read, 2)
        if values > 0 and not odd:  # queries, keys and values: all heads of each, or each head's (or group's) of all
            repeats = read // values
            for size in self._heads(values, read):
                forms.append(("rows", size, (produced - values, values, produced)))
            for size in self._heads(values, read, every=True):
                forms.append(("rows", size if repeats > 1 else 0, ((repeats + 1) * size, size, (repeats + 2) * size)))
        return forms

    def _heads(self, values, read, every=False):
        """Head sizes with which `values` channels can feed `read` columns; 0 where they correspond one to one."""
        if values == read and not every:
            return [0]
        if values == 0 or read % values:
            return []
        if self.head_dim and values % self.head_dim == 0:
            return [self.head_dim]
        return [size for size in range(values, 0, -1) if values % size == 0]


def _ancestor(names) -> str:
    """Deepest module that contains all names ("" is the layer itself)."""
    parts = [name.split(".")[:-1] for name in names]
    depth = 0
    while all(len(p) > depth for p in parts) and len({p[depth] for p in parts}) == 1:
        depth += 1
    return ".".join(parts[0][:depth])
