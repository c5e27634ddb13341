"""fuse: one product for matrices that read the same activations, so that a decode step launches fewer kernels.

    quantize_model(model, make_plan(salience, QuantSpec(bpw=3, shared_columns=True)))
    fuse(model)                                    # q, k, v become one product, gate and up another

What is fused is derived, as a kernel's own layout is: the layers keep their tensors, ``state_dict`` and
``save_pretrained`` give what they gave before, and a checkpoint that is loaded is fused again by whoever wants that.
The price is memory: the merged matrix beside the stored ones.

How it works. The layers stay where they are; no forward of an architecture is rewritten. While their parent module
runs, the first layer that is called computes the outputs of all and the others take theirs, if they are given the very
same tensor, unchanged since. Everywhere else (a layer called on its own, other activations, compilation, a gradient of
a bias) a layer computes what it always did. So what is kept lives as long as one call of the parent, also if that
fails; it is kept by thread; and a CUDA graph captures the one product, for Python decides at capture what runs.
"""

from __future__ import annotations

import dataclasses
import threading
from itertools import accumulate, pairwise

import torch
from torch import nn
from torch.compiler import is_compiling

from sfmp.checks import SfmpError
from sfmp.linear import SFMPLinear
from sfmp.merge import common_rows, merge
from sfmp.packed import TENSORS, current_cache, version

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # names of siblings that read the same activations


@dataclasses.dataclass(frozen=True)
class FuseReport:
    """What `fuse` did.

    Attributes
    ----------
    fused : tuple of tuples of str
        Names of the layers that are one product.
    left : dict of str to str
        Name of a layer → why it is on its own.
    """

    fused: tuple[tuple[str, ...], ...]
    left: dict[str, str]


class FusedLinear(SFMPLinear):
    """An SFMPLinear that takes its outputs from a `Joint` where it can."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._joint.traced(self, x) if is_compiling() else self._joint.take(self, x)
        return super().forward(x) if y is None else y


class Joint:
    """The layers that are one product, and the product. One token costs one product, no copies.

    Attributes
    ----------
    members : tuple of FusedLinear
    """

    def __init__(self, members):
        self.members = tuple(members)
        self._cache: dict = {}
        self._local = threading.local()
        self._traced: tuple | None = None  # what `_local.shared` is, while a compiler follows the forward

    def __getstate__(self):
        return {"members": self.members}

    def __setstate__(self, state):
        self.__init__(state["members"])

    def open(self, module, args):
        """Before the parent runs: from now on layers may share. A forward pre-hook."""
        self._traced = () if is_compiling() else None
        if not is_compiling():
            self._local.shared = {}

    def close(self, module, args, output):
        """After the parent ran or failed: nothing is kept. A forward hook that is always called."""
        self._traced = None
        if not is_compiling():
            self._local.shared = None

    def take(self, member: FusedLinear, x) -> torch.Tensor | None:
        """Return the outputs of a member, or None if it has to compute them itself.

        That is the case outside its parent, for activations other than those the first member got, for a second call
        with the same, and where the product of all would not be what the product of one is. Inference tensors do not
        count their changes: one that is changed in place between two siblings is not noticed.
        """
        shared = getattr(self._local, "shared", None)
        if shared is None or not isinstance(x, torch.Tensor):
            return None
        asked = member.backend, member.mode, torch.is_grad_enabled(), version(x)
        if not shared:
            if not self._agrees(member):
                return None
            shared.update(x=x, asked=asked, parts=self._parts(member, x))
        if shared["x"] is not x or shared["asked"] != asked:
            return None
        return shared["parts"].pop(member, None)

    def traced(self, member: FusedLinear, x: torch.Tensor) -> torch.Tensor | None:
        """`take` for a compiler, which follows Python once: without what it cannot follow.

        The product is the one of a call before compilation; what changed since is not noticed, as for any SFMPLinear,
        nor is a change of activations in place between two siblings.
        """
        shared, product = self._traced, self._cache.get("product")
        if shared is None or product is None or (product.backend, product.mode) != (member.backend, member.mode):
            return None
        if not shared:
            if not self._agrees(member):
                return None
            self._traced = shared = x, product(x)
        if shared[0] is not x:
            return None
        first = 0
        for other in self.members:
            if other is member:
                break
            first += other.out_features
        return shared[1][..., first : first + member.out_features].contiguous()

    def _agrees(self, member) -> bool:
        """Whether the product of all is what each of them would compute."""
        learning = torch.is_grad_enabled()
        return (any(member is other for other in self.members)  # not a copy, as nn.DataParallel makes them
                and not any("keep" in other._cache or (learning and other.bias is not None and other.bias.requires_grad)
                            for other in self.members))

    def _parts(self, member, x):
        y = self.product(member.backend, member.mode)(x)
        ends = list(accumulate((other.out_features for other in self.members), initial=0))
        # Contiguous as the layers' own outputs are; of a single token a part is that already.
        return {other: y[..., first:last].contiguous()
                for other, (first, last) in zip(self.members, pairwise(ends), strict=True)}

    def product(self, backend: str, mode: str | None) -> SFMPLinear:
        """The merged layer, made from the members' tensors as they are now, with the settings of one of them."""
        held = [member._buffers | member._parameters for member in self.members]
        tensors = tuple(found[key] for found in held for key in (*TENSORS, "bias") if found.get(key) is not None)
        self._cache = current_cache(self._cache, tensors)
        if "product" not in self._cache:
            self._cache["product"] = SFMPLinear.from_packed(merge([member.packed for member in self.members]))
        product = self._cache["product"]
        product.backend, product.mode = backend, mode
        return product


def fuse(model: nn.Module) -> FuseReport:
    """Make one product of the layers of GROUPS that can be one, in place; results do not change.

    Layers can be fused if they are SFMPLinear siblings named as in `GROUPS` whose column order, group size, columns and
    device are the same, and whose row blocks fit each other. ``QuantSpec.shared_columns`` gives q, k and v one column
    order, and gate and up. On the CPU the bits of the results stay; on a GPU sums may be taken in another order.

    Parameters
    ----------
    model : nn.Module
        With SFMPLinear layers, of any architecture. Layers that are fused already stay so.

    Returns
    -------
    FuseReport
        Names of what is fused, and why others are not.

    Raises
    ------
    SfmpError
        The model has no SFMPLinear.

    Notes
    -----
    Source: CUDA.md section 4.2, fused mode.

    Examples
    --------
    >>> fuse(nn.Linear(2, 2))
    Traceback (most recent call last):
    sfmp.checks.SfmpError: model: expected at least one SFMPLinear, found none; quantize the model first
    """
    if not any(isinstance(module, SFMPLinear) for module in model.modules()):
        raise SfmpError("model: expected at least one SFMPLinear, found none; quantize the model first")
    fused, left = [], {}
    for name, parent in model.named_modules():
        for group in GROUPS:
            layers = {key: layer for key in group if isinstance(layer := parent._modules.get(key), SFMPLinear)}
            for keys, why in _partition(layers):
                names = tuple(f"{name}.{key}" if name else key for key in keys)
                if why:
                    left.update(dict.fromkeys(names, why))
                    continue
                fused.append(names)
                members = [layers[key] for key in keys]
                if not isinstance(members[0], FusedLinear):
                    _join(parent, members)
    return FuseReport(tuple(fused), left)


def _partition(layers: dict[str, SFMPLinear]) -> list[tuple[list[str], str]]:
    """Siblings → (keys that are one product, "") and (keys that are not, why)."""
    done: dict[Joint, list[str]] = {}
    alike: dict[tuple, list[str]] = {}
    for key, layer in layers.items():
        if isinstance(layer, FusedLinear):
            done.setdefault(layer._joint, []).append(key)
        else:
            columns = layer.col_perm.cpu().numpy().tobytes()
            alike.setdefault((columns, layer.group_size, layer.col_perm.device), []).append(key)
    found = [(keys, "") for keys in done.values()]
    for keys in alike.values():
        if len(keys) == 1:
            others = ", ".join(key for key in layers if key not in keys) or "no packed sibling"
            found.append((keys, f"its column order, group size or device is not that of {others}; "
                                "QuantSpec.shared_columns makes the orders equal"))
        elif any("forward" in layers[key].__dict__ for key in keys):
            found.append((keys, "a forward was replaced (as accelerate does for offloading)"))
        else:
            fits = common_rows([layers[key].packed for key in keys])
            found.append((keys, "" if fits else "their row blocks do not fit each other"))
    return found


def _join(parent: nn.Module, members: list[SFMPLinear]) -> None:
    joint = Joint(members)
    for member in members:
        member.__class__, member._joint = FusedLinear, joint  # the layer stays: its hooks, its place, its tensors
    parent.register_forward_pre_hook(joint.open)
    parent.register_forward_hook(joint.close, always_call=True)
