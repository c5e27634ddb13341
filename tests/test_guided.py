"""Guided salience and Hessians equal what a two-layer network gives by hand, and leave the model as found."""

import numpy as np
import pytest
import torch
from torch import nn

from sfmp.baselines.guided import block_losses, guided_hessians, guided_salience
from sfmp.checks import SfmpError
from sfmp.grid import BlockGrid


class Network(nn.Module):
    """Two linear layers and a ReLU, cross-entropy on three classes; 7 hidden rows do not divide by 4."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 4)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)

    def forward(self, x):
        return self.second(torch.relu_(self.first(x)))


def loss_fn(model, sample):
    return nn.functional.cross_entropy(model(sample[0]), sample[1])


def samples(count=3, tokens=6):
    rng = np.random.default_rng(0)
    return [(torch.tensor(rng.normal(size=(tokens, 5)), dtype=torch.float32),
             torch.tensor(rng.integers(0, 4, tokens))) for _ in range(count)]


def naive_hessians(model, windows, groups):
    """H_g of both layers from hand-made gradients, token by token, in float64."""
    weights = [layer.weight.detach().numpy().astype(np.float64) for layer in (model.first, model.second)]
    biases = [layer.bias.detach().numpy().astype(np.float64) for layer in (model.first, model.second)]
    parts = [np.array_split(np.arange(len(w)), min(groups, len(w))) for w in weights]
    sums = [np.zeros((len(p), w.shape[1], w.shape[1])) for p, w in zip(parts, weights, strict=True)]
    for inputs, labels in windows:
        for x, label in zip(inputs.numpy().astype(np.float64), labels.numpy(), strict=True):
            before = weights[0] @ x + biases[0]
            hidden = np.maximum(before, 0)
            logits = weights[1] @ hidden + biases[1]
            probability = np.exp(logits - logits.max())
            probability /= probability.sum()
            at_logits = (probability - (np.arange(len(logits)) == label)) / len(labels)  # mean over tokens
            at_hidden = (weights[1].T @ at_logits) * (before > 0)
            for layer, (gradient, given) in enumerate(((at_hidden, x), (at_logits, hidden))):
                for group, rows in enumerate(parts[layer]):
                    sums[layer][group] += np.mean((1e3 * gradient[rows]) ** 2) * np.outer(given, given)
    return dict(zip(("first", "second"), sums, strict=True)), dict(zip(("first", "second"), parts, strict=True))


@pytest.mark.parametrize("groups", [1, 3, 4, 6])
def test_hessians_and_salience_equal_the_hand_made_ones(groups):
    model, windows = Network(), samples()
    expected, parts = naive_hessians(model, windows, groups)
    hessians = guided_hessians(model, windows, groups=groups, loss_fn=loss_fn)
    salience = guided_salience(model, windows, groups=groups, loss_fn=loss_fn)
    for name in ("first", "second"):
        scale = np.abs(expected[name]).max()
        assert hessians[name].numpy() == pytest.approx(expected[name], rel=1e-3, abs=1e-5 * scale)
        assert salience[name].dtype == torch.float32
        for group, rows in enumerate(parts[name]):
            wanted = np.broadcast_to(np.diag(expected[name][group]), (len(rows), len(expected[name][group])))
            assert salience[name][rows].numpy() == pytest.approx(wanted, rel=1e-3, abs=1e-5 * scale)


def test_block_losses_are_the_quadratic_forms_of_the_errors():
    rng = np.random.default_rng(2)
    rows, cols, groups, grid = 10, 80, 3, BlockGrid(10, 80, 4, 32)
    weight = rng.normal(size=(rows, cols)).astype(np.float32)
    factors = rng.normal(size=(groups, cols, cols)).astype(np.float32)
    hessians = np.einsum("gik,gjk->gij", factors, factors)
    row_perm, col_perm = rng.permutation(rows), rng.permutation(cols)
    group_of_row = [0] * 4 + [1] * 3 + [2] * 3
    found = block_losses(torch.tensor(weight), torch.tensor(hessians), row_perm, col_perm, grid, (2, 3))
    assert found.shape == (9, 2) and found.dtype == np.float64
    for at, bits in enumerate((2, 3)):
        for block in range(9):
            total = 0.0
            for i in row_perm[block // 3 * 4: block // 3 * 4 + 4]:
                inside = col_perm[block % 3 * 32: block % 3 * 32 + 32]
                group = weight[i, inside].astype(np.float64)
                step = (group.max() - group.min()) / (2**bits - 1)
                zero = np.round(-group.min() / step)
                codes = np.clip(np.round(group / step) + zero, 0, 2**bits - 1)
                error = group - (codes - zero) * step
                total += error @ hessians[group_of_row[i]][np.ix_(inside, inside)] @ error
            assert found[block, at] == pytest.approx(total, rel=0.02)  # the package rounds steps to fp16


def test_a_diagonal_hessian_leaves_a_weighted_square():
    """Without cross terms the block losses are sum S (w - w_q)^2, the measured objective of the allocation."""
    from sfmp.allocate import block_problem
    from sfmp.spec import QuantSpec

    rng = np.random.default_rng(3)
    model = nn.Module()
    model.layer = nn.Linear(64, 12)
    model.layer.weight.data = torch.tensor(rng.normal(size=(12, 64)), dtype=torch.float32)
    diagonal = rng.uniform(0.5, 2, (1, 64)).astype(np.float32)
    problem = block_problem({"layer": np.repeat(diagonal, 12, axis=0)},
                            QuantSpec(bpw=4.0, group_size=32, block_rows=5, objective="measured"), model)
    found = block_losses(model.layer.weight, torch.diag(torch.tensor(diagonal[0]))[None],
                         *problem.permuted["layer"], problem.grids["layer"], (2, 3, 4))
    assert found == pytest.approx(problem.losses["layer"], rel=1e-5)


def test_language_model_is_left_as_found_and_results_repeat(tiny_llama):
    windows = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    tiny_llama.train()
    flags = {name: p.requires_grad for name, p in tiny_llama.named_parameters()}
    before = {name: p.clone() for name, p in tiny_llama.named_parameters()}
    first, second = guided_salience(tiny_llama, windows), guided_salience(tiny_llama, windows)
    assert set(first) == {name for name, module in tiny_llama.named_modules()
                          if isinstance(module, nn.Linear) and name != "lm_head"}
    for name, value in first.items():
        assert value.shape == tiny_llama.get_submodule(name).weight.shape and torch.equal(value, second[name])
        assert (value > 0).all()
    assert tiny_llama.training and tiny_llama.config.use_cache
    for name, parameter in tiny_llama.named_parameters():
        assert parameter.grad is None and parameter.requires_grad == flags[name]
        assert torch.equal(parameter, before[name])
    assert not any(m._forward_hooks for m in tiny_llama.modules())


def test_hessians_of_named_matrices_only(tiny_llama):
    windows = torch.randint(0, 128, (1, 16), generator=torch.Generator().manual_seed(0))
    name = "model.layers.1.mlp.down_proj"
    found = guided_hessians(tiny_llama, windows, names=[name])
    assert list(found) == [name] and found[name].shape == (4, 172, 172)
    diagonal = torch.diagonal(found[name], dim1=1, dim2=2)
    expected = guided_salience(tiny_llama, windows)[name][::16]
    assert torch.allclose(diagonal, expected, rtol=1e-4)


def test_unreached_layers_are_warned_about():
    model = Network()
    model.unused = nn.Linear(5, 4)
    with pytest.warns(UserWarning, match="no gradient reached unused"):
        assert (guided_salience(model, samples(1), loss_fn=loss_fn)["unused"] == 0).all()


@pytest.mark.parametrize(("options", "message"), [
    ({"groups": 0}, "groups: expected an integer >= 1"),
    ({"loss_fn": lambda model, sample: loss_fn(model, sample) * float("nan")}, "loss of window 0"),
])
def test_bad_input_is_refused(options, message):
    with pytest.raises(SfmpError, match=message):
        guided_salience(Network(), samples(1), **{"loss_fn": loss_fn, **options})
    with pytest.raises(SfmpError, match="at least one sample"):
        guided_salience(Network(), [], loss_fn=loss_fn)
    with pytest.raises(SfmpError, match="names: expected linear layers"):
        guided_hessians(Network(), samples(1), names=["third"], loss_fn=loss_fn)


def test_block_losses_refuse_other_shapes():
    grid, order = BlockGrid(4, 32, 4, 32), (np.arange(4), np.arange(32))
    with pytest.raises(SfmpError, match="weight: expected 4 x 32"):
        block_losses(torch.zeros(4, 64), torch.zeros(1, 32, 32), *order, grid, (2,))
    with pytest.raises(SfmpError, match="hessians: expected"):
        block_losses(torch.zeros(4, 32), torch.zeros(32, 32), *order, grid, (2,))
