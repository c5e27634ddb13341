"""Judge a design (bits of every linear) by how far the logits move: swap in proxy weights, run, compare.

Source: METHOD.md section 2.4 (1) and (2).
"""

from __future__ import annotations

import inspect
import math

import numpy as np
import torch

from sfmp.baselines.half_quadratic import half_quadratic
from sfmp.checks import SfmpError, integer, token_ids
from sfmp.salience import linear_modules

BATCH_TOKENS = 1024  # windows are run together up to so many tokens
CHUNK = {"cpu": 2**19, "cuda": 2**25}  # logits compared at a time: on a CPU, what fits in a cache
KEPT_LOGITS = 2**28  # full-precision logits kept; those of further windows are computed again for every design


def jensen_shannon(reference, logits) -> float:
    """Sum over tokens of the Jensen-Shannon divergence between two distributions given by logits.

    Parameters
    ----------
    reference, logits : Tensor [..., vocabulary]
        Of equal shape, any floating dtype; compared in float32, a chunk of tokens at a time.

    Returns
    -------
    float
        In nats, between 0 and log 2 per token.

    Raises
    ------
    SfmpError
        If the shapes differ, or the divergence is not a finite number.

    Examples
    --------
    >>> jensen_shannon(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]]))
    0.0
    """
    if reference.shape != logits.shape:
        raise SfmpError(f"logits: expected the shape {tuple(reference.shape)} of the reference, found "
                        f"{tuple(logits.shape)}")
    vocabulary = logits.shape[-1]
    rows = max(1, CHUNK["cpu" if logits.device.type == "cpu" else "cuda"] // vocabulary)
    total = 0.0
    for left, right in zip(reference.reshape(-1, vocabulary).split(rows), logits.reshape(-1, vocabulary).split(rows),
                           strict=True):
        log_p, log_q = (torch.log_softmax(x.to(torch.float32), -1) for x in (left, right))
        # Beyond e^30 the smaller probability adds nothing in float32, and the difference would cancel below.
        apart = (log_q - log_p).clamp_(-30.0, 30.0)
        # log of the mixture over p; as a softplus it is accurate also where both nearly agree.
        mixed = torch.nn.functional.softplus(apart) - math.log(2)
        per_token = (log_q.exp() * (apart - mixed) - log_p.exp() * mixed).sum(-1)
        total += 0.5 * float(per_token.sum(dtype=torch.float64))
    if not math.isfinite(total):
        raise SfmpError("logits: expected finite numbers, found a divergence of NaN or infinity; check the weights")
    return total


class ProxyModel:
    """A model whose linears can be set to proxy weights, and its divergence from full precision.

    Use as a context: on exit the model has its own weights and mode again.

    Parameters
    ----------
    model : nn.Module
        Causal language model; float32, bfloat16 or float16, any device.
    windows : Tensor int64 [n, seqlen]
        Calibration windows.
    levels : sequence of int
    group_size : int
    n_windows, n_tokens : int
        Windows used (evenly spaced) and tokens of each (its first), as many as there are.

    Attributes
    ----------
    names : list of str
    weights : ndarray int64 [linears]
        Number of weights of each linear.
    windows : Tensor int64 [n, tokens]
        What one evaluation runs over.
    """

    def __init__(self, model, windows, levels, group_size, n_windows, n_tokens):
        windows = token_ids("windows", windows, model)
        if windows.ndim != 2 or windows.numel() == 0:
            raise SfmpError(f"windows: expected shape [n, seqlen] with n >= 1, found {tuple(windows.shape)}")
        count = min(integer("n_windows", n_windows, 1), len(windows))
        chosen = torch.arange(count) * len(windows) // count
        self.windows = windows[chosen, : integer("n_tokens", n_tokens, 1)]
        self.model, self.levels, self.group_size = model, tuple(levels), group_size
        linears = linear_modules(model)
        self.names, self._linears = list(linears), list(linears.values())
        self.weights = np.array([linear.weight.numel() for linear in self._linears], dtype=np.int64)
        self._proxies, self._own, self._reference = [], [], []
        self._options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    def __enter__(self):
        self._own = [linear.weight.data for linear in self._linears]
        self._training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        return self

    def __exit__(self, *exception):
        self._set(None)
        for module in self._training:
            module.training = True
        self._reference, self._proxies = [], []

    def quantize(self) -> None:
        """Make every linear at every level once, in the dtype of the model."""
        self._proxies = [
            {level: half_quadratic(own, level, self.group_size).to(own.dtype) for level in self.levels}
            for own in self._own
        ]

    def remember(self) -> None:
        """Compute the full-precision logits and keep as many as `KEPT_LOGITS` allows."""
        self._set(None)
        self._reference, kept = [], 0
        for batch in self._batches():
            logits = self._logits(batch) if kept < KEPT_LOGITS else None
            kept += 0 if logits is None else logits.numel()
            self._reference.append(logits)

    def divergence(self, bits) -> float:
        """Mean over tokens of the Jensen-Shannon divergence of a design, int [linears], from full precision."""
        total = 0.0
        for batch, reference in zip(self._batches(), self._reference, strict=True):
            if reference is None:
                self._set(None)
                reference = self._logits(batch)
            self._set(bits)
            try:
                total += jensen_shannon(reference, self._logits(batch))
            except SfmpError as error:
                raise SfmpError(f"design {''.join(str(int(b)) for b in bits)} (bits of {self.names[0]} and on), "
                                f"{self._suspect(reference)}: {error}") from error
        return total / self.windows.numel()

    def _suspect(self, reference) -> str:
        """Where numbers that are not finite come from, as far as that can be seen; the design is set."""
        if not torch.isfinite(reference).all():
            return "full precision already gives logits that are not finite"
        broken = [name for name, linear in zip(self.names, self._linears, strict=True)
                  if not torch.isfinite(linear.weight).all()]
        return f"proxy weights of {broken[0]} not finite" if broken else f"weights finite, {reference.dtype} overflows"

    def _batches(self):
        return self.windows.split(max(1, BATCH_TOKENS // self.windows.shape[1]))

    def _set(self, bits):
        """Point every linear at its proxy of the design, or at its own weight."""
        for index, linear in enumerate(self._linears):
            linear.weight.data = self._own[index] if bits is None else self._proxies[index][int(bits[index])]

    def _logits(self, batch):
        with torch.no_grad():
            output = self.model(batch.to(self._own[0].device), **self._options)
        return getattr(output, "logits", output)
