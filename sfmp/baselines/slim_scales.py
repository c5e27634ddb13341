"""SQC of SliM-LLM: the range of a group that loses least, its salient weights counted apart.

Source: METHOD.md section 2.3 (SliM-LLM, arXiv 2405.14917).
"""

from __future__ import annotations

import torch

from sfmp.quantize import decode, encode, group_parameters

EXPONENT = 2.4  # of |w - w_q| in the loss
SALIENT_Z = 2.0  # a weight is salient where its salience is further than this many deviations from the mean


def calibrated_parameters(part, bits, diagonal, *, steps=50, spread=0.1, lam=1.0):
    """Scale and zero of every row of one group, searched around its min-max range.

    Parameters
    ----------
    part : Tensor float32 [N, width]
        Weights of the group, as the column update has left them.
    bits : Tensor float32 [N]
    diagonal : Tensor float32 [width]
        Of the factor of the inverse Hessian, at the columns of the group.
    steps : int
        Factors tried on each side of 1.
    spread : float
        Distance of the outermost factors from 1.
    lam : float
        Weight of the salient part of the loss.

    Returns
    -------
    scales, zeros : Tensor float32 [N]

    Notes
    -----
    Source: METHOD.md 2.3.  Each row minimises ``sum |w - w_q|**2.4`` over its ordinary weights plus `lam` times
    the same over its salient ones; with the published lam = 1 that is one plain sum.  The factor 1 is tried
    first and only a smaller loss replaces it, so no step at all leaves the min-max parameters.  A 1-bit group
    keeps its closed form (mean -/+ mean absolute deviation): it has no range to scale.
    """
    scales, zeros = group_parameters(part, bits)
    searched = bits > 1
    if steps == 0 or not bool(searched.any()):
        return scales, zeros
    emphasis = None if lam == 1.0 else torch.where(salient(part, diagonal), lam, 1.0)
    low, high = part.amin(-1), part.amax(-1)
    best = _loss(part, scales, zeros, bits, emphasis)
    for factor in factors(steps, spread):
        scale, zero = group_parameters(part, bits, low * factor, high * factor)
        loss = _loss(part, scale, zero, bits, emphasis)
        better = searched & (loss < best)
        best = torch.where(better, loss, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return scales, zeros


def factors(steps, spread):
    """Factors of the range tried beside 1, nearest first: ``1 -/+ spread * i / steps``."""
    return [1.0 + side * spread * i / steps for i in range(1, steps + 1) for side in (-1, 1)]


def salient(part, diagonal):
    """Mask [N, width] of the weights whose salience w² / U_jj² has a z-score beyond 2 in the whole group."""
    salience = (part / diagonal).square()
    deviation, mean = torch.std_mean(salience, correction=0)
    return (salience - mean).abs() > SALIENT_Z * deviation


def _loss(part, scales, zeros, bits, emphasis):
    difference = decode(encode(part, scales, zeros, bits), scales, zeros, bits).sub_(part)
    terms = difference.abs_().pow_(EXPONENT)
    return (terms if emphasis is None else terms.mul_(emphasis)).sum(-1)
