"""Our kernels on a device as candidates: random matrices of the layouts that are compared, and copies of each.

"blocks" is SFMP: blocks of 2, 3 and 4 bits, rows and columns permuted. "uniform" has one width everywhere, and
"column groups" one width for a group of columns over all rows, as SliM-LLM's matrices have; both keep their order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import torch

from sfmp.bench.gpu_model import predicted_us
from sfmp.bench.gpu_products import make_copies
from sfmp.bench.gpu_timing import Settings, checked
from sfmp.bench.random_model import random_packed
from sfmp.bench.timing import Candidate
from sfmp.packed import PackedMatrix

BLOCK_ROWS = 512
LAYOUTS = ("blocks", "uniform", "column groups")
ONE_READING = {"mma": 8}  # tokens up to which a weight is read once; one token where nothing is said


@dataclasses.dataclass(frozen=True)
class Kind:
    """What kind of matrix: mean bits of the codes, one of `LAYOUTS`, whether nothing is permuted, group size."""

    bits: float
    layout: str = "blocks"
    natural: bool = False
    group_size: int = 128

    @property
    def label(self) -> str:
        order = " natural" if self.natural and self.layout == "blocks" else ""
        size = "" if self.group_size == 128 else f" groups of {self.group_size}"
        return f"{self.bits:g} {self.layout}{order}{size}"


def random_matrix(rows: int, columns: int, kind: Kind, seed: int = 0) -> PackedMatrix:
    """Return a matrix of random codes of a kind, on the CPU, without bias."""
    block_rows = rows if kind.layout == "column groups" else BLOCK_ROWS
    packed = random_packed(rows, columns, kind.bits + 32 / kind.group_size, kind.group_size, block_rows, seed,
                           mixed=kind.layout != "uniform")
    if kind.natural:
        for permutation in (packed.row_perm, packed.col_perm):
            permutation.copy_(torch.arange(len(permutation)))
    return packed


class Matrices:
    """One random matrix and its copies on a device, which all modes and activations share.

    Attributes
    ----------
    packed : PackedMatrix, on the CPU
    kind : Kind
    """

    def __init__(self, rows: int, columns: int, kind: Kind, settings: Settings, copy_gbps: float):
        self.kind, self.settings, self.copy_gbps = kind, settings, copy_gbps
        self.packed = random_matrix(rows, columns, kind)
        stored = (self.packed.planes, self.packed.alpha, self.packed.beta)
        self.packed_bytes = sum(tensor.numel() * tensor.element_size() for tensor in stored)
        self._copies = functools.cache(functools.partial(make_copies, self.packed, device=settings.device,
                                                         count=settings.copies(self.packed_bytes)))

    def candidate(self, x: torch.Tensor, way: str, around: bool = False, **options) -> Candidate:
        """Products of x [tokens, K].

        Parameters
        ----------
        x : on the device
        way : one of `gpu_products.WAYS`
        around : torch permutes x and y around the product of a matrix in natural order
        options : of `DeviceCopies.products`
        """
        copies, tokens, kind = self._copies(way), len(x), str(x.dtype).removeprefix("torch.")
        if around:
            columns, rows = _permutations(*self.packed.shape[::-1], x.device)
            products = copies.products(x, columns=columns, rows=rows, **options)
            expected = (x[:, columns].double() @ self.dense().T)[:, rows]
        else:
            products, expected = copies.products(x, **options), x.double() @ self.dense().T
        natural = self.kind.natural and not around
        gather = "unfused" if around else "none" if natural else copies.gather(x, **options)
        label = self.kind.label.replace(" natural", " unfused") if around else self.kind.label
        name = " ".join([way, label, *(f"{key} {value}" for key, value in options.items()),
                         *([kind] if kind != "float16" else []), *([f"{tokens} tokens"] if tokens > 1 else [])])
        predicted = None
        if self.settings.device == "cuda" and tokens <= ONE_READING.get(way, 1):
            predicted = round(predicted_us(self.packed_bytes, self.copy_gbps), 3)
        return Candidate(name, "sfmp", products, self.packed_bytes,
                         error=checked(products[0], expected, x.dtype),
                         facts={"mode": "mma" if way == "dequantize" else way, "bits": round(self.packed.wbits, 6),
                                "layout": self.kind.layout, "natural": natural, "gather": gather, "tokens": tokens,
                                "dtype": kind, "group_size": self.kind.group_size, "way": way,
                                "predicted_us": predicted})

    def products(self, x: torch.Tensor, way: str) -> list[Callable[[], torch.Tensor]]:
        """One function for each copy, see `DeviceCopies.products`."""
        return self._copies(way).products(x)

    def moved(self) -> PackedMatrix:
        """The matrix with its tensors on the device."""
        there = {key: tensor.to(self.settings.device) for key, tensor in self.packed.tensors().items()}
        return dataclasses.replace(self.packed, **there)

    def dense(self) -> torch.Tensor:
        """The dequantized weight in float64, on the device."""
        return self.moved().dequantize().double()


def _permutations(columns, rows, device):
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.permutation(size)).to(device) for size in (columns, rows)]
