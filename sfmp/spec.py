"""What to do, and what was decided: QuantSpec, BlockGrid, MatrixPlan, Plan. Never imports torch."""

import dataclasses
import difflib
import hashlib
import json
import numbers
import re
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from functools import cached_property

import numpy as np

from sfmp.checks import SfmpError, check_permutation, integer, write_atomically
from sfmp.grid import BlockGrid

__all__ = ["BlockGrid", "MatrixPlan", "Plan", "QuantSpec", "SfmpError"]

CHOICES = {
    "reorder": ("both", "rows", "cols", "none"),
    "method": ("awq", "gptq", "rtn"),
    "scope": ("global", "layer", "matrix"),
    "objective": ("paper", "measured"),
    "shared_columns": (False, True),
}
MAX_BITS = 8
_TOLERANCE = 1e-6  # bits; budgets such as 2 + 1/3 cannot be written exactly as a decimal


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """Everything that defines a quantization, validated on construction.

    Parameters
    ----------
    bpw : float
        Target bits per quantized weight, codes plus one fp16 scale and one fp16 offset per group.
    group_size : int
        Input columns that share a scale; a positive multiple of 32.
    block_rows : int
        Output rows of a block; a block (block_rows x group_size) has one bit-width.
    levels : tuple of int or "auto"
        Allowed bit-widths, increasing within 1..8; "auto" is {floor, ceil} of the code-bit budget (paper v1,
        Eq. 7).
    reorder, method, scope, objective : str
        See `CHOICES`; DESIGN.md section 3.
    shared_columns : bool
        Matrices that read the same activations (q, k, v; gate, up) get one column order, so kernels prepare them once.
    skip : tuple of str
        Matrices left alone: full dotted names, or last components.
    seed : int

    Raises
    ------
    SfmpError
        If a value is invalid, or if `bpw` cannot be reached with `levels`.

    Notes
    -----
    Source: METHOD.md 1.3, 1.5; DESIGN.md sections 2 and 3.

    Examples
    --------
    >>> QuantSpec(bpw=3.0, levels="auto").candidate_levels
    (2, 3)
    """

    bpw: float = 3.0
    group_size: int = 128
    block_rows: int = 512
    levels: tuple[int, ...] | str = (2, 3, 4)
    reorder: str = "both"
    method: str = "awq"
    scope: str = "global"
    objective: str = "paper"
    skip: tuple[str, ...] = ("lm_head",)
    seed: int = 0
    shared_columns: bool = False

    def __post_init__(self):
        def put(name, value):
            object.__setattr__(self, name, value)

        if isinstance(self.bpw, bool) or not isinstance(self.bpw, numbers.Real) or not np.isfinite(self.bpw):
            raise SfmpError(f"bpw: expected a finite number, found {self.bpw!r}")
        put("bpw", float(self.bpw))
        put("group_size", integer("group_size", self.group_size, 1))
        if self.group_size % 32:
            raise SfmpError(f"group_size: expected a multiple of 32 (a word of a plane holds 32 columns), "
                            f"found {self.group_size}")
        put("block_rows", integer("block_rows", self.block_rows, 1))
        put("seed", integer("seed", self.seed, 0))
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, type(allowed[0])) or value not in allowed:
                raise SfmpError(f"{name}: expected one of {', '.join(map(str, allowed))}, found {value!r}")
        if (isinstance(self.skip, str) or not isinstance(self.skip, Iterable)
                or not all(isinstance(s, str) for s in self.skip)):
            raise SfmpError(f"skip: expected a tuple of module names, found {self.skip!r}; "
                            "for one name write (name,)")
        put("skip", tuple(self.skip))
        self._check_levels(put)

    def _check_levels(self, put):
        if isinstance(self.levels, str):
            if self.levels != "auto":
                raise SfmpError(f'levels: expected "auto" or a tuple of bit-widths, found {self.levels!r}')
            low, high = 1, MAX_BITS
        else:
            try:
                levels = tuple(integer("levels", b, 1, MAX_BITS) for b in self.levels)
            except TypeError:
                raise SfmpError(f"levels: expected a tuple of bit-widths, found {self.levels!r}") from None
            if not levels or any(a >= b for a, b in zip(levels, levels[1:], strict=False)):
                raise SfmpError(f"levels: expected increasing bit-widths within 1..8, found {levels}")
            put("levels", levels)
            low, high = levels[0], levels[-1]
        if not low - _TOLERANCE <= self.wbits <= high + _TOLERANCE:
            overhead = 32 / self.group_size
            raise SfmpError(f"bpw: {self.bpw:g} leaves {self.wbits:g} code bits per weight at group_size "
                            f"{self.group_size}, levels {self.levels} reach {low}..{high}; choose bpw in "
                            f"{low + overhead:g}..{high + overhead:g} or other levels")

    @property
    def wbits(self) -> float:
        """Code-bit budget per weight: bpw - 32/group_size."""
        return float(self._exact_wbits)

    @property
    def _exact_wbits(self) -> Fraction:
        # bpw is read as the decimal the user wrote: 2.3 * weights must not lose a block to binary rounding.
        return Fraction(repr(self.bpw)) - Fraction(32, self.group_size)

    @property
    def candidate_levels(self) -> tuple[int, ...]:
        """Bit-widths a block may take; for "auto" {floor, ceil} of `wbits`, or `wbits` if an integer."""
        if self.levels != "auto":
            return self.levels
        nearest = round(self.wbits)
        if abs(self.wbits - nearest) <= _TOLERANCE:
            return (nearest,)
        return (int(self.wbits), int(self.wbits) + 1)

    def budget_bits(self, weights: int) -> int:
        """Return the largest whole number of code bits that `weights` weights may use."""
        levels = self.candidate_levels
        bits = int(self._exact_wbits * weights)
        return min(max(bits, levels[0] * weights), levels[-1] * weights)

    def to_dict(self) -> dict:
        """Return plain JSON types; `from_dict` inverts it exactly. A switch that is off is left out."""
        return {f.name: list(v) if isinstance(v, tuple) else v
                for f in dataclasses.fields(self) if (v := getattr(self, f.name)) is not False}

    @classmethod
    def from_dict(cls, data: Mapping) -> "QuantSpec":
        """Build a spec from `to_dict` output or a configuration section; unknown keys are rejected."""
        if not isinstance(data, Mapping):
            raise SfmpError(f"spec: expected a mapping of fields, found {type(data).__name__}")
        names = [f.name for f in dataclasses.fields(cls)]
        for key in data:
            if key not in names:
                close = difflib.get_close_matches(str(key), names, 1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; known keys are {', '.join(names)}"
                raise SfmpError(f"spec: unknown key {key!r}{hint}")
        return cls(**data)


@dataclasses.dataclass(frozen=True, eq=False)
class MatrixPlan:
    """Decision for one matrix: W[row_perm][:, col_perm] is cut in blocks, block (i, j) gets bits[i, j].

    row_perm int64 [out_features], col_perm int64 [in_features], bits uint8 [row_blocks, groups].
    """

    row_perm: np.ndarray
    col_perm: np.ndarray
    bits: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.row_perm), len(self.col_perm)


class Plan(Mapping):
    """Bits and permutations of every planned matrix: a read-only mapping name -> MatrixPlan, by name.

    Raises
    ------
    SfmpError
        If a matrix has an invalid permutation, a bit map of the wrong shape, or a level outside the spec.
    """

    def __init__(self, spec: QuantSpec, matrices: Mapping[str, MatrixPlan]):
        if not matrices:
            raise SfmpError("plan: expected at least one matrix, found none; was every layer skipped?")
        self.spec = spec
        self._matrices = {name: self._checked(name, matrices[name]) for name in sorted(matrices)}

    def _checked(self, name, matrix):
        rows = check_permutation(f"plan[{name}].row_perm", matrix.row_perm)
        cols = check_permutation(f"plan[{name}].col_perm", matrix.col_perm)
        grid = BlockGrid(len(rows), len(cols), self.spec.block_rows, self.spec.group_size)
        bits = np.asarray(matrix.bits)
        if bits.shape != (grid.row_blocks, grid.groups):
            raise SfmpError(f"plan[{name}].bits: expected shape {(grid.row_blocks, grid.groups)}, found "
                            f"{bits.shape} for {len(rows)} x {len(cols)} weights; another model or spec?")
        if not np.isin(bits, self.spec.candidate_levels).all():
            raise SfmpError(f"plan[{name}].bits: expected levels {self.spec.candidate_levels}, "
                            f"found {sorted(set(np.unique(bits).tolist()))}")
        return MatrixPlan(rows, cols, bits.astype(np.uint8))

    def __getitem__(self, name: str) -> MatrixPlan:
        try:
            return self._matrices[name]
        except KeyError:
            raise KeyError(f"{name!r} is not in the plan of {len(self)} matrices") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)

    def __repr__(self) -> str:
        return f"Plan({len(self)} matrices, bpw={self.bpw:.4f}, hash={self.hash[:12]})"

    def grid(self, name: str) -> BlockGrid:
        """Return the block grid of one matrix."""
        return BlockGrid(*self[name].shape, self.spec.block_rows, self.spec.group_size)

    @cached_property
    def wbits(self) -> float:
        """Achieved mean code bits over all real weights."""
        weights = {name: self.grid(name).weights for name in self}
        bits = sum((w * self[name].bits).sum() for name, w in weights.items())
        return float(bits / sum(w.sum() for w in weights.values()))

    @property
    def bpw(self) -> float:
        """Achieved bits per weight: `wbits` plus 32/group_size."""
        return self.wbits + 32 / self.spec.group_size

    @cached_property
    def hash(self) -> str:
        """sha256 of the spec, the permutations and the bit maps: equal for equal plans on every machine."""
        digest = hashlib.sha256(json.dumps(self.spec.to_dict(), sort_keys=True).encode())
        for name, matrix in self.items():
            digest.update(json.dumps([name, *matrix.shape]).encode())
            for array, dtype in ((matrix.row_perm, "<i8"), (matrix.col_perm, "<i8"), (matrix.bits, "u1")):
                digest.update(np.ascontiguousarray(array, dtype=dtype).tobytes())
        return digest.hexdigest()

    def summary(self) -> list[dict]:
        """Return one row per matrix, in reading order: name, N, K, wbits, number of blocks at each level."""
        rows = []
        for name in sorted(self, key=lambda n: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", n)]):
            grid, bits = self.grid(name), self[name].bits
            rows.append({"name": name, "N": grid.out_features, "K": grid.in_features,
                         "wbits": float((grid.weights * bits).sum() / grid.weights.sum()),
                         **{f"blocks_{b}": int((bits == b).sum()) for b in self.spec.candidate_levels}})
        return rows

    def save(self, path) -> None:
        """Write one safetensors file, byte-identical for equal plans; replaces `path` atomically."""
        from safetensors.numpy import save_file

        tensors = {f"{name}.{part}": np.ascontiguousarray(getattr(matrix, part))
                   for name, matrix in self.items() for part in ("row_perm", "col_perm", "bits")}
        # One metadata key only: safetensors writes several in an order that differs from run to run.
        meta = json.dumps({"format_version": 1, "spec": self.spec.to_dict(), "hash": self.hash})
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={"sfmp_plan": meta}))

    @classmethod
    def load(cls, path) -> "Plan":
        """Read and validate a plan; raises SfmpError if the file is no plan, damaged or altered."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                meta = json.loads((file.metadata() or {}).get("sfmp_plan", "null"))
                parts = {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise SfmpError(f"{path}: expected a file of Plan.save, found a damaged one: {error}") from error
        if meta is None or meta.get("format_version") != 1:
            raise SfmpError(f"{path}: expected a plan of format_version 1, found metadata {meta}")
        matrices = {}
        for name in {key.rpartition(".")[0] for key in parts}:
            try:
                matrices[name] = MatrixPlan(*(parts[f"{name}.{p}"] for p in ("row_perm", "col_perm", "bits")))
            except KeyError as error:
                raise SfmpError(f"{path}: tensor {error} is missing; write the plan again") from None
        plan = cls(QuantSpec.from_dict(meta["spec"]), matrices)
        if plan.hash != meta["hash"]:
            raise SfmpError(f"{path}: expected plan hash {meta['hash'][:12]}, found {plan.hash[:12]}; "
                            "the file was altered")
        return plan
