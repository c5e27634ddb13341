"""Our kernels as candidates: random matrices of the layouts that are compared, and copies of each."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from sfmp.bench.gpu_model import predicted_us
from sfmp.bench.gpu_products import make_copies
from sfmp.bench.gpu_timing import Settings, checked
from sfmp.bench.gpu_wanted import Kind, Wanted
from sfmp.bench.random_model import random_packed
from sfmp.bench.timing import Candidate
from sfmp.packed import PackedMatrix

BLOCK_ROWS = 512
ONE_READING = {"mma": 8}  # tokens up to which a weight is read once; one token where nothing is said
MOST_THREADS = 6  # each takes some bytes of memory for every weight


def random_matrix(rows: int, columns: int, kind: Kind, seed: int = 0) -> PackedMatrix:
    """Return a matrix of random codes of a kind, on the CPU, without bias."""
    block_rows = rows if kind.layout == "column groups" else BLOCK_ROWS
    packed = random_packed(rows, columns, kind.bits + 32 / kind.group_size, kind.group_size, block_rows, seed,
                           mixed=kind.layout != "uniform")
    if kind.natural:
        for permutation in (packed.row_perm, packed.col_perm):
            permutation.copy_(torch.arange(len(permutation)))
    return packed


def activations(tokens: int, columns: int, device: str, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Standard normal activations [tokens, K], the same at every call."""
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
    return x.to(device, torch.float16).to(dtype)


class Stock:
    """Matrices of one shape, and candidates that multiply with them.

    Parameters
    ----------
    shape : (N, K)
    settings : Settings
    copy_gbps : float, of the device, for predictions
    """

    def __init__(self, shape, settings: Settings, copy_gbps: float):
        self._settings, self._copy_gbps, self._columns = settings, copy_gbps, shape[1]
        self.matrices = functools.cache(lambda kind: Matrices(*shape, kind, settings))

    def lay_out(self, found: list[Wanted]) -> None:
        """Make the copies that candidates need, several at a time: laying a matrix out is work for the host."""
        def make(kind, way):
            with contextlib.suppress(Exception):  # whatever it is, the candidate meets it again and it is recorded
                self.matrices(kind).copies(way)

        for one in found:
            self.matrices(one.kind)
        first, *others = dict.fromkeys((one.kind, one.way) for one in found)
        make(*first)  # alone, for it also opens the device
        with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
            for pair in others:
                pool.submit(make, *pair)

    def candidate(self, one: Wanted) -> Candidate:
        """Make a candidate and compare its first product with float64."""
        matrices, options = self.matrices(one.kind), dict(one.options)
        x = activations(one.tokens, self._columns, self._settings.device, getattr(torch, one.dtype))
        copies, size = matrices.copies(one.way), matrices.packed_bytes
        if one.around:
            columns, rows = _permutations(*matrices.packed.shape[::-1], x.device)
            products = copies.products(x, columns=columns, rows=rows, **options)
            expected = (x[:, columns].double() @ matrices.dense().T)[:, rows]
        else:
            products, expected = copies.products(x, **options), x.double() @ matrices.dense().T
        natural = one.kind.natural and not one.around
        gather = "unfused" if one.around else "none" if natural else copies.gather(x, **options)
        predicted = None
        if self._settings.device == "cuda" and one.tokens <= ONE_READING.get(one.way, 1):
            predicted = round(predicted_us(size, self._copy_gbps), 3)
        return Candidate(one.name, "sfmp", products, size, error=checked(products[0], expected, x.dtype),
                         facts={"mode": "mma" if one.way == "dequantize" else one.way, "way": one.way,
                                "bits": round(matrices.packed.wbits, 6), "layout": one.kind.layout,
                                "natural": natural, "gather": gather, "tokens": one.tokens, "dtype": one.dtype,
                                "group_size": one.kind.group_size, "predicted_us": predicted})


class Matrices:
    """One random matrix and its copies on a device.

    Attributes
    ----------
    packed : PackedMatrix, on the CPU
    packed_bytes : int, of codes and scales
    copies : function, one of `gpu_wanted.WAYS` → `gpu_products.DeviceCopies` or `HostCopies`, made once
    """

    def __init__(self, rows: int, columns: int, kind: Kind, settings: Settings):
        self.packed, self._device = random_matrix(rows, columns, kind), settings.device
        stored = (self.packed.planes, self.packed.alpha, self.packed.beta)
        self.packed_bytes = sum(tensor.numel() * tensor.element_size() for tensor in stored)
        self.copies = functools.cache(functools.partial(make_copies, self.packed, device=settings.device,
                                                        count=settings.copies(self.packed_bytes)))

    def moved(self) -> PackedMatrix:
        """The matrix with its tensors on the device."""
        there = {key: tensor.to(self._device) for key, tensor in self.packed.tensors().items()}
        return dataclasses.replace(self.packed, **there)

    def dense(self) -> torch.Tensor:
        """The dequantized weight in float64, on the device."""
        return self.moved().dequantize().double()


def _permutations(columns, rows, device):
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.permutation(size)).to(device) for size in (columns, rows)]
