"""The paper summary's first experiment: Eq. 7 on a small multilayer perceptron, Fisher against random
salience.

The task is computed, not downloaded: a fixed random teacher network labels Gaussian inputs whose
coordinates differ in scale, as hidden features of trained networks do. A student is trained on it, then
quantized by rounding with two bit-widths, floor and ceiling of the budget. Only the salience differs
between the arms, so the difference in test loss is what knowing the salience is worth.
"""

from __future__ import annotations

import copy

import pandas as pd
import torch
from torch import nn

from sfmp.allocate import make_plan
from sfmp.apply import quantize_model
from sfmp.salience import SALIENCE_SOURCES
from sfmp.spec import QuantSpec

INPUTS, HIDDEN, CLASSES = 64, 128, 10
SHAPE = {"group_size": 32, "block_rows": 16}
WBITS = (2.25, 2.5, 2.75, 3.25, 3.5)
ARMS = ("fisher", "magnitude", "random")


def make_task(seed: int = 0, samples: int = 30_000):
    """Sample inputs and teacher labels.

    Returns
    -------
    (Tensor float32 [samples, 64], Tensor int64 [samples])
        The last third is the test set.
    """
    generator = torch.Generator().manual_seed(seed)
    scales = torch.exp(torch.randn(INPUTS, generator=generator))
    inputs = torch.randn(samples, INPUTS, generator=generator) * scales
    first = torch.randn(INPUTS, 48, generator=generator) / INPUTS**0.5 / scales[:, None].sqrt()
    last = torch.randn(48, CLASSES, generator=generator)
    return inputs, (torch.relu(inputs @ first) @ last).argmax(1)


def train_student(inputs, labels, seed: int = 0, steps: int = 1000):
    """Train the 64-128-128-10 student with Adam; float32, in evaluation mode when returned."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [
            nn.Linear(INPUTS, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, CLASSES),
        ]
        model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(len(inputs), (256,), generator=generator)
        loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return model.eval()


def run_mlp_experiment(seed: int = 0, repeats: int = 3, samples: int = 200, wbits=WBITS) -> pd.DataFrame:
    """Compare salience sources on the small network at several budgets.

    Parameters
    ----------
    seed : int
        Seeds the task; students and random saliences use `seed`, `seed` + 1, …
    repeats : int
        Students trained, each with its own random salience.
    samples : int
        Training samples whose squared gradients make the Fisher salience.
    wbits : sequence of float
        Mean code bits; bpw adds one bit (32 bits of scale and offset for every 32 weights).

    Returns
    -------
    pandas.DataFrame
        `seed, salience, wbits, bpw, loss` (test cross-entropy, nats), `accuracy` (test, 0 to 1), `fp_loss,
        fp_accuracy`.

    Source: Eq. 7 of the paper (v1), METHOD §1.3; experiment A1 of METHOD §4.
    """
    inputs, labels = make_task(seed)
    cut = 2 * len(inputs) // 3
    rows = []
    for repeat in range(seed, seed + repeats):
        model = train_student(inputs[:cut], labels[:cut], repeat)
        fp = _score(model, inputs[cut:], labels[cut:])
        arms = _saliences(model, inputs[:samples], labels[:samples], repeat)
        for arm in ARMS:
            for bits in wbits:
                spec = QuantSpec(
                    bpw=bits + 32 / SHAPE["group_size"], levels="auto", method="rtn", skip=(), **SHAPE
                )
                quantized = quantize_model(copy.deepcopy(model), make_plan(arms[arm], spec))
                loss, accuracy = _score(quantized, inputs[cut:], labels[cut:])
                rows.append((repeat, arm, bits, spec.bpw, loss, accuracy, *fp))
    columns = ["seed", "salience", "wbits", "bpw", "loss", "accuracy", "fp_loss", "fp_accuracy"]
    return pd.DataFrame(rows, columns=columns).assign(model="mlp", method="sfmp-rtn")


def _saliences(model, inputs, labels, seed):
    def loss_of(network, index):
        return nn.functional.cross_entropy(network(inputs[index][None]), labels[index][None])

    options = {"seed": seed, "skip": ()}
    return {
        "fisher": SALIENCE_SOURCES["fisher"](model, range(len(inputs)), loss_fn=loss_of, **options),
        "magnitude": SALIENCE_SOURCES["magnitude"](model, **options),
        "random": SALIENCE_SOURCES["random"](model, **options),
    }


@torch.no_grad()
def _score(model, inputs, labels):
    logits = model(inputs)
    return float(nn.functional.cross_entropy(logits, labels)), float(
        (logits.argmax(1) == labels).double().mean()
    )
