"""Which matrices read the same activations: seen while a model runs, kept with the salience, used to share columns.

Products of one input with several matrices can share what is prepared from it (gathered activations, tables of partial
sums) if the matrices agree on the order of their columns. Who may agree is found by watching, not by names: linears
that are handed the very same tensor at every call, as q, k and v, gate and up, or experts that are all given one.

Source: METHOD.md section 1.4 (the authors' matrices have permutations of their own).
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping

import torch


class Salience(dict):
    """Salience by name, with a record of which matrices read the same activations.

    Parameters
    ----------
    matrices : mapping name -> float32 tensor [N, K]
    readers : iterable of groups of names, optional
        Every matrix in one group: those that read the same activations, alone if it shares them with none. None if
        nobody looked, as for salience that runs no model.

    Examples
    --------
    >>> Salience({"q": 1, "k": 2, "o": 3}, [("q", "k"), ("o",)]).readers
    (('q', 'k'), ('o',))
    """

    def __init__(self, matrices: Mapping, readers: Iterable[Iterable[str]] | None = None):
        super().__init__(matrices)
        self.readers = None if readers is None else tuple(map(tuple, readers))


class InputRecord(contextlib.ExitStack):
    """While the context is open, notes which tensor each of the named modules is called with.

    Parameters
    ----------
    layers : mapping name -> nn.Module
    """

    def __init__(self, layers: Mapping[str, torch.nn.Module]):
        super().__init__()
        self._calls = {name: [] for name in layers}
        self._layers, self._known, self._numbers = layers, {}, itertools.count()

    def __enter__(self):
        for name, layer in self._layers.items():
            self.callback(layer.register_forward_pre_hook(self._noter(name), with_kwargs=True).remove)
        return self

    def _noter(self, name):
        def note(module, args, kwargs):
            tensor = args[0] if args else kwargs.get("input")
            if not isinstance(tensor, torch.Tensor):
                self._calls[name].append(next(self._numbers))  # equal to no other
                return
            held, number = self._known.get(id(tensor), (None, 0))
            if held is None or held() is not tensor:  # a weak reference: an address may be used again
                number = next(self._numbers)
                self._known[id(tensor)] = weakref.ref(tensor), number
            changes = 0 if tensor.is_inference() else tensor._version
            self._calls[name].append((number, changes))

        return note

    def leave_bypassed(self, used: Iterable[str]) -> set[str]:
        """Drop and return those of `used` whose layer was never called: other code multiplies by their weight itself.

        Such a weight (dt_proj of Mamba) must stay a tensor. A warning names them.
        """
        bypassed = {name for name in used if not self._calls[name]}
        for name in bypassed:
            del self._calls[name]
        if bypassed:
            warnings.warn(f"{', '.join(sorted(bypassed))}: used without calling the layer, so it can not be replaced; "
                          "left as it is", stacklevel=4)
        return bypassed

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Names by equal calls, in the order of the layers; who was never called is alone."""
        found = {}
        for name, calls in self._calls.items():
            found.setdefault(tuple(calls) or name, []).append(name)
        return tuple(map(tuple, found.values()))


def weights_read_elsewhere(linears: Mapping[str, torch.nn.Linear], run: Callable[[], object]) -> list[str]:
    """Names of linear layers whose weight other code than the layer's own reads while `run` runs.

    Such a weight (dt_proj of Mamba) must stay a tensor: nothing can take the place of the layer.
    """
    read, kinds = [], {name: type(linear) for name, linear in linears.items()}

    def watched(name, kind):
        def weight(linear):
            if not linear.__dict__.get("_called"):
                read.append(name)
            return linear._parameters["weight"]

        def call(linear, *args, **kwargs):  # not forward: accelerate puts another in its place
            linear.__dict__["_called"] = True
            try:
                return kind.__call__(linear, *args, **kwargs)
            finally:
                del linear.__dict__["_called"]

        return type(kind.__name__, (kind,), {"weight": property(weight), "__call__": call})

    try:
        for name, linear in linears.items():
            linear.__class__ = watched(name, kinds[name])
        run()
    finally:
        for name, linear in linears.items():
            linear.__class__ = kinds[name]
    return list(dict.fromkeys(read))
