"""Which products of ours each part measures, as data: what is measured, and what can be compiled before that.

"blocks" is SFMP: blocks of 2, 3 and 4 bits, rows and columns permuted. "uniform" has one width everywhere; "column
groups" have one width for a group of columns over all rows, as SliM-LLM's matrices have, and keep their order.
"""

from __future__ import annotations

import dataclasses

WAYS = {"cuda": ("mma", "lut", "dequantize"), "cpu": ("lut16", "exact")}
LAYOUTS = ("blocks", "uniform", "column groups")
BITS = (2, 2.5, 3, 3.5, 4)
TABLE_WIDTHS, GROUP_SIZES = (2, 4, 6, 8), (32, 64, 128, 256)
ACCURACY_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class Kind:
    """What kind of matrix: mean bits of the codes, one of `LAYOUTS`, whether nothing is permuted, group size."""

    bits: float
    layout: str = "blocks"
    natural: bool = False
    group_size: int = 128


KINDS = (*(Kind(bits) for bits in BITS), *(Kind(bits, "uniform") for bits in (2, 3, 4)),
         *(Kind(bits, "column groups", True) for bits in (2.5, 3, 3.5)), Kind(3, natural=True))


@dataclasses.dataclass(frozen=True)
class Wanted:
    """One candidate.

    Attributes
    ----------
    kind : Kind
    way : one of `WAYS` of the device
    tokens : int
    dtype : "float16" or "bfloat16"
    around : bool, torch permutes activations and results around the product of a matrix in natural order
    options : tuple of (name, value), of `mma_run.plan` or `lut_run.plan`
    """

    kind: Kind
    way: str
    tokens: int = 1
    dtype: str = "float16"
    around: bool = False
    options: tuple[tuple[str, object], ...] = ()

    @property
    def name(self) -> str:
        """What it is called in the result.

        Examples
        --------
        >>> Wanted(Kind(2.5), "mma", 4, "bfloat16").name
        'mma 2.5 blocks bfloat16 4 tokens'
        """
        words = [self.way, f"{self.kind.bits:g}", self.kind.layout]
        if self.kind.natural and self.kind.layout == "blocks":
            words.append("unfused" if self.around else "natural")
        words += [f"groups of {self.kind.group_size}"] if self.kind.group_size != 128 else []
        words += [f"{name} {value}" for name, value in self.options]
        words += [self.dtype] if self.dtype != "float16" else []
        words += [f"{self.tokens} tokens"] if self.tokens > 1 else []
        return " ".join(words)


def default_modes(device: str) -> tuple[str, ...]:
    """Modes of the kernels that can run on a device, "cuda" or "cpu"."""
    if device == "cuda":
        return WAYS["cuda"][:2]
    from kernels_numba.cpu import targets

    known = targets.MODES[targets.detect()[0]]
    return tuple(mode for mode in WAYS["cpu"] if mode in known)


def wanted(part: dict, device: str) -> list[Wanted]:
    """The candidates of a part, ours only."""
    makers = {"product": _product, "batch": _batch, "width": _width, "accuracy": _accuracy}
    return makers[part["part"]](part, device) if part["part"] in makers else []


def _product(part, device):
    """One token: modes by bits and layouts; the permutations inside the product, beside it, and not there."""
    found = []
    for kind in KINDS:
        for mode in default_modes(device):
            found.append(Wanted(kind, mode))
            if kind.layout == "blocks" and kind.natural:
                found.append(Wanted(kind, mode, around=True))
            elif kind.layout == "blocks":
                found.append(Wanted(kind, mode, dtype="bfloat16"))
            if kind == Kind(3) and mode == "mma":
                found.append(Wanted(kind, mode, options=(("gather", "unfused"),)))
    return found


def _batch(part, device):
    """Several tokens: every way."""
    ways = WAYS["cuda"] if device == "cuda" else default_modes(device)
    return [Wanted(Kind(3), way, tokens) for tokens in part["batches"] for way in ways]


def _width(part, device):
    """Look-up tables of every width, for every group size; the CPU kernels have one width."""
    kinds = [Kind(3, "uniform", True, size) for size in GROUP_SIZES]
    if device == "cuda":
        return [Wanted(kind, "lut", options=(("width", width),)) for kind in kinds for width in TABLE_WIDTHS]
    return [Wanted(kind, mode) for kind in kinds for mode in default_modes(device) if mode == "lut16"]


def _accuracy(part, device):
    return [Wanted(Kind(bits), mode, ACCURACY_TOKENS, dtype) for bits in (2, 3, 4) for mode in default_modes(device)
            for dtype in ("float16", "bfloat16")]
