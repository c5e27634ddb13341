"""Calibration windows as quantize_model takes them: checked, cut in batches, and a short probe.

Source: METHOD.md sections 1.6, 2.1 (a fixed number of windows of one length); DESIGN.md section 7.
"""

from __future__ import annotations

import torch

from sfmp.checks import SfmpError, numbers_of, token_ids

PROBE_TOKENS = 64  # tokens on which scale groups are proved


def checked_windows(model, windows, method):
    """Calibration windows as a tensor [n, ...], or a clear error.

    Parameters
    ----------
    model : nn.Module
    windows : Tensor, array or list
        Integer token ids [n, seqlen], or float [n, ...] for a model that is fed features.
    method : str
        Named in the error.

    Returns
    -------
    Tensor
        int64 token ids, or features in the dtype of the model.

    Raises
    ------
    SfmpError
        If there are none, they have no shape [n, seqlen], or are not finite.
    """
    if windows is None:
        raise SfmpError(f"{method} needs calibration: expected windows (int64 [n, seqlen]), found None; pass "
                        "windows=..., or make the plan with method='rtn'")
    windows = numbers_of("windows", windows)
    if not windows.is_floating_point():
        windows = token_ids("windows", windows, model)
        if windows.ndim == 3 and windows.shape[1] == 1:  # a list of [1, seqlen], as tokenizers return them
            windows = windows.squeeze(1)
    if windows.ndim < 2 or windows.shape[0] == 0 or windows.shape[1] == 0:
        raise SfmpError(f"windows: expected shape [n, seqlen] with n >= 1, found {tuple(windows.shape)}")
    if windows.is_floating_point():
        if not bool(torch.isfinite(windows).all()):
            raise SfmpError("windows: expected finite features, found NaN or infinity")
        return windows.to(next(model.parameters()).dtype)
    return windows


def batches_of(windows, tokens):
    """Windows in batches of about `tokens` tokens; the first is spread evenly over all windows."""
    length = 1
    for size in windows.shape[1:-1] if windows.is_floating_point() else windows.shape[1:]:
        length *= size
    count = max(1, tokens // length)
    if count >= len(windows):
        return [windows]
    first = torch.arange(count) * len(windows) // count
    rest = torch.ones(len(windows), dtype=torch.bool)
    rest[first] = False
    return [windows[first], *windows[rest].split(count)]


def probe_of(windows):
    """A short batch: up to PROBE_TOKENS tokens of the first window, or as many feature rows."""
    if windows.is_floating_point():
        return windows[:PROBE_TOKENS] if windows.ndim == 2 else windows[:1, :PROBE_TOKENS]
    return windows[:1, :PROBE_TOKENS]
