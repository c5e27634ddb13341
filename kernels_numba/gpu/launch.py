"""The launch table of a device: grids, and from how many tokens on dequantizing the weight is faster.

The numbers are data, ``launch.json`` beside this file, by name of device; ``python -m kernels_numba.gpu.tune`` measures
them. An entry says in ``measured`` where its numbers are from. "default" was never measured: it holds estimates of
design/CUDA.md (a crossover of about 64 tokens), because no kernel had run on a GPU when it was written.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path

PATH = Path(__file__).with_name("launch.json")
DEFAULT = "default"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is launched on a device.

    Attributes
    ----------
    crossover : float
        From so many tokens on the weight is dequantized; infinite if never.
    warps : dict, mode → warps of a block, None for the kernel's own choice
    waves : int, blocks of the look-up kernel per multiprocessor that sharing out tiles aims at
    measured : dict or False, on what and with what
    """

    crossover: float
    warps: dict
    waves: int
    measured: dict | bool


@functools.cache
def table() -> dict:
    return json.loads(PATH.read_text())


def settings(device_name: str) -> Settings:
    """Return what was measured on a device of this name, else the defaults.

    Examples
    --------
    >>> settings("a device nobody has").measured
    False
    """
    devices = table()["devices"]
    found = devices.get(device_name, devices[DEFAULT])
    return Settings(found["crossover"] or math.inf, found["warps"], found["waves"], found["measured"])
