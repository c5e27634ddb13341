"""What a method costs, stage by stage: seconds, peak host memory, and how often it had to run the model.

A stage also says what its work consists of (`unit`, e.g. "model evaluation"), how many units were done here
and how many the method's own settings would need on the same model, so that a reduced run always carries the
measured price of one unit and the price of the whole.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

SAMPLING_SECONDS = 0.005  # between two looks at the memory of the process


@dataclass
class Stage:
    """One stage of a method.

    Attributes
    ----------
    name : str
    wall_seconds, cpu_seconds : float
        Summed over every time the stage was entered.
    peak_bytes : int
        Highest resident memory of the process (host memory; that of a GPU is not in it) while in the stage, above
        what was resident when the record was made.
    evaluations : int
        Forward (or forward and backward) passes of the whole model over one window.
    unit : str
        What the work consists of, in the singular.
    units, full_units : int
        Units done here, and with the method's own settings on this model.
    unit_scale : float
        How much dearer one unit is with the method's own settings (e.g. tokens per evaluation, full / here).
    """

    name: str
    unit: str = "run"
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    evaluations: int = 0
    units: int = 0
    full_units: int = 0
    unit_scale: float = 1.0

    @property
    def full_seconds(self) -> float:
        """Wall seconds extrapolated to the method's own settings: linear in units and in their size."""
        if not self.units or not self.full_units:
            return self.wall_seconds
        return self.wall_seconds / self.units * self.full_units * self.unit_scale


class CostRecord:
    """Stages of one method in the order they were first entered.

    Examples
    --------
    >>> cost = CostRecord()
    >>> with cost.stage("search", unit="model evaluation") as stage:
    ...     stage.units, stage.full_units = 10, 10_250
    >>> cost.rows()[0]["full_units"]
    10250
    """

    def __init__(self):
        self.stages: dict[str, Stage] = {}
        self._start = _resident()

    @contextlib.contextmanager
    def stage(self, name: str, unit: str = "run") -> Iterator[Stage]:
        """Measure what happens inside as stage `name`; entering it again adds to it. Stages do not nest."""
        stage = self.stages.setdefault(name, Stage(name, unit))
        with _PeakMemory() as memory:
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                yield stage
            finally:
                stage.wall_seconds += time.perf_counter() - wall
                stage.cpu_seconds += time.process_time() - cpu
        stage.peak_bytes = max(stage.peak_bytes, memory.peak - self._start)

    def rows(self) -> list[dict]:
        """Stages as flat JSON-able dicts, clock readings included."""
        return [
            {
                "stage": s.name, "wall_seconds": s.wall_seconds, "cpu_seconds": s.cpu_seconds,
                "peak_bytes": max(0, s.peak_bytes), "evaluations": s.evaluations, "unit": s.unit,
                "units": s.units, "full_units": s.full_units or s.units, "unit_scale": s.unit_scale,
                "full_seconds": s.full_seconds,
            }
            for s in self.stages.values()
        ]

    def counts(self) -> list[dict]:
        """The part of `rows` that is the same in every run: no clocks, no memory."""
        kept = ("stage", "evaluations", "unit", "units", "full_units", "unit_scale")
        return [{key: row[key] for key in kept} for row in self.rows()]


class _PeakMemory:
    """Highest resident memory of this process while inside, sampled by a thread."""

    def __enter__(self):
        self.peak, self._stop = _resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self):
        while not self._stop.wait(SAMPLING_SECONDS):
            self.peak = max(self.peak, _resident())

    def __exit__(self, *exception):
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, _resident())


def _resident() -> int:
    """Resident bytes of this process."""
    import psutil

    return psutil.Process(os.getpid()).memory_info().rss
