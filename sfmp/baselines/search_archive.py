"""What an AMQ search found: every design that was evaluated; one archive answers every budget.

Source: METHOD.md section 2.4.
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np

from sfmp.checks import SfmpError, write_atomically

LEVELS = (2, 3, 4)


class Search:
    """Archive of evaluated designs.

    Parameters
    ----------
    names : sequence of str
        The linears.
    weights : int [linears]
        Weights of each.
    sensitivities : float [linears]
        Divergence with that linear alone at the lowest level, the others at the highest.
    frozen : bool [linears]
        Linears that keep the highest level.
    group_size : int
    knobs : dict
        What the search was run with; JSON-able.

    Attributes
    ----------
    bits : ndarray uint8 [designs, linears]
    divergences : ndarray float64 [designs]
        Mean Jensen-Shannon divergence per token from full precision, in nats.
    """

    def __init__(self, names, weights, sensitivities, frozen, group_size, knobs=None):
        self.names, self.group_size, self.knobs = list(names), group_size, dict(knobs or {})
        self.weights = np.asarray(weights, dtype=np.int64)
        self.sensitivities = np.asarray(sensitivities, dtype=np.float64)
        self.frozen = np.asarray(frozen, dtype=bool)
        self.bits = np.zeros((0, len(self.names)), dtype=np.uint8)
        self.divergences = np.zeros(0)

    def __repr__(self) -> str:
        return f"Search({len(self.bits)} designs of {len(self.names)} linears, {int(self.frozen.sum())} frozen)"

    def add(self, designs, divergences) -> None:
        """Append designs [n, linears] with their divergences [n]."""
        self.bits = np.concatenate([self.bits, np.asarray(designs, dtype=np.uint8).reshape(-1, len(self.names))])
        self.divergences = np.concatenate([self.divergences, np.asarray(divergences, dtype=np.float64)])

    def full(self, free) -> np.ndarray:
        """Designs int64 [n, linears] from the levels of the linears that are not frozen, [n, free]."""
        designs = np.full((len(free), len(self.names)), LEVELS[-1], dtype=np.int64)
        designs[:, ~self.frozen] = free
        return designs

    def unknown(self, designs) -> np.ndarray:
        """Designs [n, linears] that are not in the archive, each once, in order of appearance."""
        seen, new = {bytes(row) for row in self.bits}, []
        for design in designs:
            key = bytes(design.astype(np.uint8))
            if key not in seen:
                seen.add(key)
                new.append(design)
        return np.array(new, dtype=np.int64).reshape(len(new), len(self.names))

    def size(self, designs) -> np.ndarray:
        """Mean code bits per weight float64 [n] of designs [n, linears]; linears count by their weights."""
        return (np.asarray(designs, dtype=np.int64) @ self.weights) / self.weights.sum()

    @property
    def mean_bits(self) -> np.ndarray:
        """Mean code bits per weight of every design of the archive, float64 [designs]."""
        return self.size(self.bits)

    def best(self, wbits, tolerance: float = 0.005) -> tuple[int, bool]:
        """Design of least divergence within a budget.

        Parameters
        ----------
        wbits : float or Fraction
            Budget in mean code bits per weight (``bpw - 32 / group_size``).
        tolerance : float
            In the same unit.

        Returns
        -------
        index : int
            Of the archive; never above the budget. Equal divergences go to the smaller design.
        within : bool
            Whether the design is at most `tolerance` below the budget.

        Notes
        -----
        The publication takes the best design inside the tolerance. After its 10,250 evaluations that is the
        best within the budget; after few it may be one bad random design, which would be unfair to the method.

        Raises
        ------
        SfmpError
            If no design of the archive is below the budget.
        """
        budget = Fraction(repr(float(wbits))) if not isinstance(wbits, Fraction) else wbits
        total = int(self.weights.sum())
        used = self.bits.astype(np.int64) @ self.weights
        below = used <= int(budget * total)
        if not below.any():
            overhead = 32 / self.group_size
            low, high = used.min(initial=total * LEVELS[-1]) / total, LEVELS[-1]
            raise SfmpError(f"bpw: expected {low + overhead:.4g}..{high + overhead:.4g}, what the search reaches with "
                            f"{int(self.frozen.sum())} of {len(self.names)} linears frozen at {LEVELS[-1]} bits, "
                            f"found {float(budget) + overhead:g}; choose a larger budget")
        candidates = np.flatnonzero(below)
        index = int(candidates[np.lexsort((used[candidates], self.divergences[candidates]))[0]])
        return index, bool(used[index] >= (budget - Fraction(repr(float(tolerance)))) * total)

    def save(self, path) -> None:
        """Write the archive as JSON, replacing `path` atomically; equal searches give equal bytes."""
        text = json.dumps({
            "format_version": 1, "names": self.names, "weights": self.weights.tolist(),
            "group_size": self.group_size, "knobs": self.knobs, "sensitivities": self.sensitivities.tolist(),
            "frozen": self.frozen.tolist(), "bits": self.bits.tolist(), "divergences": self.divergences.tolist(),
        })
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path) -> Search:
        """Read what `save` wrote; raises SfmpError if it is something else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["format_version"] != 1:
                raise SfmpError(f"{path}: expected a search of format_version 1, found {data['format_version']}")
            found = cls(data["names"], data["weights"], data["sensitivities"], data["frozen"], data["group_size"],
                        data["knobs"])
            if any(len(row) != len(found.names) for row in data["bits"]):
                raise SfmpError(f"{path}: expected designs of {len(found.names)} linears each, found others; the file "
                                "was altered, search again")
            found.add(data["bits"], data["divergences"])
        except SfmpError:
            raise
        except (KeyError, TypeError, ValueError) as error:  # not JSON, parts missing, or rows of unequal length
            raise SfmpError(f"{path}: expected a file of Search.save, found another ({error}); "
                            "search again") from error
        if not len(found.weights) == len(found.sensitivities) == len(found.frozen) == len(found.names):
            raise SfmpError(f"{path}: expected {len(found.names)} weights, sensitivities and frozen flags; the file "
                            "was altered, search again")
        if len(found.bits) != len(found.divergences):
            raise SfmpError(f"{path}: expected as many divergences as designs, found {len(found.divergences)} and "
                            f"{len(found.bits)}; the file was altered, search again")
        return found
