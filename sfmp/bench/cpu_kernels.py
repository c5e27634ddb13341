"""Our CPU kernels as candidates: matrices of random codes, each copy with an order of its own.

Tables of activations are kept between products of the same activations in the same order, so every copy is multiplied
with activations of its own: all products pay for their tables.
"""

from __future__ import annotations

import functools

import torch

from kernels_numba.cpu import product
from sfmp.bench.random_model import random_packed
from sfmp.bench.timing import Candidate, copies, relative_error

GROUP_SIZE, BLOCK_ROWS = 128, 512


class Matrices:
    """Copies of one kind of matrix, which all modes share; the first is kept to compare results with.

    Attributes
    ----------
    label : str
        Mean bits; "mixed" where 2-, 3- and 4-bit blocks make up a mean of 3; "natural" where nothing is permuted.
    packed : PackedMatrix
        The first copy.
    images : list of numpy.ndarray
        What the kernels read.
    """

    def __init__(self, rows: int, columns: int, bits: float, mixed: bool = False, natural: bool = False):
        self.label = f"{bits:g}{' mixed' if mixed else ''}{' natural' if natural else ''}"
        self.mixed, self.natural = mixed, natural
        self.packed = self._make(rows, columns, bits, 0)
        self.weights = [product.weight(self.packed)]
        for seed in range(1, copies(len(self.weights[0].image))):
            self.weights.append(product.weight(self._make(rows, columns, bits, seed)))
        self.images = [weight.image.numpy() for weight in self.weights]

    def _make(self, rows, columns, bits, seed):
        packed = random_packed(rows, columns, bits + 32 / GROUP_SIZE, GROUP_SIZE, BLOCK_ROWS, seed, self.mixed)
        if self.natural:
            for permutation in (packed.row_perm, packed.col_perm):
                permutation.copy_(torch.arange(len(permutation)))
        return packed

    def candidates(self, x: torch.Tensor, modes) -> list[Candidate]:
        """One candidate for each mode: products as a layer calls them, tables included."""
        expected, given = x.double() @ self.packed.dequantize().double().T, self._activations(x)
        return [self._candidate(given, mode, expected) for mode in modes]

    def _activations(self, x):
        """x for the first copy, others for the others."""
        generator = torch.Generator().manual_seed(2)
        return [x, *(torch.randn(x.shape, generator=generator) for _ in self.weights[1:])]

    def _candidate(self, given, mode, expected):
        products = [functools.partial(weight.multiply, x, None, mode)
                    for weight, x in zip(self.weights, given, strict=True)]
        return Candidate(f"{mode} {self.label}", "sfmp", products, len(self.images[0]),
                         error=relative_error(products[0]().float(), expected),
                         facts={"mode": mode, "bits": round(self.packed.wbits, 6), "mixed": self.mixed,
                                "natural": self.natural, "stored_bytes": self.packed.nbytes})

    def both_ways(self, x: torch.Tensor, mode: str) -> list[Candidate]:
        """Many tokens: through tables, and through dequantized panels, whatever the launch table says."""
        image = self.weights[0].image
        expected, found = x.double() @ self.packed.dequantize().double().T, []
        for way in ("tables", "panels"):
            products = [functools.partial(_through, way, weight, tokens, mode)
                        for weight, tokens in zip(self.weights, self._activations(x), strict=True)]
            found.append(Candidate(f"{mode} {way} {self.label}", "sfmp", products, len(image),
                                   error=relative_error(products[0]().float(), expected),
                                   facts={"mode": mode, "way": way, "bits": round(self.packed.wbits, 6)}))
        return found


def _through(way, weight, x, mode):
    if way == "tables":
        return product.through_tables(x, weight.image, None, weight.rows, weight.tile_columns, weight.target, mode)
    return product.through_panels(x, weight.image, None, rounded=mode == "lut8")


def accuracy(rows: int, columns: int, modes, seed: int = 0) -> list[dict]:
    """Relative errors against float64: by mode, bits, kind of activations and their dtype.

    "outlier" activations have one value of 20 standard deviations.
    """
    found, generator = [], torch.Generator().manual_seed(seed)
    plain = torch.randn(4, columns, generator=generator)
    outlier = plain.clone()
    outlier[:, columns // 3] = 20
    for bits in (2, 3, 4):
        packed = random_packed(rows, columns, bits + 32 / GROUP_SIZE, GROUP_SIZE, BLOCK_ROWS, mixed=False)
        weight, dense = product.weight(packed), packed.dequantize()
        for kind, x in (("gaussian", plain), ("outlier", outlier)):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                given, exact = x.to(dtype), x.to(dtype).double() @ dense.double().T
                results = {mode: weight.multiply(given, None, mode) for mode in modes}
                results["torch"] = torch.nn.functional.linear(given, dense.to(dtype))
                found += [{"mode": mode, "bits": bits, "activations": kind,
                           "dtype": str(dtype).removeprefix("torch."), "error": relative_error(y.float(), exact)}
                          for mode, y in results.items()]
    return found
