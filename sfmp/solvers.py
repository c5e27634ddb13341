"""Solvers: how the codes of one matrix are found.  ``solver(weight, stats, matrix_plan, spec) -> Quantized``.

``rtn`` rounds to the nearest code (inside a clip range if the AWQ search left one); ``gptq`` rounds column by
column and moves each column's error onto the columns not yet rounded.  AWQ is ``rtn`` on scaled and clipped
weights (sfmp.awq).  Weights come in natural order; results are in the permuted order of the plan.

Source: METHOD.md sections 1.5, 1.7, 2.1.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch

from sfmp.quantize import Quantized, check_bits, group_parameters, quantize, row_bits, stored_grid
from sfmp.spec import SfmpError

DAMPING = 0.01  # of the mean diagonal of the Hessian (GPTQ's percdamp)
DAMPING_STEPS = (1.0, 10.0, 100.0, 1000.0)  # tried in turn when the Cholesky factorisation fails
LAZY_COLUMNS = (128, 96, 64, 32)  # columns whose updates of the rest are applied together; divides a group


@dataclass
class Stats:
    """What calibration knows about the input of one matrix, natural column order.

    Attributes
    ----------
    gram : Tensor float32 [K, K], optional
        Sum of x xᵀ over the tokens seen; call `add` to accumulate.
    tokens : int
        Tokens summed in `gram`.
    lower, upper : Tensor float32 [N, groups], optional
        Clip ranges (permuted order) found by the AWQ search.
    notes : dict
        What a solver had to do (damping used, dead columns); ends in the report of quantize_model.
    """

    gram: torch.Tensor | None = None
    tokens: int = 0
    lower: torch.Tensor | None = None
    upper: torch.Tensor | None = None
    notes: dict = field(default_factory=dict)

    def add(self, inputs: torch.Tensor) -> None:
        """Add tokens [..., K] to the Gram matrix."""
        rows = inputs.reshape(-1, inputs.shape[-1]).to(torch.float32)
        if self.gram is None:
            self.gram = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float32, device=rows.device)
        self.gram.addmm_(rows.T, rows)
        self.tokens += rows.shape[0]


def _permuted(weight, matrix_plan):
    """Return W[row_perm][:, col_perm] and both permutations as index tensors on its device."""
    rows = torch.as_tensor(matrix_plan.row_perm, device=weight.device)
    columns = torch.as_tensor(matrix_plan.col_perm, device=weight.device)
    if tuple(weight.shape) != (len(rows), len(columns)):
        raise SfmpError(
            f"weight: expected shape {(len(rows), len(columns))} as in its plan, found {tuple(weight.shape)}"
        )
    return weight[rows][:, columns], rows, columns


def rtn(weight, stats, matrix_plan, spec) -> Quantized:
    """Round every weight to the nearest code of its block.

    Parameters
    ----------
    weight : Tensor float32 [N, K]
        Natural order.
    stats : Stats or None
        Only its clip ranges are used.
    matrix_plan : MatrixPlan
    spec : QuantSpec

    Returns
    -------
    Quantized
        In permuted order.

    Raises
    ------
    SfmpError
        If the weight does not have the plan's shape or is not finite.
    """
    permuted, _, _ = _permuted(weight.detach().to(torch.float32), matrix_plan)
    lower, upper = (None, None) if stats is None else (stats.lower, stats.upper)
    return quantize(permuted, matrix_plan.bits, group_size=spec.group_size, block_rows=spec.block_rows,
                    lower=lower, upper=upper)


def gptq(weight, stats, matrix_plan, spec, choose=None) -> Quantized:
    """Round columns in permuted order, compensating each error in the columns that follow.

    Parameters
    ----------
    weight : Tensor float32 [N, K]
        Natural order (a float64 weight is solved in float64).
    stats : Stats
        Gram matrix of the inputs; ``stats.notes`` receives ``damping`` and ``dead_columns``.
    matrix_plan : MatrixPlan
        Columns are visited in ``col_perm`` order (it replaces act-order), rows have the bits of their block.
    spec : QuantSpec
    choose : callable, optional
        See `round_columns`.

    Returns
    -------
    Quantized
        In permuted order.

    Raises
    ------
    SfmpError
        If there is no Gram matrix, or none of the dampings makes it positive definite.

    Notes
    -----
    Source: GPTQ (arXiv 2210.17323) as restated in METHOD.md 2.1 and 1.7.  The parameters of a group are
    chosen from the current, already compensated weights when its first column is reached.  Unlike METHOD 1.7
    the range is not forced to include zero: zeros are not clamped, so nothing saturates.  O(N K²) time.
    """
    current, factor = compensation(weight, stats, matrix_plan)
    return round_columns(current, factor, matrix_plan.bits, spec, choose)


def compensation(weight, stats, matrix_plan):
    """Weights to round and the factor of the inverse Hessian that says where their errors go.

    Parameters
    ----------
    weight, stats, matrix_plan
        As in `gptq`.

    Returns
    -------
    current : Tensor [N, K]
        Permuted order; columns that never see an input are zero.
    factor : Tensor [K, K]
        Upper triangular U with Uᵀ U = (H + damping)⁻¹, H = 2 / tokens · sum x xᵀ, both in permuted order.

    Raises
    ------
    SfmpError
        As in `gptq`.

    Notes
    -----
    Source: METHOD.md 2.1.
    """
    if stats is None or stats.gram is None:
        raise SfmpError("gptq: expected the Gram matrix of the inputs, found none; pass calibration windows")
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    current, _, columns = _permuted(weight.detach().to(dtype), matrix_plan)
    hessian = stats.gram.to(dtype)[columns][:, columns] * (2.0 / max(stats.tokens, 1))
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1.0
    current[:, dead] = 0.0
    factor, damping = inverse_cholesky(hessian)
    stats.notes.update(damping=damping, dead_columns=int(dead.sum()))
    return current, factor


def round_columns(current, factor, bits, spec, choose=None) -> Quantized:
    """The column update of GPTQ: round a column, take its error from the columns that follow.

    Parameters
    ----------
    current : Tensor [N, K]
        Weights in permuted order; not modified.
    factor : Tensor [K, K]
        Upper triangular, see `compensation`.
    bits : integers [row_blocks, groups]
    spec : QuantSpec
        Its group_size and block_rows.
    choose : callable, optional
        ``choose(part, bits, diagonal) -> scales, zeros`` chooses the parameters [N] of a group from its
        compensated weights float32 [N, width], the bits float32 [N] of its rows, and the diagonal of `factor`
        float32 [width] at its columns; `sfmp.quantize.group_parameters` (min-max) by default.

    Returns
    -------
    Quantized

    Raises
    ------
    SfmpError
        If the bit map does not fit the weights.

    Notes
    -----
    Source: METHOD.md 2.1.
    """
    bits = check_bits(bits, current, spec.group_size, spec.block_rows)
    dtype, (rows, total) = current.dtype, current.shape
    per_row = row_bits(bits, rows, spec.block_rows, current.device)
    diagonal = factor.diagonal().to(torch.float32)
    codes = torch.empty(total, rows, dtype=torch.uint8, device=current.device)
    scales, zeros = torch.empty_like(per_row), torch.empty_like(per_row)
    # [K, N]: a column of the weight is contiguous. A copy even where N or K is 1 and T is contiguous already.
    rest = current.T.clone(memory_format=torch.contiguous_format)
    lazy = next((size for size in LAZY_COLUMNS if spec.group_size % size == 0), spec.group_size)
    for start in range(0, total, lazy):
        stop = min(start + lazy, total)
        group = start // spec.group_size
        width = per_row[:, group]
        if start % spec.group_size == 0:
            columns = slice(start, start + spec.group_size)
            part = rest[columns].T.to(torch.float32)
            parameters = group_parameters(part, width) if choose is None else choose(part, width, diagonal[columns])
            scales[:, group], zeros[:, group] = parameters
        step, base, top = (x.to(dtype) for x in stored_grid(scales[:, group], zeros[:, group], width))
        errors = torch.empty(stop - start, rows, dtype=dtype, device=current.device)
        for column in range(start, stop):
            code = torch.minimum(torch.round((rest[column] - base) / step).clamp_min_(0.0), top)
            codes[column] = code.to(torch.uint8)
            error = (rest[column] - (base + step * code)) / factor[column, column]
            rest[column + 1 : stop].addr_(factor[column, column + 1 : stop], error, alpha=-1.0)
            errors[column - start] = error
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1.0)
    return Quantized(codes.T.contiguous(), scales, zeros, bits, spec.group_size, spec.block_rows)


def inverse_cholesky(hessian):
    """Upper triangular U with Uᵀ U = (H + damping)⁻¹, and the damping that was needed.

    Parameters
    ----------
    hessian : Tensor float32 or float64 [K, K]
        Symmetric; not modified.

    Returns
    -------
    factor : Tensor [K, K]
    damping : float
        Fraction of the mean diagonal that was added: 0.01, or 10, 100, 1000 times that with a warning.

    Raises
    ------
    SfmpError
        If no damping works, which means NaN or infinite activations.
    """
    mean = hessian.diagonal().mean()
    for step in DAMPING_STEPS:
        damped = hessian.clone()
        damped.diagonal().add_(DAMPING * step * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            inverse = torch.cholesky_inverse(factor)
            factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if int(failed) == 0 and bool(torch.isfinite(factor).all()):
                if step > 1.0:
                    warnings.warn(
                        f"gptq: the Hessian is not positive definite with damping {DAMPING:g}; used "
                        f"{DAMPING * step:g}. More or longer calibration windows condition it better.",
                        stacklevel=3)
                return factor, DAMPING * step
    raise SfmpError(
        f"gptq: no damping up to {DAMPING * DAMPING_STEPS[-1]:g} of the mean diagonal makes the Hessian "
        f"positive definite (mean diagonal {float(mean):.3g}); expected finite activations; check the "
        "windows, or run the model in float32"
    )


SOLVERS = {"rtn": rtn, "gptq": gptq, "awq": rtn}
