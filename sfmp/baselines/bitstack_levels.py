"""The levels of one matrix: sign bits times a product of low rank, each of what the levels before it left.

    R = W diag(s);   per level: sign(R), |R| ~ U V of rank k, R -= sign(R) * U V

The scale s is divided into the stored V. That is exact and costs no byte: s is positive and one number a
column, so sign(R) * (U V diag(1/s)) = (sign(R) * U V) diag(1/s), and the sum of the levels approximates W itself.

Source: METHOD.md section 2.5 (arXiv 2410.23918).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from sfmp.baselines.bitstack_linear import BitStackLinear, pack_signs
from sfmp.checks import SfmpError, integer
from sfmp.salience import linear_modules
from sfmp.walk import observe, run_model

SCALE_FLOOR = 1e-3  # added to a channel's norm, METHOD.md 2.5


class Stack(NamedTuple):
    """Levels of one matrix as they are stored: arguments of `BitStackLinear`."""

    signs: torch.Tensor  # uint8 [levels, N, ceil(K / 8)]
    left: torch.Tensor  # float16 [levels, N, k]
    right: torch.Tensor  # float16 [levels, k, K]

    def first(self, levels: int) -> Stack:
        """The first `levels` levels."""
        return Stack(*(tensor[:levels] for tensor in self))

    def dequantize(self) -> torch.Tensor:
        """Their sum, float32 [N, K]."""
        return BitStackLinear(*self, in_features=self.right.shape[-1]).dequantize()


def channel_scales(model: nn.Module, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scale of every input channel of every linear: the mean over windows of its norm over tokens, + 1e-3.

    Parameters
    ----------
    model : nn.Module
    windows : int64 [n, seqlen]

    Returns
    -------
    dict of str to Tensor float32 [K]
        Divided by the root of its extremes' product: a common factor changes no level, and without it the
        stored float16 factors could overflow. All ones for a matrix that no token reached.

    Notes
    -----
    Source: METHOD.md section 2.5.
    """
    linears = linear_modules(model)
    norms = {name: torch.zeros(m.in_features, dtype=torch.float64, device=m.weight.device)
             for name, m in linears.items()}
    calls = dict.fromkeys(linears, 0)

    def see(name, args, kwargs):
        (value,) = (*args, *kwargs.values())
        norms[name] += value.detach().reshape(-1, value.shape[-1]).double().norm(dim=0)
        calls[name] += 1

    device = next(model.parameters()).device
    with observe(linears, see):
        for window in windows:  # one at a time: a norm is of one sequence, whatever the architecture flattens
            run_model(model, window[None].to(device))
    found = {name: total / max(1, calls[name]) + SCALE_FLOOR for name, total in norms.items()}
    return {name: (scale / (scale.max() * scale.min()).sqrt()).float() for name, scale in found.items()}


def decompose(weight: torch.Tensor, channel_scale: torch.Tensor | None, n_levels: int, rank: int) -> Stack:
    """Stack of levels of one matrix.

    Parameters
    ----------
    weight : floating [N, K]
    channel_scale : float32 [K] of positive numbers, or None for all ones
    n_levels : int
    rank : int
        Of the product that stands for the magnitudes; at most min(N, K).

    Returns
    -------
    Stack
        Each level takes its residual from the float16 factors as stored, so later levels also make up for
        their rounding. sign(0) is +1.

    Raises
    ------
    SfmpError
        If the weight is not finite, or a factor overflows float16.

    Notes
    -----
    Source: METHOD.md section 2.5.
    """
    rank = integer("rank", rank, 1, min(weight.shape))
    n_levels = integer("n_levels", n_levels, 1)
    scale = torch.ones(weight.shape[1], device=weight.device) if channel_scale is None else channel_scale
    residual = weight.detach().float() * scale
    if not bool(residual.isfinite().all()):
        raise SfmpError("weight: expected finite numbers, found NaN or infinity; check the model")
    levels = []
    for _ in range(n_levels):
        positive = residual >= 0
        left, right = _low_rank(residual.abs(), rank)
        left, right = left.half(), (right / scale).half()
        if not bool(left.isfinite().all() & right.isfinite().all()):
            raise SfmpError("weight: a factor overflows float16, expected magnitudes below 65504; rescale the layer")
        magnitude = left.float() @ (right.float() * scale)
        residual -= torch.where(positive, magnitude, -magnitude)
        levels.append((pack_signs(positive), left, right))
    return Stack(*(torch.stack(parts) for parts in zip(*levels, strict=True)))


def _low_rank(matrix, rank):
    """Factors [N, k], [k, K] of the best product of rank k, sharing each singular value evenly.

    From the eigenvectors of the smaller Gram matrix, which are cheaper than a whole SVD. Given U, the right
    factor Uᵀ A is the best there is, so an error of U in float32 enters the product's error squared only.
    """
    if matrix.shape[0] > matrix.shape[1]:
        left, right = _low_rank(matrix.T, rank)
        return right.T, left.T
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:].flip(-1)
    right = vectors.T @ matrix
    root = right.norm(dim=1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return vectors * root, right / root[:, None]
