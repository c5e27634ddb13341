"""What a product launches: kernels, grids and arguments by name, for the driver and for the simulator alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

TYPES = "uhfin"  # of parameters: pointers to uint32, uint16, float32, int32, and an int32 by value


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel with its grid and arguments.

    Attributes
    ----------
    make : function that returns the kernel and keeps it, such as `lut.make_sum`
    options : tuple, what `make` is called with
    types : str, one letter of `TYPES` per parameter
    arguments : tuple
        Per parameter a number, the name of an array, or (name, first element).
        Arrays are those of the layout, of `Plan.scratch`, and x, y, bias.
    grid : (int, int), thread blocks
    threads : int, of a block
    shared_bytes : int, shared memory beyond what the kernel declares
    """

    make: Callable
    options: tuple
    types: str
    arguments: tuple
    grid: tuple[int, int]
    threads: int
    shared_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """The launches of one product, in order, and the scratch arrays they need.

    Attributes
    ----------
    scratch : dict, name → (elements, letter of `TYPES`)
    launches : tuple of Launch
    """

    scratch: dict[str, tuple[int, str]]
    launches: tuple[Launch, ...]


def signature(types: str):
    """Numba's signature of a kernel with these parameters, arrays as pointers."""
    from numba import types as numbers

    known = dict(zip(TYPES, (numbers.uint32, numbers.uint16, numbers.float32, numbers.int32), strict=False))
    return numbers.void(*(numbers.int32 if letter == "n" else numbers.CPointer(known[letter]) for letter in types))


def run(plan: Plan, arrays: dict) -> None:
    """Launch with Numba, arrays as one-dimensional Numba or NumPy arrays: what the simulator can do.

    Parameters
    ----------
    plan : Plan
    arrays : dict
        Every array the launches name.
    """
    import numpy as np

    for launch in plan.launches:
        values = []
        for argument in launch.arguments:
            if isinstance(argument, str):
                values.append(arrays[argument])
            elif isinstance(argument, tuple):
                values.append(arrays[argument[0]][argument[1] :])
            else:
                values.append(np.int32(argument))  # an int would be 64 bits
        launch.make(*launch.options)[launch.grid, launch.threads, 0, launch.shared_bytes](*values)
