"""SBA of SliM-LLM: how many groups of a matrix trade a bit, decided by the divergence of its outputs.

A group is `group_size` consecutive input columns of all rows.  The p least salient groups lose a bit and the p
most salient gain one, so the mean stays what it was; p is the only unknown, and every p is tried.

Source: METHOD.md section 2.3 (SliM-LLM, arXiv 2405.14917).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from sfmp.quantize import dequantize, quantize
from sfmp.solvers import Stats


def candidates(columns: int, group_size: int) -> int:
    """Number of p that are tried, p = 0 (uniform) included: half of the whole groups, at least one.

    A short last group takes no part: trading its bits against those of a whole group would change the mean.
    """
    return max(1, columns // group_size // 2)


@dataclass
class SampledStats(Stats):
    """Statistics that also keep some of the inputs, for the search.

    Attributes
    ----------
    windows, of : int
        How many samples to keep out of how many that will come, evenly spaced in the order they come.
    tokens_each : int or None
        Tokens kept of each sample, evenly spaced; all if None.
    group_size : int
        Nothing is kept for a matrix with too few groups for a choice.
    kept : list of Tensor float32 [samples, tokens, K]
        Memory: one layer's inputs at a time, tokens kept x K x 4 bytes.
    """

    windows: int = 0
    of: int = 1
    tokens_each: int | None = None
    group_size: int = 128
    kept: list = field(default_factory=list)
    seen: int = 0

    def add(self, inputs):
        super().add(inputs)
        columns = inputs.shape[-1]
        # Rows without a sequence axis (features, tokens routed to an expert) are samples of one token.
        samples = inputs.reshape(inputs.shape[0], -1, columns)
        ordinals = self.seen + torch.arange(len(samples), device=inputs.device)
        self.seen += len(samples)
        chosen = samples[ordinals * self.windows % self.of < self.windows]
        if len(chosen) == 0 or candidates(columns, self.group_size) == 1:
            return
        length = chosen.shape[1]
        if self.tokens_each is not None and self.tokens_each < length:
            places = torch.arange(self.tokens_each, device=inputs.device) * length // self.tokens_each
            chosen = chosen[:, places]
        self.kept.append(chosen.to(torch.float32).clone())


def group_salience(weight, factor, group_size) -> np.ndarray:
    """Sum of w² / U_jj² over each group of columns and all rows, float64 [groups].

    Parameters
    ----------
    weight : Tensor [N, K]
    factor : Tensor [K, K]
        Upper triangular, Uᵀ U = H⁻¹ with the damped H (`sfmp.solvers.compensation`).
    group_size : int

    Notes
    -----
    Source: METHOD.md 2.3.
    """
    columns = (weight.double().square().sum(0) / factor.diagonal().double().square()).cpu().numpy()
    return np.add.reduceat(columns, np.arange(0, len(columns), group_size))


def candidate_bits(order, groups: int, base: int, p: int) -> np.ndarray:
    """Bits uint8 [groups]: `base`, one less for the first `p` of `order`, one more for its last `p`."""
    bits = np.full(groups, base, dtype=np.uint8)
    bits[order[:p]] -= 1
    bits[order[len(order) - p :]] += 1
    return bits


class Exchanges:
    """Every exchange of bits inside one matrix, ready to be compared.

    Parameters
    ----------
    weight : Tensor float32 [N, K]
    salience : ndarray [groups]
    base : int
        Mean bits, 2..7.
    group_size : int
    kl : str
        Direction of the divergence, a key of `DIRECTIONS`.

    Notes
    -----
    Source: METHOD.md 2.3.  Weights are rounded to nearest.  Going from p - 1 to p changes two groups only, so
    their part of ``x W_qᵀ`` is replaced instead of rounding the matrix and computing the whole product again:
    the same numbers for a fraction of the published cost.
    """

    def __init__(self, weight, salience, base: int, group_size: int, kl: str = "quantized"):
        self.direction = DIRECTIONS[kl]
        self.weight, self.base, self.groups = weight, base, len(salience)
        self.count = candidates(weight.shape[1], group_size)
        self.order = np.argsort(salience[: weight.shape[1] // group_size], kind="stable")
        if self.count == 1:
            return
        rounded = {bits: _rounded(weight, bits, group_size) for bits in (base - 1, base, base + 1)}
        self.uniform, self.changes = rounded[base], []
        for p in range(1, self.count):
            pair = []
            for group, bits in ((self.order[p - 1], base - 1), (self.order[-p], base + 1)):
                columns = slice(int(group) * group_size, (int(group) + 1) * group_size)
                pair.append((columns, (rounded[bits] - rounded[base])[:, columns].T.contiguous()))
            self.changes.append(pair)

    def bits(self, p: int) -> np.ndarray:
        """Bits uint8 [groups] after the first `p` exchanges."""
        return candidate_bits(self.order, self.groups, self.base, p)

    def divergences(self, inputs) -> list[float]:
        """Mean divergence of the outputs for p = 0, 1, ...; empty if there is nothing to compare.

        Parameters
        ----------
        inputs : list of Tensor float32 [..., K]
            Samples.

        Notes
        -----
        Source: METHOD.md 2.3.  As published the divergence of a token is ``KL(softmax(x W_qᵀ) || softmax(x Wᵀ))``,
        `kl` ``"quantized"``.  The other way round, ``"original"``, is what is lost when the quantized outputs
        stand for the true ones; it gives the lower perplexity on the embedded model.
        """
        if self.count == 1 or not inputs:
            return []
        totals, tokens = np.zeros(self.count), 0
        for sample in inputs:
            x = sample.reshape(-1, sample.shape[-1])
            target = torch.log_softmax(x @ self.weight.T, -1)
            probability = target.exp()  # once for all candidates
            outputs = x @ self.uniform.T
            totals[0] += self.direction(outputs, target, probability)
            for p, pair in enumerate(self.changes, 1):
                for columns, change in pair:
                    outputs.addmm_(x[:, columns], change)
                totals[p] += self.direction(outputs, target, probability)
            tokens += len(x)
        return [float(total) / tokens for total in totals]


def from_original(outputs, target, probability) -> float:
    """Sum over tokens of KL(probability || softmax(outputs)), all [T, N]; `target` is log(probability)."""
    difference = target - torch.log_softmax(outputs, -1)
    return float(torch.linalg.vecdot(probability, difference).sum(dtype=torch.float64))


def from_quantized(outputs, target, probability) -> float:
    """Sum over tokens of KL(softmax(outputs) || probability); the arguments of :func:`from_original`."""
    found = torch.log_softmax(outputs, -1)
    return float(torch.linalg.vecdot(found.exp(), found - target).sum(dtype=torch.float64))


DIRECTIONS = {"quantized": from_quantized, "original": from_original}  # by whose probabilities are the weights


def _rounded(weight, bits, group_size):
    """Weight rounded to nearest at one bit-width."""
    table = np.full((1, -(-weight.shape[1] // group_size)), bits)
    return dequantize(quantize(weight, table, group_size=group_size, block_rows=len(weight)))
