"""Fisher salience of a model of which one layer is in memory at a time: exact, by walking back layer by layer.

Forward once, every layer's input kept on disk; the loss from the last layer's output alone; then from the last layer to
the first each layer is run again on its kept inputs, with gradients, from the gradient of its output. Products and
sums are those of one backward pass through the whole model, so the numbers are the same.

Memory: one layer, one fp32 accumulator for each of its weights, and the hidden states of all windows at one place.
Disk: the hidden states at every layer (layers · windows · seqlen · hidden numbers in the model's dtype).

Source: METHOD.md sections 1.2 and 4 (C2).
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from sfmp.checks import SfmpError, write_atomically
from sfmp.progress import bar
from sfmp.readers import InputRecord, Salience
from sfmp.salience import backward_passes, finished, gradients_only_for, linear_modules
from sfmp.salience_memory import accumulators
from sfmp.stream import LayerStream, passed_through
from sfmp.walk import capture, first_tensor
from sfmp.windows import one_window


def fisher_by_layer(stream: LayerStream, windows, folder, *, skip=("lm_head",), done: Collection[int] = (),
                    progress: bool = False) -> Iterator[tuple[int, Salience]]:
    """Give the Fisher salience of one layer after the other, from the last to the first.

    Parameters
    ----------
    stream : LayerStream
        After its `check`.
    windows : integers [n, seqlen]
    folder : path
        For hidden states and gradients; what a killed run left there is used, so it must be of the same stream and
        windows. A layer's files go when the next salience is asked for.
    skip : names of linear layers to leave out
    done : layers whose salience is known
    progress : bool
        Show bars.

    Yields
    ------
    (int, Salience)
        Number of the layer, and its matrices as `sfmp.salience.fisher_salience` has them. While the caller holds it
        the layer is in memory.

    Raises
    ------
    SfmpError
        As `fisher_salience`.
    """
    folder, depth = Path(folder), len(stream)
    todo = [index for index in reversed(range(depth)) if index not in done]
    if not todo:
        return
    if not len(windows):
        raise SfmpError("windows: expected at least one sample, found none")
    with gradients_only_for(stream.model, ()):
        batches = _captured(stream, windows)
        _forward(stream, batches, folder, progress)
        _loss(stream, windows, batches, folder, progress)
        for index in bar(todo, "salience", "layer", progress):
            with stream.resident(index) as layer:
                yield index, _backward(stream, layer, index, batches, folder, skip)
            for path in (_states(folder, index), _gradients(folder, index + 1)):
                path.unlink(missing_ok=True)


def _captured(stream, windows):
    """How each layer is called on each window, and the input of the first in the dtype that it has there."""
    ids = [one_window(stream.model, window, "token ids") for window in windows]
    modules, dtypes = [layer for _, layer in stream.layers], []

    def note(module, args, kwargs):
        dtypes.append(first_tensor(args or list(kwargs.values())).dtype)

    with stream.running():
        handle = modules[0].register_forward_pre_hook(note, with_kwargs=True)
        try:
            batches = capture(stream.model, modules, ids)
        finally:
            handle.remove()
    for batch in batches:
        batch.hidden = batch.hidden.to(dtypes[0])
    return batches


def _forward(stream, batches, folder, progress):
    """Write the input of every layer, and the output of the last, to one file each; begin where files end."""
    depth = len(stream)
    if _gradients(folder, depth).exists() or any(_gradients(folder, index).exists() for index in range(depth)):
        return  # the way back has begun
    known = [index for index in range(depth + 1) if _states(folder, index).exists()]
    if not known:
        _write(_states(folder, 0), [batch.hidden for batch in batches])
    first = max(known, default=0)
    for index in bar(range(first, depth), "salience: hidden states", "layer", progress):
        with stream.resident(index) as layer, _reading(_states(folder, index)) as state, torch.no_grad():
            _write(_states(folder, index + 1),
                   [_run(layer, batch, index, state(number)) for number, batch in enumerate(batches)])


def _loss(stream, windows, batches, folder, progress):
    """Write the gradient of each window's loss with respect to the output of the last layer."""
    depth = len(stream)
    if any(_gradients(folder, index).exists() for index in range(depth + 1)):
        return
    gradients, numbers = [], itertools.count()
    with _reading(_states(folder, depth)) as state:

        def last():
            hidden = state(next(numbers)).requires_grad_()
            hidden.register_post_accumulate_grad_hook(lambda tensor: gradients.append(tensor.grad))
            return hidden

        with passed_through(stream, batches[0].calls, last):
            backward_passes(stream.model, windows, None, "salience: loss", progress)
    _write(_gradients(folder, depth), gradients)
    _states(folder, depth).unlink()


def _backward(stream, layer, index, batches, folder, skip):
    """Salience of one layer; writes the gradient of its input for the layer before it."""
    prefix = stream.layers[index][0]
    linears = {name: module for name, module in linear_modules(stream.model, skip).items()
               if name.startswith(f"{prefix}.")}
    sums = accumulators(module.weight for module in linears.values())
    reached, gradients = set(), []

    def consume(weight):
        gradient = weight.grad.float()
        weight.grad = None
        sums[weight].addcmul_(gradient, gradient)
        reached.add(weight)

    with (contextlib.ExitStack() as hooks, _reading(_states(folder, index)) as state,
          _reading(_gradients(folder, index + 1)) as gradient, torch.enable_grad()):
        record = hooks.enter_context(InputRecord(linears))
        for weight in sums:
            weight.requires_grad_()
            hooks.callback(weight.register_post_accumulate_grad_hook(consume).remove)
        for number, batch in enumerate(batches):
            hidden = state(number).requires_grad_(index > 0)
            output = _run(layer, batch, index, hidden)
            if output.requires_grad:  # nothing wants a gradient in a first layer that is skipped
                output.backward(gradient(number))
            gradients.append(hidden.grad)
        hooks.callback(lambda: [weight.requires_grad_(False) for weight in sums])
    if index > 0:
        _write(_gradients(folder, index), gradients)
    unused = [name for name, module in linears.items() if module.weight not in reached]
    if unused:
        warnings.warn(f"no gradient reached {', '.join(unused)}: their salience is zero", stacklevel=3)
    bypassed = record.leave_bypassed(name for name, module in linears.items() if module.weight in reached)
    kept = {name: sums[module.weight] for name, module in linears.items() if name not in bypassed}
    return finished(kept, record.groups())


def _run(layer, batch, index, hidden):
    """Output of a layer in the dtype of the model; `sfmp.walk.run_layer` is float32."""
    key, args, kwargs = batch.calls[index]
    args, kwargs = list(args), dict(kwargs)
    if key == 0:
        args[0] = hidden
    else:
        kwargs[key] = hidden
    return first_tensor(layer(*args, **kwargs))


def _states(folder, index):
    return folder / f"states-{index:05d}.safetensors"


def _gradients(folder, index):
    return folder / f"gradients-{index:05d}.safetensors"


def _write(path, tensors):
    from safetensors.torch import save_file

    named = {str(number): tensor.detach().cpu().contiguous() for number, tensor in enumerate(tensors)}
    write_atomically(path, lambda temporary: save_file(named, temporary))


@contextlib.contextmanager
def _reading(path):
    """A function from the number of a window to its tensor, a copy."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        yield lambda number: file.get_tensor(str(number)).clone()

