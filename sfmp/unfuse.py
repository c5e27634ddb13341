"""Matrices that are no nn.Linear, shown as such: GPT-2's transposed Conv1D, and experts fused in 3-D parameters.

Everything else of the package knows one kind of matrix, ``nn.Linear``.  Here a Conv1D becomes a linear layer of the
same name, and a module of fused experts becomes `RoutedExperts`, in which every expert has matrices of its own, named
``….experts.3.gate_up_proj`` and ``….experts.3.down_proj``.  The new weights are views of the old ones, so nothing is
copied, and the model computes what it did.

Which modules hold fused experts is told by what transformers' ``use_experts_implementation`` leaves on them
(`has_gate`, `is_transposed`, …), not by architecture names; 3-D parameters of any other module stay as they are
(`unknown_fused` names them).

Source: DESIGN.md sections 3, 7; transformers/integrations/moe.py (5.17 to 5.23) for what fused experts compute.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable

import torch
from torch import nn


class RoutedExperts(nn.Module):
    """Experts as modules named by their number, called as the fused module was: (hidden, index, weights).

    Attributes
    ----------
    up : str
        Name of the first matrix of an expert, ``gate_up_proj`` or ``up_proj``; the second is ``down_proj``.
    everyone : bool
        Every expert sees every token: with its routing weight plus 1 / experts. Not the model's function, but one that
        depends on all experts; see `all_experts`.
    """

    def __init__(self, fused: nn.Module):
        super().__init__()
        plain = {key: value for key, value in vars(fused).items() if not key.startswith("_")}
        self.__dict__.update(plain)  # what the gate reads: alpha, limit, config
        for name, module in fused.named_children():  # activation, norm after each expert
            self.add_module(name, module)
        self.up = _up(fused)
        self.gate = type(fused)._apply_gate if fused.has_gate else None
        self.everyone = False
        for number in range(fused.num_experts):
            expert = nn.Module()
            for name in (self.up, "down_proj"):
                weight = getattr(fused, name).detach()[number]
                bias = getattr(fused, f"{name}_bias").detach()[number] if fused.has_bias else None
                expert.add_module(name, _linear(weight.T if fused.is_transposed else weight, bias))
            self.add_module(str(number), expert)

    def expert(self, number: int, tokens: torch.Tensor) -> torch.Tensor:
        """Output [T, hidden] of one expert for tokens [T, hidden]."""
        expert = self.get_submodule(str(number))
        inner = expert.get_submodule(self.up)(tokens)
        inner = self.act_fn(inner) if self.gate is None else self.gate(self, inner)
        output = expert.down_proj(inner)
        return self.post_expert_norm(output) if getattr(self, "has_post_expert_norm", False) else output

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sum of each token's experts, in the order of their numbers.

        Parameters
        ----------
        hidden : Tensor [T, hidden]
        index : Tensor int64 [T, k]
            Experts of each token; numbers past the last expert are nobody (a sentinel of expert parallelism).
        weights : Tensor [T, k]
        """
        result = torch.zeros_like(hidden)
        if self.everyone:
            dense = weights.new_zeros(len(hidden), self.num_experts + 1)
            dense.scatter_add_(1, index.clamp(max=self.num_experts), weights)
            for number in range(self.num_experts):
                share = dense[:, number, None] + 1 / self.num_experts
                result += (self.expert(number, hidden) * share).to(result.dtype)
            return result
        for number in index.unique().tolist():
            if number < self.num_experts:
                token, place = torch.where(index == number)
                output = self.expert(number, hidden[token]) * weights[token, place, None]
                result.index_add_(0, token, output.to(result.dtype))
        return result


def expose_linears(model: nn.Module, names: Iterable[str] | None = None) -> list[tuple[str, nn.Module]]:
    """Replace Conv1D modules and fused experts by linear layers on the same memory, in place.

    Parameters
    ----------
    model : nn.Module
        A model or a part of one, also on the meta device.
    names : iterable of str, optional
        Dotted names of linear layers that are wanted; only the modules that hold one are replaced. All by default.

    Returns
    -------
    list of (str, nn.Module)
        Every place where a module was replaced, and the module that was there.
    """
    wanted = None if names is None else set(names)
    held, made, places = [], {}, list(model.named_modules(remove_duplicate=False))
    for path, module in places:
        if not path or not (is_conv1d(module) or is_fused(module)):
            continue
        if wanted is not None and path not in wanted and not any(n.startswith(path + ".") for n in wanted):
            continue
        if module not in made:
            made[module] = RoutedExperts(module) if is_fused(module) else _linear(module.weight.detach().T, module.bias)
            made[module].train(module.training)
        held.append((path, module))
        model.set_submodule(path, made[module])
    return held


@contextlib.contextmanager
def linears_exposed(model: nn.Module | None):
    """Show every matrix as a linear layer inside the context (`expose_linears`); the model is as found afterwards."""
    held = [] if model is None else expose_linears(model)
    try:
        yield
    finally:
        for path, module in held:
            model.set_submodule(path, module)


def on_linears(function: Callable) -> Callable:
    """Decorate a function of (model, …) so that it sees every matrix as a linear layer (`linears_exposed`)."""

    @functools.wraps(function)
    def exposed(model, *args, **options):
        with linears_exposed(model):
            return function(model, *args, **options)

    return exposed


def fuse_linears(model: nn.Module, original: nn.Module) -> None:
    """Undo `expose_linears`, also after the weights were replaced: gather linear layers as `original` has them.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    original : nn.Module
        The architecture as its class makes it, on the meta device; taken apart.
    """
    for path, module in list(original.named_modules()):
        if is_conv1d(module):
            linear = model.get_submodule(path)
            if isinstance(linear, nn.Linear):
                module.weight, module.bias = _frozen(linear.weight.T), linear.bias
                model.set_submodule(path, module)
        elif is_fused(module):
            experts = model.get_submodule(path)
            if isinstance(experts, RoutedExperts):
                _gather(experts, module)
                model.set_submodule(path, module)


@contextlib.contextmanager
def all_experts(layer: nn.Module):
    """Every expert sees every token inside the context.

    If scaling matrices changes nothing here, it changes nothing in the model: the weights of the experts are
    independent of each other, so a change of one would be seen. In the model itself a short probe reaches few experts.
    """
    experts = [module for module in layer.modules() if isinstance(module, RoutedExperts)]
    try:
        for module in experts:
            module.everyone = True
        yield
    finally:
        for module in experts:
            module.everyone = False


def is_linear(module: nn.Module) -> bool:
    """Whether this is nn.Linear in what it computes; a router that only derives from it is not."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, a linear layer that stores its weight as [K, N]."""
    return type(module).__name__ == "Conv1D" and {"nf", "nx"} <= vars(module).keys()


def is_fused(module: nn.Module) -> bool:
    """Whether this holds experts in 3-D parameters and says how, as transformers' ``use_experts_implementation``
    does."""
    flags = {"has_gate", "has_bias", "is_transposed", "num_experts"}
    if isinstance(module, RoutedExperts) or not flags <= vars(module).keys() or not hasattr(module, "_apply_gate"):
        return False
    return all(getattr(module._parameters.get(name), "ndim", 0) == 3 for name in (_up(module), "down_proj"))


def unknown_fused(model: nn.Module) -> list[str]:
    """Names of floating parameters with three axes that are neither convolutions nor experts `is_fused` knows."""
    return [f"{path}.{key}" if path else key for path, module in model.named_modules()
            if not isinstance(module, nn.modules.conv._ConvNd) and not is_fused(module)
            for key, parameter in module._parameters.items()
            if parameter is not None and parameter.ndim == 3 and min(parameter.shape) > 1
            and parameter.is_floating_point()]


def _up(fused):
    return "gate_up_proj" if fused.has_gate else "up_proj"


def _linear(weight, bias):
    """nn.Linear on these tensors, without allocating its own."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = _frozen(weight, requires_grad=True)
    if bias is not None:
        linear.bias = bias if isinstance(bias, nn.Parameter) else _frozen(bias, requires_grad=True)
    return linear


def _gather(experts, fused):
    """Give a fused module on the meta device the matrices of `experts`."""
    for name in (experts.up, "down_proj"):
        linears = [experts.get_submodule(f"{number}.{name}") for number in range(experts.num_experts)]
        weights = torch.stack([linear.weight.detach() for linear in linears])
        setattr(fused, name, _frozen(weights.mT.contiguous() if fused.is_transposed else weights))
        if fused.has_bias:
            setattr(fused, f"{name}_bias", _frozen(torch.stack([linear.bias.detach() for linear in linears])))
    for name, module in experts.named_children():
        if not name.isdigit():
            fused.add_module(name, module)


def _frozen(tensor, requires_grad=False):
    return nn.Parameter(tensor.detach(), requires_grad=requires_grad)
