"""Half-quadratic quantization: group-affine codes whose zeros minimise an lp norm of the error, without data.

AMQ builds its proxy models with it: a matrix at 2, 3 and 4 bits in well under a second each, so that a design is
assembled by putting the right reconstruction in every place.

Source: METHOD.md section 2.4 (2); half-quadratic splitting as published for HQQ (Badri and Shaji, 2023).
"""

from __future__ import annotations

import torch

from sfmp.checks import SfmpError, integer
from sfmp.quantize import column_chunks

LP_NORM, BETA, KAPPA, ITERATIONS = 0.7, 10.0, 1.01, 20
LARGEST_INVERSE_SCALE = 2e4  # a constant group has no range; its zero alone then represents it


def half_quadratic(weight, bits, group_size, *, lp_norm=LP_NORM, beta=BETA, kappa=KAPPA, iterations=ITERATIONS):
    """Reconstruct a matrix from half-quadratic codes.

    Parameters
    ----------
    weight : Tensor [N, K]
        Any floating dtype, natural order.
    bits : int
        Bit-width 1..8 of every code.
    group_size : int
        Columns that share a scale and a zero; the last group may be short and is then solved on its own.
    lp_norm : float
        Norm of the error, at most 1; below 1 a few large errors cost little.
    beta, kappa : float
        Weight of the quadratic term and its growth from one iteration to the next.
    iterations : int
        At most so many updates of the zeros; they stop as soon as the error grows.

    Returns
    -------
    Tensor float32 [N, K]
        Never worse than the min-max codes it starts from, in the mean of ``|error| ** lp_norm``.

    Raises
    ------
    SfmpError
        If the weight is no finite matrix, or the bit-width is outside 1..8.

    Notes
    -----
    The scales stay those of min-max; the zeros are real numbers. O(iterations * N * K) time.
    Source: METHOD.md section 2.4 (2).

    Examples
    --------
    >>> half_quadratic(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), 2, 4).tolist()
    [[0.0, 1.0, 2.0, 3.0]]
    """
    integer("bits", bits, 1, 8)
    integer("group_size", group_size, 1)
    if weight.ndim != 2:
        raise SfmpError(f"weight: expected a matrix [N, K], found shape {tuple(weight.shape)}")
    weight = weight.detach().to(torch.float32)
    if not bool(torch.isfinite(weight).all()):
        raise SfmpError("weight: expected finite numbers, found NaN or infinity; repair the checkpoint")
    result = torch.empty_like(weight)
    for columns, _, count, width in column_chunks(weight.shape[1], group_size):
        groups = weight[:, columns].reshape(len(weight), count, width)
        solved = _solve(groups, 2**bits - 1, lp_norm, beta, kappa, iterations)
        result[:, columns] = solved.reshape(len(weight), -1)
    return result


def _solve(groups, top, lp_norm, beta, kappa, iterations):
    """Reconstruction of groups [N, count, width] with codes 0..top."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    inverse = (top / (high - low)).clamp_max(LARGEST_INVERSE_SCALE)
    zeros = -low * inverse
    best, least = None, torch.inf
    for iteration in range(iterations + 1):
        codes = torch.round(groups * inverse + zeros).clamp_(0, top)
        rebuilt = (codes - zeros) / inverse
        residual = groups - rebuilt
        size = residual.abs()
        # |e|^(p - 1) serves both the error and the threshold; at 0 it is infinite, where both are 0 anyway.
        power = size.clamp_min(1e-12).pow(lp_norm - 1)
        error = float((size * power).mean(dtype=torch.float64))
        if error >= least:  # the zeros got worse, and so would every later iteration that starts from them
            break
        best, least = rebuilt, error
        if iteration < iterations:
            # Generalised soft threshold: nearly the e that minimises |e|^p + beta / 2 (e - residual)^2.
            sparse = residual.sign() * (size - power / beta).clamp_min_(0)
            zeros = (codes - (groups - sparse) * inverse).mean(-1, keepdim=True)
            beta *= kappa
    return best
