"""Guided salience: the objective of GuidedQuant, a Hessian that keeps the cross terms of the inputs.

The loss of a quantized matrix is modelled as the sum over output rows i of dw_i^T H_g(i) dw_i with
H_g = X^T diag(s_g) X, where the output rows are cut into a few groups and s_g[token] is the mean over the rows
of group g of (1000 dL/dz)^2. Without the cross terms this is a weighted square with the weights diag(H_g),
which is what SFMP's allocation can use as salience: its fuller-Hessian control.

Source: METHOD.md section 2.7 (GuidedQuant, arXiv 2505.07004) and experiment S3.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from sfmp.checks import SfmpError, check_permutation, integer
from sfmp.grid import BlockGrid
from sfmp.quantize import dequantize, quantize
from sfmp.readers import InputRecord
from sfmp.reorder import as_numpy
from sfmp.salience import backward_passes, finished, gradients_only_for, linear_modules
from sfmp.unfuse import on_linears

GRADIENT_SCALE = 1e3  # of the publication: keeps squares of small gradients in range; ranks do not depend on it


@on_linears
def guided_salience(model: nn.Module, windows, *, groups: int = 4, skip: Iterable[str] = ("lm_head",),
                    progress: bool = False, loss_fn=None) -> dict[str, torch.Tensor]:
    """Salience of every linear weight from the guided objective without its cross terms.

    Parameters
    ----------
    model : nn.Module
        Any module tree and device, float32 or bfloat16. Left as found: gradient flags, gradients, modes.
    windows : integers [n, seqlen], or any iterable of samples that `loss_fn` understands
        One forward and backward pass each.
    groups : int
        Groups of output rows, contiguous and nearly equal; 4 in the publication. A matrix with fewer rows has
        one for each.
    skip : names of linear layers to leave out, full or last component
    progress : bool
        Show a progress bar.
    loss_fn : callable (model, sample) -> scalar, optional
        Default: the model's own mean next-token cross-entropy.

    Returns
    -------
    Salience, a dict name -> float32 CPU tensor [N, K]
        ``salience[i, j] = sum_t s_g(i)[t] x[t, j]^2 = diag(H_g(i))[j]``: equal for all rows of a group.

    Raises
    ------
    SfmpError
        If there is no linear layer or no sample, a loss is not a finite scalar, or a salience is not finite
        (named).

    Notes
    -----
    Peak memory is the model and the activations of one sample; sums are float32.
    Source: METHOD.md section 2.7.
    """
    layers, groups = linear_modules(model, skip), integer("groups", groups, 1)
    sums = {name: torch.zeros(min(groups, layer.out_features), layer.in_features, dtype=torch.float32,
                              device=layer.weight.device) for name, layer in layers.items()}

    def add(name, tokens, weights):
        sums[name].addmm_(weights.T, tokens.square())

    record = InputRecord(layers)
    with record:
        _pass_over(model, layers, windows, groups, add, loss_fn, progress, "guided salience")
    return finished({name: sums[name].cpu()[_group_of_row(layer.out_features, groups)]
                     for name, layer in layers.items()}, record.groups())


def guided_hessians(model: nn.Module, windows, *, groups: int = 4, skip: Iterable[str] = ("lm_head",),
                    names: Iterable[str] | None = None, progress: bool = False,
                    loss_fn=None) -> dict[str, torch.Tensor]:
    """Hessians H_g = X^T diag(s_g) X of every group of output rows, cross terms included.

    Parameters
    ----------
    names : iterable of str, optional
        Only these matrices: `groups` x K x K numbers each are held at once.
    model, windows, groups, skip, progress, loss_fn
        As in :func:`guided_salience`.

    Returns
    -------
    dict name -> float32 tensor [groups, K, K] on the device of its layer
        Groups as in :func:`guided_salience`.

    Raises
    ------
    SfmpError
        As :func:`guided_salience`, or if a name is no linear layer of the model.
    """
    layers, groups = linear_modules(model, skip), integer("groups", groups, 1)
    if names is not None:
        names = list(names)
        for name in names:
            if name not in layers:
                raise SfmpError(f"names: expected linear layers of the model, found {name!r}")
        layers = {name: layers[name] for name in names}
    sums = {name: torch.zeros(min(groups, layer.out_features), layer.in_features, layer.in_features,
                              dtype=torch.float32, device=layer.weight.device)
            for name, layer in layers.items()}

    def add(name, tokens, weights):
        for hessian, weight in zip(sums[name], weights.T, strict=True):
            hessian.addmm_((tokens * weight[:, None]).T, tokens)

    _pass_over(model, layers, windows, groups, add, loss_fn, progress, "guided Hessians")
    return sums


def block_losses(weight, hessians, row_perm, col_perm, grid: BlockGrid, levels) -> np.ndarray:
    """Guided loss of each block at each level, with the cross terms inside the block.

    Parameters
    ----------
    weight : Tensor [N, K], natural order
    hessians : Tensor [groups, K, K], natural order
        Of :func:`guided_hessians`; the rows of a group are those of that function.
    row_perm, col_perm : int64 [N], int64 [K]
        Of a plan.
    grid : BlockGrid of N x K
    levels : sequence of int

    Returns
    -------
    float64 [blocks, levels]
        ``sum over rows of dw^T H_bb dw``, dw the error of rounding to nearest at that level, H_bb the part of the
        row's Hessian that belongs to the columns of the block. Blocks row-major, as in an allocation.

    Raises
    ------
    SfmpError
        If the shapes disagree.
    """
    if tuple(weight.shape) != (grid.out_features, grid.in_features):
        raise SfmpError(f"weight: expected {grid.out_features} x {grid.in_features} as in the grid, found "
                        f"{tuple(weight.shape)}")
    if hessians.ndim != 3 or tuple(hessians.shape[1:]) != (grid.in_features,) * 2:
        raise SfmpError(f"hessians: expected [groups, {grid.in_features}, {grid.in_features}], found "
                        f"{tuple(hessians.shape)}")
    rows = check_permutation("row_perm", row_perm, grid.out_features)
    cols = check_permutation("col_perm", col_perm, grid.in_features)
    hessians = as_numpy(hessians)
    owner = _group_of_row(grid.out_features, len(hessians)).numpy()[rows]
    permuted = weight.detach().float().cpu()[torch.from_numpy(rows)][:, torch.from_numpy(cols)]
    starts = np.arange(0, grid.out_features, grid.block_rows)
    losses = np.empty((grid.row_blocks, grid.groups, len(levels)))
    for at, level in enumerate(levels):
        bits = np.full((grid.row_blocks, grid.groups), level, dtype=np.uint8)
        rebuilt = dequantize(quantize(permuted, bits, group_size=grid.group_size, block_rows=grid.block_rows))
        error = (permuted - rebuilt).numpy().astype(np.float64)
        for group in range(grid.groups):
            inside = slice(group * grid.group_size, (group + 1) * grid.group_size)
            part, columns = error[:, inside], cols[inside]
            per_row = np.empty(grid.out_features)
            for index, hessian in enumerate(hessians):
                mine = owner == index
                corner = hessian[np.ix_(columns, columns)].astype(np.float64)
                per_row[mine] = np.einsum("rk,rk->r", part[mine] @ corner, part[mine])
            losses[:, group, at] = np.add.reduceat(per_row, starts)
    return losses.reshape(-1, len(levels))


def _sizes(rows, groups):
    """Nearly equal contiguous parts, no empty ones; the first ones get the remainder."""
    groups = min(groups, rows)
    return [rows // groups + (index < rows % groups) for index in range(groups)]


def _group_of_row(rows, groups) -> torch.Tensor:
    """Group of each output row, int64 [rows]."""
    sizes = torch.tensor(_sizes(rows, groups))
    return torch.arange(len(sizes)).repeat_interleave(sizes)


def _pass_over(model, layers, windows, groups, add, loss_fn, progress, title):
    """Call add(name, x float32 [tokens, K], s float32 [tokens, groups]) at every use of every layer."""
    reached = set()

    def watch(name, layer):
        sizes = _sizes(layer.out_features, groups)

        def forward(_, inputs, output):
            if not torch.is_grad_enabled():  # the model itself asks for none here: no gradient can reach it
                return None
            if not output.requires_grad:
                # No parameter wants a gradient, so the first layers start the graph; a copy, because a leaf may
                # not be modified in place by what follows.
                output = output.requires_grad_().clone()
            tokens = inputs[0].detach().reshape(-1, layer.in_features)

            def backward(gradient):
                squares = (GRADIENT_SCALE * gradient.detach().reshape(-1, layer.out_features).float()).square()
                means = [part.mean(1) for part in squares.split(sizes, 1)]
                add(name, tokens.float(), torch.stack(means, 1))
                reached.add(name)

            output.register_hook(backward)
            return output

        return forward

    with gradients_only_for(model, ()), contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(watch(name, layer)).remove)
        backward_passes(model, windows, loss_fn, title, progress)
    unused = [name for name in layers if name not in reached]
    if unused:
        warnings.warn(f"no gradient reached {', '.join(unused)}: their salience is zero", stacklevel=3)
