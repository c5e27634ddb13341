"""The two training loops of EfficientQAT: layers one after the other, then the steps of the whole model.

Both change :class:`sfmp.baselines.fake_quant.FakeQuantLinear` layers only; every other parameter of the model
has to be frozen by the caller.

Source: METHOD.md sections 1.8 and 2.8; EfficientQAT (arXiv 2407.11062).
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch.utils.checkpoint import checkpoint

from sfmp.checks import SfmpError
from sfmp.salience import causal_lm_loss
from sfmp.walk import Batch, capture, first_tensor, in_float32, run_layer

FINAL_RATE = 1 / 20  # of the learning rate, at the end of the cosine
CAPTURED = 64  # batches caught before their hidden states are moved to main memory


def train_stack(model, stack, windows, fakes_of, knobs, generator) -> dict[str, list[float]]:
    """Block-AP: train weights, steps and zeros of each layer of a chain, in order.

    Parameters
    ----------
    model : nn.Module
    stack : list of (str, nn.Module)
        Names and layers, as :func:`sfmp.walk.find_layers` gives them.
    windows : Tensor int64 [n, seqlen]
    fakes_of : callable (str) -> list of FakeQuantLinear
        Puts trainable layers in place of the linears of the layer of that name and returns them; called
        after the full-precision outputs of the layer have been computed.
    knobs : mapping
        ``epochs, batch_size, lr_weights, lr_quant, grad_clip``.
    generator : torch.Generator
        Orders the batches of every epoch.

    Returns
    -------
    dict of str to [float, float]
        Per layer trained: mean squared error of the first step's batch, and of all batches after training.

    Raises
    ------
    SfmpError
        If a loss is not finite.
    """
    device = next(model.parameters()).device
    teacher = _captured(model, [layer for _, layer in stack], windows.split(knobs["batch_size"]))
    student = [Batch(batch.hidden, batch.calls) for batch in teacher]
    losses = {}
    for index, (prefix, layer) in enumerate(stack):
        with in_float32(layer):
            _propagate(layer, teacher, index, device)
            fakes = fakes_of(prefix)
            if fakes:
                first = _train_layer(layer, fakes, index, teacher, student, knobs, generator, device)
                for fake in fakes:
                    fake.freeze()
            _propagate(layer, student, index, device)
        if fakes:
            errors = [float((s.hidden - t.hidden).square().sum()) for s, t in zip(student, teacher, strict=True)]
            losses[prefix] = [first, short(sum(errors) / sum(t.hidden.numel() for t in teacher))]
    return losses


def train_steps(model, fakes, windows, knobs, generator, layers=()) -> list[float]:
    """E2E-QP: train the steps of frozen layers on the language-model loss.

    Parameters
    ----------
    model : nn.Module
    fakes : list of FakeQuantLinear
        All frozen.
    windows : Tensor int64 [n, seqlen]
        Seen one at a time.
    knobs : mapping
        ``e2e_epochs, e2e_lr, accumulation, grad_clip``.
    generator : torch.Generator
    layers : sequence of nn.Module
        Computed again in the backward pass, to keep less in memory.

    Returns
    -------
    list of float
        Mean loss of the windows of each optimizer step.

    Raises
    ------
    SfmpError
        If a loss is not finite, or the model computes none.
    """
    scales = [fake.scales for fake in fakes]
    optimizer = torch.optim.Adam(scales, lr=knobs["e2e_lr"])
    accumulation = knobs["accumulation"]
    schedule = _cosine(optimizer, knobs["e2e_epochs"] * math.ceil(len(windows) / accumulation))
    losses = []
    with in_float32(model), _recomputing(layers):
        for _ in range(knobs["e2e_epochs"]):
            for chosen in torch.randperm(len(windows), generator=generator).split(accumulation):
                total = 0.0
                for window in windows[chosen]:
                    loss = causal_lm_loss(model, window) / len(chosen)
                    loss.backward()
                    total += float(loss.detach())
                _update(optimizer, schedule, total, scales, knobs["grad_clip"])
                losses.append(short(total))
    return losses


def short(value: float) -> float:
    """A number for the notes, to four digits."""
    return float(f"{value:.4g}")


def _train_layer(layer, fakes, index, teacher, student, knobs, generator, device):
    """Train one layer; returns the loss of the first step, None without steps."""
    parameters = [p for fake in fakes for p in (fake.weight, fake.scales, fake.zeros)]
    optimizer = torch.optim.Adam([
        {"params": [fake.weight for fake in fakes], "lr": knobs["lr_weights"]},
        {"params": [p for fake in fakes for p in (fake.scales, fake.zeros)], "lr": knobs["lr_quant"]},
    ])
    schedule = _cosine(optimizer, knobs["epochs"] * len(student))
    losses = []
    for _ in range(knobs["epochs"]):
        for position in torch.randperm(len(student), generator=generator).tolist():
            args, kwargs = _on(device, student[position]).arguments(index)
            output = first_tensor(layer(*args, **kwargs))
            loss = torch.nn.functional.mse_loss(output, teacher[position].hidden.to(device))
            loss.backward()
            losses.append(float(loss.detach()))
            _update(optimizer, schedule, losses[-1], parameters, knobs["grad_clip"])
    return short(losses[0]) if losses else None


def _update(optimizer, schedule, loss, parameters, grad_clip):
    """One optimizer step on the gradients at hand."""
    if not math.isfinite(loss):
        raise SfmpError(f"training loss: expected a finite number, found {loss}; lower the learning rates, or "
                        "check the checkpoint and the windows")
    torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)


def _cosine(optimizer, steps):
    """Cosine from each group's learning rate down to FINAL_RATE of it."""
    def factor(step):
        falling = 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1)))
        return FINAL_RATE + (1 - FINAL_RATE) * falling

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _captured(model, layers, groups):
    """Batches at the entrance of the first layer, hidden states in main memory."""
    batches = []
    for start in range(0, len(groups), CAPTURED):
        caught = capture(model, layers, list(groups[start: start + CAPTURED]))
        for batch in caught:
            batch.hidden = batch.hidden.cpu()
        batches += caught
    return batches


def _propagate(layer, batches, index, device):
    for batch in batches:
        batch.hidden = run_layer(layer, _on(device, batch), index).cpu()


def _on(device, batch):
    return Batch(batch.hidden.to(device), batch.calls)


@contextlib.contextmanager
def _recomputing(layers):
    """Run the given layers under activation checkpointing."""
    def recomputed(forward):
        return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)

    layers = list(dict.fromkeys(layers))
    own = [layer.__dict__.get("forward") for layer in layers]  # of this object, where a hook has put one
    for layer in layers:
        layer.forward = recomputed(layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
