"""EfficientQAT: train weights, steps and zeros block by block, then the steps end to end.

A block is one decoder layer.  Block-AP: layer after layer, all parameters of its quantized linears are trained
so that the layer, fed by the quantized layers before it, gives the output the full-precision layer gives on
full-precision input.  E2E-QP: codes and zeros are fixed, the steps alone are trained on the language-model
loss.  Works on any plan: one bit-width, or the mixed blocks of SFMP.

Source: METHOD.md sections 1.8 and 2.8; EfficientQAT (arXiv 2407.11062).
"""

from __future__ import annotations

import dataclasses
import math

import torch

from sfmp.allocate import make_plan
from sfmp.baselines.fake_quant import FakeQuantLinear
from sfmp.baselines.outcome import Outcome, stored_bytes
from sfmp.baselines.qat_training import train_stack, train_steps
from sfmp.baselines.uniform import uniform_plan
from sfmp.checks import SfmpError, integer, token_ids
from sfmp.cost import CostRecord
from sfmp.linear import SFMPLinear
from sfmp.pack import pack
from sfmp.salience import SALIENCE_SOURCES, gradients_only_for
from sfmp.spec import Plan, QuantSpec
from sfmp.walk import find_layers, is_chain

FULL_WINDOWS, FULL_EPOCHS, FULL_TOKENS = 4096, 2, 2048  # of the published block-wise training, METHOD.md 1.8
FULL_E2E_WINDOWS, FULL_E2E_EPOCHS, FULL_E2E_TOKENS = 4096, 1, 4096
FULL_SALIENCE_WINDOWS, FULL_SALIENCE_TOKENS = 100, 512  # METHOD.md 1.2
PUBLISHED_RATES = (2e-5, 1e-5)  # of weights: at 2 bits, above; METHOD.md 1.8
FEW_BITS = 2.5  # mean code bits below which a plan is nearer 2 bits
PROBE_TOKENS = 64  # on which a stack is proved to be a chain


def quantize(model, windows, bpw, *, seed=0, group_size=128, plan=None, mixed=False, block_rows=512,
             levels=(2, 3, 4), salience="fisher", n_windows=4096, epochs=2, batch_size=2, lr_weights=None,
             lr_quant=1e-4, grad_clip=0.3, e2e_windows=4096, e2e_epochs=1, e2e_lr=2e-5, accumulation=32,
             checkpointing=False):
    """Quantize `model` in place by EfficientQAT.

    Parameters
    ----------
    model, windows, bpw, seed
        As in :func:`sfmp.baselines.quantize`; the seed orders the batches.
    group_size : int
        Input columns that share a step.
    plan : Plan, optional
        Bits and permutations to train for, of at most `bpw`.  By default one bit-width for every weight:
        the largest whole number of code bits within `bpw`.
    mixed : bool
        Make SFMP's plan from `salience`, `block_rows` and `levels` (METHOD.md section 4, E3).
    salience : str or mapping of str to Tensor [N, K]
        A name of `SALIENCE_SOURCES`, computed from `windows`; or salience that is at hand.
    n_windows, epochs, batch_size : int
        Of the block-wise training; windows are taken evenly spaced, all of them if there are fewer.
    lr_weights, lr_quant, e2e_lr : float or pair of float
        Learning rates of weights; of steps and zeros; of the steps end to end.  A pair is for plans nearer
        2 bits than 3, and for all others; ``lr_weights=None`` is the published pair.
    grad_clip : float
        Largest norm of a gradient, in both stages.
    e2e_windows, e2e_epochs, accumulation : int
        Of the end-to-end training, which sees one window at a time and steps after `accumulation` of them.
    checkpointing : bool
        End to end, compute each layer again in the backward pass: the same numbers, less memory, more time.

    Returns
    -------
    Outcome
        Stages ``block-wise training`` and ``end-to-end training``, after ``salience`` and ``allocation`` if
        mixed.  ``notes`` has the knobs, and per trained layer the loss of its first step and after training.

    Raises
    ------
    SfmpError
        If the budget cannot be met, a knob is out of range, the plan is for another model, or a loss is not
        finite.

    Notes
    -----
    Everything is trained in float32 by Adam without weight decay, with straight-through rounding to the stored
    grid, so the packed model computes what the trained one did.  Linears outside a chain of layers are rounded
    to nearest, and their steps are trained end to end.  One layer is in training at a time; hidden states
    of all windows wait in main memory (twice: full-precision and quantized).
    Source: METHOD.md sections 1.8 and 2.8.
    """
    knobs = _checked_amounts(dict(
        n_windows=n_windows, epochs=epochs, batch_size=batch_size, e2e_windows=e2e_windows,
        e2e_epochs=e2e_epochs, accumulation=accumulation))
    rates = dict(lr_weights=PUBLISHED_RATES if lr_weights is None else lr_weights, lr_quant=lr_quant, e2e_lr=e2e_lr,
                 grad_clip=grad_clip)
    rates = {name: _positive_pair(name, rate) for name, rate in rates.items()}
    windows = token_ids("windows", windows, model)
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise SfmpError(f"windows: expected [n, seqlen] with n >= 1 and seqlen >= 2, found {list(windows.shape)}")
    knobs |= {name: min(knobs[name], len(windows)) for name in ("n_windows", "e2e_windows")}  # what is used
    cost = CostRecord()
    if mixed:
        if plan is not None:
            raise SfmpError("plan, mixed: expected one of them, found both; mixed=True makes its own plan")
        spec = QuantSpec(bpw=bpw, group_size=group_size, block_rows=block_rows, levels=levels, method="rtn", seed=seed)
        knobs.update(mixed=True, block_rows=block_rows, levels=list(spec.candidate_levels),
                     salience=salience if isinstance(salience, str) else "given")
        plan = _mixed_plan(model, windows, spec, salience, cost)
    plan = _whole_bits_plan(model, bpw, group_size, seed) if plan is None else _rounding_plan(plan, bpw)
    knobs.update({name: low if plan.wbits < FEW_BITS else high for name, (low, high) in rates.items()})
    knobs.update(group_size=plan.spec.group_size, checkpointing=bool(checkpointing))
    linears = _planned(model, plan)
    notes = {"knobs": knobs, **_train(model, plan, linears, windows, knobs, seed, cost)}
    _pack(model, plan, linears)
    return Outcome(model, plan.bpw, sum(stored_bytes(model).values()), cost, plan, notes)


def _train(model, plan, linears, windows, knobs, seed, cost):
    """Both stages; leaves frozen layers in place of the linears and returns what they did."""
    seqlen = windows.shape[1]
    generator = torch.Generator().manual_seed(seed)
    notes = {"block_loss": {}}
    with gradients_only_for(model, ()), torch.enable_grad():
        stacks = [stack for stack in find_layers(model, linears)
                  if is_chain(model, [layer for _, layer in stack], windows[:1, :PROBE_TOKENS])]
        with cost.stage("block-wise training", unit="window pass") as stage:
            chosen = _spaced(windows, knobs["n_windows"])
            for stack in stacks:
                notes["block_loss"] |= train_stack(
                    model, stack, chosen, lambda prefix: _fakes_under(model, plan, linears, prefix), knobs, generator)
            fakes = [_fake(model, plan, linears, name) for name in linears]
            for fake in fakes:  # those outside the stacks are rounded to nearest
                fake.freeze()
            epochs = knobs["epochs"]
            stage.units, stage.full_units = epochs * len(chosen), FULL_EPOCHS * FULL_WINDOWS
            stage.unit_scale = FULL_TOKENS / seqlen
            stage.evaluations = (epochs + 2) * len(chosen)  # the full-precision and the quantized outputs too
            notes["windows"] = len(chosen)
        with cost.stage("end-to-end training", unit="window pass") as stage:
            chosen = _spaced(windows, knobs["e2e_windows"])
            recomputed = [layer for stack in stacks for _, layer in stack] if knobs["checkpointing"] else ()
            losses = train_steps(model, fakes, chosen, knobs, generator, recomputed)
            stage.units = stage.evaluations = knobs["e2e_epochs"] * len(chosen)
            stage.full_units, stage.unit_scale = FULL_E2E_EPOCHS * FULL_E2E_WINDOWS, FULL_E2E_TOKENS / seqlen
            notes["e2e_windows"], notes["e2e_loss"] = len(chosen), losses
    return notes


def _fakes_under(model, plan, linears, prefix):
    """Trainable layers below a layer; none for a layer met before (a layer may be run twice)."""
    names = [n for n in linears if n.startswith(prefix + ".") and model.get_submodule(n) is linears[n]]
    return [_fake(model, plan, linears, name) for name in names]


def _fake(model, plan, linears, name):
    """The trainable layer of that name, put in place of its linear if it is not there yet."""
    found = model.get_submodule(name)
    if isinstance(found, FakeQuantLinear):
        return found
    try:
        fake = FakeQuantLinear(linears[name], plan[name], group_size=plan.spec.group_size,
                               block_rows=plan.spec.block_rows)
    except SfmpError as error:
        raise SfmpError(f"{name}: {error}") from error
    model.set_submodule(name, fake.eval())
    return fake


def _pack(model, plan, linears):
    """Replace every trained layer by its packed form."""
    from sfmp.hf import attach

    for name in linears:
        q, matrix = model.get_submodule(name).quantized(), plan[name]
        packed = pack(q.codes, q.scales, q.zeros, q.bits, group_size=q.group_size,
                      block_rows=min(q.block_rows, len(q.codes)), row_perm=matrix.row_perm,
                      col_perm=matrix.col_perm, bias=linears[name].bias)
        model.set_submodule(name, SFMPLinear.from_packed(packed).to(q.codes.device).eval())
    attach(model, plan)


def _mixed_plan(model, windows, spec, salience, cost):
    if isinstance(salience, str):
        if salience not in SALIENCE_SOURCES:
            raise SfmpError(f"salience: expected one of {', '.join(SALIENCE_SOURCES)}, found {salience!r}")
        with cost.stage("salience", unit="window") as stage:
            salience = SALIENCE_SOURCES[salience](model, windows, spec.seed)
            stage.units = stage.evaluations = len(windows)
            stage.full_units, stage.unit_scale = FULL_SALIENCE_WINDOWS, FULL_SALIENCE_TOKENS / windows.shape[1]
    with cost.stage("allocation"):
        return make_plan(salience, spec, model)


def _whole_bits_plan(model, bpw, group_size, seed):
    """One bit-width: the largest within the budget."""
    overhead = 32 / integer("group_size", group_size, 1)
    bits = min(8, math.floor(bpw - overhead + 1e-6))
    if bits < 1:
        raise SfmpError(f"bpw: one bit-width at group_size {group_size} needs {1 + overhead:g}..{8 + overhead:g}, "
                        f"found {bpw:g}; raise bpw or group_size")
    return uniform_plan(model, bits + overhead, group_size, "rtn", seed=seed)


def _rounding_plan(plan, bpw):
    """The given plan, its spec saying that codes are nearest codes."""
    if not isinstance(plan, Plan):
        raise SfmpError(f"plan: expected a Plan, found {type(plan).__name__}; see make_plan")
    if plan.bpw > bpw + 1e-6:
        raise SfmpError(f"plan: expected at most {bpw:g} bits per weight, found {plan.bpw:g}; pass bpw={plan.bpw:g}")
    return Plan(dataclasses.replace(plan.spec, method="rtn"), plan)


def _planned(model, plan):
    """The nn.Linear modules of the plan by name, in module order."""
    modules = dict(model.named_modules())
    for name, matrix in plan.items():
        found = modules.get(name)
        if not isinstance(found, torch.nn.Linear) or tuple(found.weight.shape) != matrix.shape:
            shape = list(getattr(getattr(found, "weight", None), "shape", []))
            raise SfmpError(f"{name}: the plan expects an nn.Linear {list(matrix.shape)}, found "
                            f"{type(found).__name__} {shape}; is the plan for this model?")
    return {name: module for name, module in modules.items() if name in plan}


def _spaced(windows, count):
    count = min(count, len(windows))
    return windows[torch.arange(count) * len(windows) // count]


def _checked_amounts(knobs):
    for name, value in knobs.items():
        integer(name, value, 0 if name in ("epochs", "e2e_epochs") else 1)
    return knobs


def _positive_pair(name, value):
    """A number for few bits and one for more, from one number or two."""
    pair = value if isinstance(value, tuple | list) and len(value) == 2 else (value, value)
    for number in pair:
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
            raise SfmpError(f"{name}: expected a positive number or a pair of them, found {value!r}")
    return tuple(float(number) for number in pair)
