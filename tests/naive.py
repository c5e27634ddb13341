"""Brute-force oracles: slow, plain numpy, and sharing no code with the package."""

import itertools

import numpy as np


# Salience, reordering, allocation


def mlp_fisher(weights, biases, inputs, labels):
    """Sum of squared per-sample gradients of a two-layer ReLU network under cross-entropy, by hand.

    weights [H, I], [C, H]; biases [H], [C]; inputs [n, I]; labels [n]. Returns the sums for both weights.
    """
    sums = [np.zeros_like(w, dtype=np.float64) for w in weights]
    for x, label in zip(inputs, labels, strict=True):
        hidden = weights[0] @ x + biases[0]
        active = np.where(hidden > 0, hidden, 0)
        logits = weights[1] @ active + biases[1]
        probability = np.exp(logits - logits.max())
        probability /= probability.sum()
        at_logits = probability - (np.arange(len(logits)) == label)
        at_hidden = (weights[1].T @ at_logits) * (hidden > 0)
        sums[0] += np.outer(at_hidden, x) ** 2
        sums[1] += np.outer(at_logits, active) ** 2
    return sums


def block_sums(matrix, row_perm, col_perm, block_rows, group_size):
    """Sum each block of matrix[row_perm][:, col_perm], entry by entry."""
    rows, cols = matrix.shape
    sums = np.zeros((-(-rows // block_rows), -(-cols // group_size)))
    for i in range(rows):
        for j in range(cols):
            sums[i // block_rows, j // group_size] += matrix[row_perm[i], col_perm[j]]
    return sums


def best_losses(losses, weights, levels):
    """Least total loss for every total of code bits that some assignment uses exactly: enumerates them all."""
    best = {}
    for choice in itertools.product(range(len(levels)), repeat=len(weights)):
        bits = sum(levels[c] * int(w) for c, w in zip(choice, weights, strict=True))
        loss = sum(losses[block][c] for block, c in enumerate(choice))
        best[bits] = min(loss, best.get(bits, np.inf))
    return best


def quantile_bits(salience, wbits):
    """Eq. 7 of the paper: the alpha = wbits - floor(wbits) most salient blocks get one bit more."""
    low = int(np.floor(wbits))
    high = int(np.floor((wbits - low) * len(salience) + 1e-9))
    bits = np.full(len(salience), low)
    for _ in range(high):
        left = [(-salience[i], i) for i in range(len(salience)) if bits[i] == low]
        bits[min(left)[1]] = low + 1
    return bits
