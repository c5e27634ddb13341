"""Less memory for salience of a model that fits in memory: fewer activations, accumulators elsewhere.

A model that does not fit is walked layer by layer instead (`sfmp.stream_salience`); the numbers are the same in each
case.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from sfmp.checks import SfmpError
from sfmp.walk import find_layers


@contextlib.contextmanager
def checkpointed(model: nn.Module, names: Iterable[str], wanted: bool = True):
    """Keep only the inputs of layers on the way forward, and run each layer again on the way back.

    Parameters
    ----------
    model : nn.Module
    names : iterable of str
        Linear layers; what is checkpointed are the layers that hold them (`sfmp.walk.find_layers`).
    wanted : bool
        False does nothing.

    Notes
    -----
    Transformers' own switch works in training mode only, with dropout. Layers run to their end again, so that hooks on
    their modules see the same calls each time.
    """
    if not wanted:
        yield
        return
    from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

    layers = list(dict.fromkeys(layer for stack in find_layers(model, names) for _, layer in stack))
    held = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        with set_checkpoint_early_stop(False):
            yield
    finally:
        for layer, forward in zip(layers, held, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def accumulators(weights: Iterable[torch.Tensor], place=None) -> dict[torch.Tensor, torch.Tensor]:
    """Return a float32 tensor of zeros for each weight.

    Parameters
    ----------
    weights : tensors
    place : None, "cpu" or path of a folder
        Beside the weight; in the memory of the CPU; or in files there, which are mapped, and stay.

    Raises
    ------
    SfmpError
        The folder holds the files of an earlier call, whose result may still be mapped.
    """
    made = {}
    for weight in weights:
        if weight in made:
            continue
        if place is None or place == "cpu":
            made[weight] = torch.zeros(weight.shape, dtype=torch.float32, device=place or weight.device)
            continue
        folder = Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{len(made):06d}.float32"
        if file.exists():
            raise SfmpError(f"{file}: expected no sums of an earlier call, found some, which this one would overwrite; "
                            "remove them or name another folder")
        flat = torch.from_file(str(file), shared=True, size=weight.numel(), dtype=torch.float32)
        made[weight] = flat.zero_().view(weight.shape)
    return made
