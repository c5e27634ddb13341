"""Fused siblings in a parent that calls them in unusual ways: every layer returns what it would have alone."""

import copy
import io
import threading

import pytest
import torch
from cases import affine_case
from test_fuse import Counted
from torch import nn

from kernels_numba.cpu import targets
from sfmp import SfmpError, fuse
from sfmp.linear import SFMPLinear, keep_dequantized
from sfmp.pack import pack


class _Parent(nn.Module):
    """Calls its layers as it is told."""

    def __init__(self, layers, script):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = layers
        self.script = script

    def forward(self, x):
        return self.script(self, x)


def _parent(script, bias=False):
    cases = [affine_case(number, 32, 64, 32, 32, bias=bias) for number in range(3)]
    for case in cases:
        case["col_perm"] = cases[0]["col_perm"]
    layers = [SFMPLinear.from_packed(pack(**case)) for case in cases]
    for layer in layers:
        layer.backend = "reference"
    parent = _Parent(layers, script)
    assert len(fuse.fuse(parent).fused) == 1
    return parent


def _plain(parent, key, x):
    return SFMPLinear.forward(getattr(parent, key), x)


def _x(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _same(found, expected):
    """Equal but for the order of sums: 64 products of up to 4·25, so 64² · 100 · 2⁻⁵³ is a bound."""
    return found.shape == expected.shape and float((found - expected).abs().max()) < 1e-9


def test_other_activations_are_never_given_anothers_outputs():
    def script(parent, x):
        query = parent.q_proj(x)
        x.add_(1)  # the same tensor, other numbers
        key, other = parent.k_proj(x), x.clone()
        return query, key, parent.v_proj(other), parent.q_proj(x)

    parent, x = _parent(script), _x(2, 64)
    expected = [_plain(parent, "q_proj", x), *(_plain(parent, key, x + 1) for key in ("k_proj", "v_proj", "q_proj"))]
    for found, right in zip(parent(x), expected, strict=True):
        assert _same(found, right)


def test_settings_of_a_layer_are_its_own():
    parent = _parent(lambda parent, x: [layer(x) for layer in parent.children()])
    x = _x(3, 64)
    parent.k_proj.mode = "lut"  # float32 tables: other rounding
    for found, key in zip(parent(x), ("q_proj", "k_proj", "v_proj"), strict=True):
        assert _same(found, _plain(parent, key, x))
    assert parent.q_proj._joint._cache["product"].mode is None


def test_a_layer_called_on_its_own_computes_its_own(monkeypatch):
    parent = _parent(lambda parent, x: [layer(x) for layer in parent.children()])
    counted, x = Counted(monkeypatch), _x(3, 64)
    parent.k_proj(x)
    assert counted.rows == [32]
    parent(x)
    assert counted.rows == [32, 96]


def test_failures_leave_nothing_behind():
    def script(parent, x):
        parent.q_proj(x)
        raise RuntimeError("halfway")

    parent = _parent(script)
    with pytest.raises(RuntimeError, match="halfway"):
        parent(_x(3, 64))
    assert parent.q_proj._joint._local.shared is None
    with pytest.raises(SfmpError, match=r"floating \[..., 64\]"):
        parent(_x(3, 63))


def test_threads_do_not_meet():
    barrier = threading.Barrier(2)

    def script(parent, x):
        query = parent.q_proj(x)
        barrier.wait(60)  # both have computed before either takes
        return query, parent.k_proj(x), parent.v_proj(x)

    parent, found = _parent(script), {}
    inputs = [_x(2, 64, seed=seed) for seed in range(2)]
    threads = [threading.Thread(target=lambda number=number: found.update({number: parent(inputs[number])}))
               for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, x in enumerate(inputs):
        for part, key in zip(found[number], ("q_proj", "k_proj", "v_proj"), strict=True):
            assert _same(part, _plain(parent, key, x))


def test_gradients_reach_activations_and_biases(monkeypatch):
    parent = _parent(lambda parent, x: sum((layer(x) * weight).sum() for weight, layer in enumerate(
        parent.children(), 1)), bias=True)
    counted, x = Counted(monkeypatch), _x(2, 64).requires_grad_()
    parent(x).backward()
    expected = sum(weight * layer.dequantize().sum(0) for weight, layer in enumerate(parent.children(), 1))
    torch.testing.assert_close(x.grad.float(), expected.expand(2, -1))
    assert counted.rows == [96]
    for layer in parent.children():
        bias = layer.bias
        del layer.bias
        layer.bias = nn.Parameter(bias)
    parent(x).backward()
    assert [layer.bias.grad.unique().tolist() for layer in parent.children()] == [[2.0], [4.0], [6.0]]
    assert counted.rows == [96, 32, 32, 32]


def test_changed_tensors_are_merged_again():
    parent, x = _parent(lambda parent, x: [layer(x) for layer in parent.children()], bias=True), _x(1, 64)
    before = parent(x)
    first = parent.q_proj._joint._cache["product"]
    parent.k_proj.bias.add_(1)
    parent.v_proj.alpha = parent.v_proj.alpha * 2
    after = parent(x)
    assert _same(after[0], before[0]) and parent.q_proj._joint._cache["product"] is not first
    assert _same(after[1], _plain(parent, "k_proj", x)) and not _same(after[1], before[1])
    assert _same(after[2], _plain(parent, "v_proj", x)) and not _same(after[2], before[2])
    state = {key: tensor.flip(0) if key.endswith("planes") else tensor for key, tensor in parent.state_dict().items()}
    parent.load_state_dict({key: tensor.clone() for key, tensor in state.items()})
    assert _same(parent(x)[0], _plain(parent, "q_proj", x)) and not _same(parent(x)[0], after[0])
    parent.half()
    half = x.half()
    torch.testing.assert_close(parent(half)[1], _plain(parent, "k_proj", half))
    assert parent(half)[1].dtype == torch.float16


def test_copies_and_pickles_are_fused_among_themselves(monkeypatch):
    parent, x = _parent(_all), _x(1, 64)
    expected = parent(x)
    file = io.BytesIO()
    torch.save(parent, file)
    file.seek(0)
    for other in (copy.deepcopy(parent), torch.load(file, weights_only=False)):
        assert other.q_proj._joint is other.v_proj._joint is not parent.q_proj._joint
        counted = Counted(monkeypatch)
        assert all(map(_same, other(x), expected)) and counted.rows == [96]
        monkeypatch.undo()


def _all(parent, x):
    return [layer(x) for layer in parent.children()]


def test_kept_weights_are_used(monkeypatch):
    parent, x = _parent(_all), _x(1, 64)
    with keep_dequantized(parent):
        parent(x)
        assert "weight" in parent.k_proj._cache
    assert all(map(_same, parent(x), [_plain(parent, key, x) for key in ("q_proj", "k_proj", "v_proj")]))


def test_inference_mode_leaves_nothing_that_gradients_cannot_use(monkeypatch):
    parent, x = _parent(_all), _x(2, 64)
    counted = Counted(monkeypatch)
    with torch.inference_mode():
        found = parent(x.clone())
    assert all(map(_same, found, parent(x))) and counted.rows == [96, 96]
    leaf = x.clone().requires_grad_()
    sum(part.sum() for part in parent(leaf)).backward()
    expected = sum(layer.dequantize().double().sum(0) for layer in parent.children())
    torch.testing.assert_close(leaf.grad, expected.expand(2, -1), rtol=1e-6, atol=1e-6)


def test_outputs_are_as_contiguous_as_those_of_a_linear_layer():
    parent = _parent(_all)
    for shape in ((1, 64), (1, 1, 64), (2, 3, 64), (64,), (0, 64)):
        assert all(part.is_contiguous() and part.shape == (*shape[:-1], 32) for part in parent(_x(*shape)))


@pytest.mark.cpu
@pytest.mark.skipif(targets.detect()[0] is None, reason=targets.detect()[1])
def test_compilers_give_no_layer_what_is_anothers():
    parent = _parent(lambda parent, x: (parent.q_proj(x), parent.k_proj(x * 2), parent.v_proj(x), parent.q_proj(x)))
    x = _x(2, 64).float()
    for layer in parent.children():
        layer.backend = "cpu"
        with torch.no_grad():
            _plain(parent, "k_proj", layer(x)[:, :1].repeat(1, 64))  # a first product each
    torch._dynamo.reset()
    with torch.no_grad():
        expected = parent(x)
        found = torch.compile(parent, backend="eager")(x)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(found[1], _plain(parent, "k_proj", x * 2)) and torch.equal(found[3], found[0])
    torch._dynamo.reset()
