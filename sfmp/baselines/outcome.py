"""What every method returns: the quantized model, the bytes it has to store, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import nn

from sfmp.baselines.bitstack_linear import BitStackLinear
from sfmp.checks import SfmpError
from sfmp.cost import CostRecord
from sfmp.linear import SFMPLinear
from sfmp.spec import Plan


@dataclass
class Outcome:
    """Result of one method at one budget.

    Attributes
    ----------
    model : nn.Module
        The model it was given, quantized in place.
    bpw : float
        Bits per quantized weight reached, in the paper's account (codes, scales, offsets; all bytes for a
        method without codes).
    stored_bytes : int
        Bytes the method has to store for the quantized matrices (:func:`stored_bytes`).
    cost : CostRecord
        Stages with seconds, peak memory and model evaluations.
    plan : Plan or None
        Bits of every block, for a method that ends in such.
    notes : dict
        JSON-able and deterministic: the knobs used, and what the method decided.
    """

    model: nn.Module
    bpw: float
    stored_bytes: int
    cost: CostRecord
    plan: Plan | None = None
    notes: dict = field(default_factory=dict)


def stored_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes by part that the quantized matrices of a model have to store.

    Parameters
    ----------
    model : nn.Module
        With `SFMPLinear` or `BitStackLinear` layers.

    Returns
    -------
    dict of str to int
        ``planes, affine, bit_map, permutations, signs, factors``, zero where a part does not occur. The
        checkpoint format writes permutations and bit maps for every matrix; a method is charged only for those
        that say something: a permutation that is no identity, and a bit map with more than one value (one byte
        per matrix otherwise). A bias belongs to no quantized weight.

    Raises
    ------
    SfmpError
        If no layer is quantized.
    """
    parts = dict.fromkeys(("planes", "affine", "bit_map", "permutations", "signs", "factors"), 0)
    layers = [m for m in model.modules() if isinstance(m, SFMPLinear | BitStackLinear)]
    if not layers:
        raise SfmpError("model: expected a quantized layer, found none; quantize the model first")
    for layer in layers:
        for part, count in _layer_bytes(layer).items():
            parts[part] += count
    return parts


def _layer_bytes(layer) -> dict[str, int]:
    if isinstance(layer, BitStackLinear):
        return {"signs": _bytes(layer.signs), "factors": _bytes(layer.left) + _bytes(layer.right)}
    permutations = sum(_bytes(p) for p in (layer.row_perm, layer.col_perm) if not _is_identity(p))
    one_width = len(np.unique(layer.block_bits.cpu().numpy())) == 1
    return {"planes": _bytes(layer.planes), "affine": _bytes(layer.alpha) + _bytes(layer.beta),
            "bit_map": 1 if one_width else _bytes(layer.block_bits), "permutations": permutations}


def _bytes(tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _is_identity(permutation) -> bool:
    values = permutation.cpu().numpy()
    return bool((values == np.arange(len(values))).all())
