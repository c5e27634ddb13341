"""What enters a decoder layer, in a file: hidden states, masks, positions. Layers can then be quantized elsewhere.

A file holds the inputs of one range of layers, each hidden state once, as it enters the first of them. Tensors are
safetensors; how they are nested among a layer's arguments is JSON, so that nothing is unpickled.

Source: METHOD.md section 1.6 (AWQ hands on full-precision outputs, so what enters a layer depends on no quantization).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from sfmp.checks import SfmpError, write_atomically
from sfmp.progress import bar
from sfmp.stream import LayerStream, NotStreamable
from sfmp.stream_quantize import calibration_batches
from sfmp.walk import Batch, in_float32, run_layer

_ARGUMENTS, _IDENTITY = "sfmp_arguments", "sfmp_identity"


def cache_inputs(stream: LayerStream, windows, ranges: Sequence[range], paths: Sequence, identity: Mapping[str, str],
                 progress: bool = False) -> None:
    """Run the model once, layer by layer, and write what enters each range of layers to one file.

    Parameters
    ----------
    stream : LayerStream
        Its `exposed` are the matrices that will be quantized.
    windows : int64 [n, seqlen]
    ranges : ranges of layers in order, together all layers
    paths : one file for each
    identity : mapping of str to str
        What decides the content (`sfmp.scatter.identity_of`); kept in every file.
    progress : bool
        Show a bar.

    Raises
    ------
    NotStreamable
        The model cannot be run layer by layer, or a layer is given something that is no plain value or tensor.
    """
    stream.check(windows)
    batches = calibration_batches(stream, windows, "awq")
    starts, last = {}, max(layers.start for layers in ranges if layers)
    for layers, path in zip(ranges, paths, strict=True):
        if layers:
            starts[layers.start] = layers, path
        else:
            write_inputs(path, [], layers, identity)
    for index in bar(range(last + 1), "layer inputs", "layer", progress):
        if index in starts:
            layers, path = starts[index]
            write_inputs(path, batches, layers, identity)
        if index < last:
            with stream.resident(index) as layer, in_float32(layer):
                for batch in batches:
                    batch.hidden = run_layer(layer, batch, index)


def write_inputs(path, batches: Sequence[Batch], layers: range, identity: Mapping[str, str]) -> None:
    """Write batches as they enter the first of some layers, and what else these are called with; atomically."""
    from safetensors.torch import save_file

    tensors = {f"hidden.{number}": batch.hidden for number, batch in enumerate(batches)}
    store, kinds = _Store(tensors), {}
    for batch in batches:  # batches of one shape share their list of arguments
        if id(batch.calls) not in kinds:
            kinds[id(batch.calls)] = len(kinds), [store.encoded(batch.calls[index]) for index in layers]
    record = {"layers": [layers.start, layers.stop], "kinds": [calls for _, calls in kinds.values()],
              "batches": [kinds[id(batch.calls)][0] for batch in batches]}
    metadata = {_ARGUMENTS: json.dumps(record), _IDENTITY: json.dumps(dict(identity), sort_keys=True)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(Path(path), lambda temporary: save_file(tensors, temporary, metadata=metadata))


def read_inputs(path, device, identity: Mapping[str, str]) -> tuple[range, list[Batch]]:
    """Return the layers of a file of `cache_inputs`, and the batches as they enter the first of them.

    Parameters
    ----------
    path : path
    device : torch.device
    identity : mapping of str to str
        What the file must have been made from.

    Raises
    ------
    SfmpError
        The file is none such, or was made from something else (named).
    """
    from safetensors import SafetensorError, safe_open

    from sfmp.resume import differences

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}
        record, made_from = (json.loads(metadata[key]) for key in (_ARGUMENTS, _IDENTITY))
    except (SafetensorError, OSError, KeyError) as error:
        raise SfmpError(f"{path}: expected layer inputs, found {error}; write them again") from error
    if wrong := differences(made_from, identity):
        raise SfmpError(f"{path}: layer inputs were made from something else: {wrong}. Write them again")
    layers = range(*record["layers"])
    # A call for every layer of the model, None outside of the range: a batch is asked by number of layer.
    before = [None] * layers.start
    kinds = [before + [_decoded(call, tensors) for call in calls] for calls in record["kinds"]]
    return layers, [Batch(tensors[f"hidden.{number}"], kinds[kind]) for number, kind in enumerate(record["batches"])]


class _Store:
    """Arguments as JSON, their tensors by number among those of a file, each once."""

    def __init__(self, tensors):
        self.tensors, self._names = tensors, {}

    def encoded(self, value):
        """JSON of one argument, nested as it may be."""
        if isinstance(value, torch.Tensor):
            if id(value) not in self._names:
                self._names[id(value)] = f"argument.{len(self._names)}"
                self.tensors[self._names[id(value)]] = value.clone()  # views of one tensor cannot be saved
            return {"tensor": self._names[id(value)]}
        if type(value) in (tuple, list):
            return {type(value).__name__: [self.encoded(item) for item in value]}
        if type(value) is dict:
            return {"dict": [[key, self.encoded(item)] for key, item in value.items()]}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise NotStreamable(f"a layer is given a {type(value).__name__}, which cannot be handed on to another process")


def _decoded(value, tensors):
    if not isinstance(value, dict):
        return value
    (kind, content), = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decoded(item, tensors) for key, item in content}
    return {"tuple": tuple, "list": list}[kind](_decoded(item, tensors) for item in content)
