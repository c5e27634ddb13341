"""What a user may do to a layer, a matrix, activations or bias besides multiplying: never numbers of something else."""

import copy
import dataclasses
import io

import numpy as np
import pytest
import torch
from cases import packed_case
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kernels_numba
from kernels_numba.cpu import layout, product, targets
from sfmp.linear import SFMPLinear, keep_dequantized
from sfmp.spec import SfmpError

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(targets.detect()[0] is None, reason=targets.detect()[1])]


def _layer(seed=0, **options):
    layer = SFMPLinear(packed_case(seed, bias=True, **options))
    layer.backend = "cpu"
    return layer


@pytest.fixture
def layer():
    """A layer that has multiplied one token twice: everything that can be kept is kept."""
    layer = _layer()
    for _ in range(2):
        layer(_x(1, 100))
    return layer


def _x(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _multiply(x, packed):
    return kernels_numba.matmul(x, packed, backend="cpu")


def _expected(packed, x):
    return x @ copy.copy(packed).dequantize().T + packed.bias.float()


def _close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)


def _saved(packed):
    stream = io.BytesIO()
    torch.save(packed, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, _saved])
def test_copies_of_a_used_matrix_keep_no_addresses(copied):
    packed, x = packed_case(0, bias=True), _x(1, 100)
    expected = _multiply(x, packed)
    image = packed.cache["cpu"].image  # stays, so that its address is not used again
    other, weight = copied(packed), copied(product.weight(packed))
    assert not other.cache and "cpu" in packed.cache
    del packed
    assert torch.equal(_multiply(x, other), expected)
    assert other.cache["cpu"].image.data_ptr() != image.data_ptr()
    assert not weight._ready and weight._address == weight.image.data_ptr()
    assert torch.equal(weight.multiply(x, other.bias, product.choose_mode(None)), expected)


@pytest.mark.parametrize("name", ["planes", "alpha", "beta", "block_bits", "row_perm", "col_perm"])
@pytest.mark.parametrize("way", ["in place", "assigned"])
def test_a_stored_tensor_that_changes_is_repacked(layer, name, way):
    x = _x(1, 100)
    before, changed = layer(x), getattr(layer, name).clone()
    if name == "block_bits":
        changed = changed.flip(0)  # as many bits in all
    elif changed.dtype == torch.float16:
        changed *= 2
    elif name == "planes":
        changed = ~changed
    else:
        changed = changed.int().flip(0).to(changed.dtype)
    if way == "in place":
        getattr(layer, name).copy_(changed)
    else:
        setattr(layer, name, changed)
    found = layer(x)
    _close(found, _expected(layer.packed, x))
    assert not torch.equal(found, before) and torch.equal(layer(x), found)


def test_a_matrix_changed_in_place_serves_nothing_old():
    packed, x = packed_case(0, bias=True), _x(1, 100)
    _multiply(x, packed)
    packed.alpha.mul_(2)
    _close(_multiply(x, packed), _expected(packed, x))
    other = dataclasses.replace(packed, alpha=packed.alpha * 2)
    assert other.cache is not packed.cache
    _close(_multiply(x, other), _expected(other, x))
    kept = packed.cache["cpu"]
    _multiply(x, packed)
    assert packed.cache["cpu"] is kept
    with torch.inference_mode():
        frozen = dataclasses.replace(packed, alpha=packed.alpha.clone())
        layer = SFMPLinear(frozen)
        first = layer(x)
        assert torch.equal(layer(x), first), "inference tensors count no changes"


def test_functional_call_uses_the_tensors_it_is_given(layer):
    x, other = _x(1, 100), _layer(seed=4, levels=(3,))
    plain = _layer(seed=9, levels=(3,))
    before = plain(x), plain(x)
    tensors = {key: value for key, value in other.named_buffers() if key != "bias"}
    _close(torch.func.functional_call(plain, tensors, x), _expected(other.packed, x) - other.bias + plain.bias)
    assert torch.equal(plain(x), before[1])


@pytest.mark.parametrize("assign", [False, True])
def test_layers_that_share_tensors_and_one_loads_a_state(assign):
    packed, x = packed_case(0, bias=True, levels=(3,)), _x(1, 100)
    one, two = SFMPLinear(packed), SFMPLinear(packed)
    one.backend = two.backend = "cpu"
    for layer in (one, two, one, two):
        layer(x)
    one.load_state_dict(packed_case(8, bias=True, levels=(3,)).tensors(), assign=assign)
    for layer in (one, two, one):
        _close(layer(x), _expected(layer.packed, x))
    assert torch.equal(one(x), two(x)) != assign
    image = one._cache["cpu"]
    one(x), two(x), one(x)
    assert one._cache["cpu"] is image, "neither takes the other's place"


def test_kept_weights_follow_their_tensors():
    layer, x = SFMPLinear(packed_case(0, bias=True)), _x(2, 100)
    with keep_dequantized(layer):
        layer(x)
        layer.alpha.mul_(2)
        assert torch.equal(layer(x), _expected(layer.packed, x)) and layer._cache["keep"]
    assert not {"keep", "weight"} & set(layer._cache)


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_watches_the_dispatcher_sees_the_product(layer):
    x, other = _x(1, 100), _x(1, 100, seed=1)
    with _Calls() as calls, torch.no_grad():
        layer(x)
    assert "sfmp.cpu_linear.default" in calls.seen
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    assert counter.get_total_flops() == 2 * 40 * 100
    for traced in (make_fx(layer)(x), torch.jit.trace(layer, (x,), check_trace=False)):
        assert torch.equal(traced(other), layer(other))


def test_negative_bit(layer):
    x = _x(1, 100)
    assert torch.equal(layer(torch._neg_view(x)), layer(-x))
    with_bias = layer(x)
    layer.bias = torch._neg_view(layer.bias)
    _close(layer(x), with_bias + 2 * layer.bias)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_torch_func(layer):
    x, way = _x(3, 1, 100), _x(3, 1, 100, seed=1)
    together = layer(x)
    assert torch.equal(torch.vmap(layer)(x), together)
    assert torch.equal(torch.vmap(layer, in_dims=2, out_dims=1)(x.movedim(0, 2)), together.movedim(0, 1))
    weight = layer.dequantize()
    value, change = torch.func.jvp(layer, (x[0],), (way[0],))
    _close(value, together[0])
    _close(change, way[0] @ weight.T)
    _close(torch.func.grad(lambda x: layer(x).sum())(x[0]), weight.sum(0)[None])
    _close(torch.func.vmap(torch.func.grad(lambda x: layer(x).sum()))(x), weight.sum(0).expand(3, 1, -1))


def test_forward_mode_derivatives(layer):
    x, way = _x(1, 100), _x(1, 100, seed=1)
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, way)))
        _close(y.tangent, way @ layer.dequantize().T)
        assert torch.equal(layer(x), y.primal)


BIASES = {
    "strided": lambda bias: bias.repeat_interleave(2)[::2],
    "expanded": lambda bias: bias[:1].expand(40),
    "parameter": lambda bias: nn.Parameter(bias, requires_grad=False),
    "double": lambda bias: bias.double(),
    "none": lambda bias: torch.zeros_like(bias),
}


@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize("tokens", [1, 2, 200])
def test_any_bias_of_the_right_size(layer, kind, tokens):
    x, changed = _x(tokens, 100), BIASES[kind](layer.bias)
    if isinstance(changed, nn.Parameter):
        del layer.bias
    layer.bias = changed
    for _ in range(2):
        _close(layer(x), _expected(layer.packed, x))
    layer.to(torch.bfloat16)
    _close(layer(x), _expected(layer.packed, x))


@pytest.mark.parametrize(("bias", "message"), [
    (torch.zeros(39), r"bias: expected a dense \[40\]"), (torch.zeros(1), r"bias: expected a dense \[40\]"),
    (torch.zeros(40, device="meta"), "bias: expected device cpu")])
@pytest.mark.parametrize("tokens", [1, 2, 200])
def test_a_bias_that_cannot_be_added(layer, bias, message, tokens):
    layer.bias = bias
    for call in (layer, lambda x: _multiply(x, layer.packed)):
        with pytest.raises(SfmpError, match=message):
            call(_x(tokens, 100))


def test_gradient_of_the_bias(layer):
    x = _x(5, 100)
    layer.bias.requires_grad_()
    layer(x).square().sum().backward()
    again = layer.bias.detach().clone().requires_grad_()
    nn.functional.linear(x, layer.dequantize(), again).square().sum().backward()
    torch.testing.assert_close(layer.bias.grad, again.grad, rtol=1e-3, atol=1e-2)
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_kinds_of_activations_after_the_first_call(layer):
    x = _x(1, 100)
    expected = layer(x).numpy()
    for array in (x.numpy(), x.numpy().astype(">f4")):
        found = layer(array)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, expected)
    for bad, message in [(torch.tensor(1.0), "found torch.float32"), (x.to_sparse(), "x: expected a dense tensor"),
                         (x.numpy().astype(np.longdouble), "at most 64 bits"), ([1.0], "found list")]:
        with pytest.raises(SfmpError, match=message):
            layer(bad)


def test_the_key_of_a_column_order_is_no_checksum():
    """Two orders of 32 columns with the same crc32."""
    one, two = (np.random.RandomState(seed).permutation(32).astype(np.int32) for seed in (3424, 159338))
    keys = [layout.column_key(one, 32, 32), layout.column_key(two, 32, 32), layout.column_key(one, 31, 32),
            layout.column_key(one, 32, 64)]
    assert len(set(keys)) == 4 and len({key >> 32 for key in keys}) == len({key & 0xFFFFFFFF for key in keys}) == 4
