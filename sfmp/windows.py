"""Calibration windows as quantize_model takes them: checked, cut in batches, and a short probe.

Source: METHOD.md sections 1.6, 2.1 (a fixed number of windows of one length); DESIGN.md section 7.
"""

from __future__ import annotations

import inspect

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


def one_window(model, window, alternative):
    """Token ids of one sequence as int64 [1, seqlen] on the device of the model."""
    arguments = inspect.signature(model.forward).parameters.values()
    if not any(a.name == "input_ids" or a.kind is a.VAR_KEYWORD for a in arguments):
        raise SfmpError(f"model: expected a language model that takes input_ids, found {type(model).__name__}; "
                        f"pass {alternative}")
    ids = token_ids("window", window, model)
    if ids.ndim == 0 or ids.ndim > 2 or (ids.ndim == 2 and len(ids) != 1):
        raise SfmpError(f"window: expected token ids [seqlen] of one sequence, found shape {tuple(ids.shape)}; "
                        "pass windows as [n, seqlen], not in batches")
    return ids.reshape(1, -1).to(next(model.parameters()).device)
