"""SFMPLinear: shapes, dtypes, moves and copies never change the stored numbers.

The layers ask for the reference where results are compared bit by bit with a product of the dequantized weight; what
"auto" chooses instead is compared within its accuracy in tests/test_cpu_linear.py.
"""

import copy
import io

import pytest
import torch
from cases import packed_case
from torch import nn

from sfmp.linear import SFMPLinear, keep_dequantized
from sfmp.packed import TENSORS
from sfmp.spec import SfmpError


@pytest.fixture
def layer():
    return _reference(packed_case(0, bias=True))


def _reference(packed):
    layer = SFMPLinear.from_packed(packed)
    layer.backend = "reference"
    return layer


def _x(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("shape", [(100,), (1, 100), (7, 100), (2, 3, 100), (2, 1, 3, 100), (0, 100)])
def test_any_leading_dimensions(layer, shape):
    x = _x(*shape)
    expected = nn.functional.linear(x, layer.packed.dequantize(), layer.bias)
    assert torch.equal(layer(x), expected) and layer(x).shape == (*shape[:-1], 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_result_has_the_dtype_of_x_and_one_rounding(layer, dtype):
    x = _x(5, 100, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    expected = nn.functional.linear(x.to(wide), layer.packed.dequantize().to(wide), layer.bias.to(wide))
    assert layer(x).dtype == dtype and torch.equal(layer(x), expected.to(dtype))


def test_columns_and_rows_are_in_natural_order():
    layer = _reference(packed_case(1))
    weight = layer.packed.dequantize()
    for column in (0, 31, 57, 99):
        assert torch.equal(layer(torch.eye(100)[column]), weight[:, column])


MOVES = {
    "to bfloat16": lambda m: m.to(torch.bfloat16),
    "to float64": lambda m: m.to(torch.float64),
    "half": lambda m: m.half(),
    "bfloat16 then float": lambda m: m.bfloat16().float(),
    "type": lambda m: m.type(torch.float32),
    "cpu": lambda m: m.cpu(),
    "share_memory": lambda m: m.share_memory(),
    "inside a parent": lambda m: nn.Sequential(m).to(torch.bfloat16)[0],
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("move", MOVES)
def test_moves_keep_the_stored_numbers(layer, move):
    before = {key: tensor.clone() for key, tensor in layer.packed.tensors().items()}
    layer(_x(1, 100))
    moved = MOVES[move](layer)
    for key in TENSORS:
        found = getattr(moved, key)
        assert found.dtype == before[key].dtype and torch.equal(found, before[key]), key
    x = _x(3, 100)
    assert torch.allclose(moved(x), layer(x))


def test_bias_follows_the_model(layer):
    assert layer.to(torch.bfloat16).bias.dtype == torch.bfloat16


def test_state_dict_round_trip_through_an_empty_layer(layer):
    packed = layer.packed
    sizes = {"group_size": 32, "block_rows": 16, "plane_words": packed.planes.numel()}
    empty = SFMPLinear.empty(40, 100, **sizes, bias=True, device="meta")
    assert {t.device.type for t in empty.buffers()} == {"meta"} and "SFMPLinear" in repr(empty)
    empty = empty.to_empty(device="cpu")
    empty.backend = "reference"
    assert [t.dtype for t in empty.buffers()] == [t.dtype for t in layer.buffers()]
    with keep_dequantized(layer):
        layer(_x(1, 100))
        stream = io.BytesIO()
        torch.save(layer.state_dict(), stream)
    stream.seek(0)
    empty.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(empty(_x(3, 100)), layer(_x(3, 100)))
    assert list(layer.state_dict()) == [*TENSORS, "bias"]


def test_loading_forgets_what_was_derived(layer):
    other = _reference(packed_case(0, bias=True))
    other.row_perm.copy_(torch.arange(40))
    x = _x(2, 100)
    expected = other(x)
    with keep_dequantized(layer):
        assert not torch.equal(layer(x), expected)
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), expected)


def test_keep_dequantized_changes_no_result_and_leaves_nothing(layer):
    model = nn.Sequential(layer)
    x = _x(4, 100)
    expected = model(x)
    with torch.inference_mode(), keep_dequantized(model):
        assert torch.equal(model(x), expected)
        first = layer._cache["weight"]
        assert torch.equal(model(x), expected) and layer._cache["weight"] is first
    assert "weight" not in layer._cache and torch.equal(model(x), expected)
    with pytest.raises(SfmpError, match="SFMPLinear"), keep_dequantized(nn.Linear(2, 2)):
        pass


def test_gradient_flows_to_the_input(layer):
    with torch.inference_mode():
        layer(_x(1, 100))
    x = _x(2, 100).requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.packed.dequantize().sum(0).expand(2, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("x", "message"), [
    (torch.zeros(2, 99), r"floating \[..., 100\]"),
    (torch.zeros(2, 100, dtype=torch.int64), "found torch.int64"),
    (torch.zeros(2, 100, device="meta"), "device cpu"),
])
def test_bad_input_is_one_clear_error(layer, x, message):
    with pytest.raises(SfmpError, match=message):
        layer(x)
