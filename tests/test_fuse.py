"""fuse: a model computes what it did, in fewer products."""

import copy
import io
import threading

import pytest
import torch
from cases import affine_case, quantize_randomly
from torch import nn

from kernels_numba.cpu import targets
from sfmp import QuantSpec, SfmpError, fisher_salience, fuse, make_plan, quantize_model
from sfmp.linear import SFMPLinear, keep_dequantized
from sfmp.pack import pack

BACKENDS = ["reference", pytest.param("cpu", marks=[pytest.mark.cpu, pytest.mark.skipif(
    targets.detect()[0] is None, reason=targets.detect()[1])])]
QKV = tuple(f"model.layers.0.self_attn.{key}_proj" for key in "qkv")


def test_a_model_without_packed_layers_is_refused():
    with pytest.raises(SfmpError, match="expected at least one SFMPLinear, found none"):
        fuse.fuse(nn.Linear(2, 2))


def _quantized(model, shared=True, backend="auto"):
    windows = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(bpw=4.0, group_size=32, block_rows=16, method="rtn", shared_columns=shared)
    quantize_model(model, make_plan(fisher_salience(model, windows), spec))
    for layer in model.modules():
        if isinstance(layer, SFMPLinear):
            layer.backend = backend
    return model


class _Counted:
    """Counts products while inside, by their rows."""

    def __init__(self, monkeypatch):
        self.rows = []
        original = SFMPLinear.forward

        def forward(layer, x):
            self.rows.append(layer.out_features)
            return original(layer, x)

        monkeypatch.setattr(SFMPLinear, "forward", forward)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fused_model_computes_the_same_bits_in_fewer_products(tiny_llama, monkeypatch, backend):
    model, prompt = _quantized(tiny_llama, backend=backend), torch.arange(3, 11).view(2, 4)
    single = prompt[:1, :1]
    with torch.no_grad():
        expected = [model(ids).logits for ids in (prompt, single)]
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=6)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = fuse.fuse(model)
    assert QKV in report.fused and len(report.fused) == 2, "gate and up have 172 rows, blocks 16"
    assert report.left["model.layers.0.mlp.gate_proj"] == "their row blocks do not fit each other"
    assert len(report.left) == 4 and fuse.fuse(model) == report
    counted = _Counted(monkeypatch)
    with torch.no_grad():
        for ids, logits in zip((prompt, single), expected, strict=True):
            found = model(ids).logits
            # A kernel computes every row for itself; torch may cut a taller product in another way.
            assert torch.equal(found, logits) if backend == "cpu" else torch.allclose(found, logits, atol=1e-5)
    assert counted.rows == 2 * 2 * [64 + 32 + 32, 64, 172, 172, 64]
    assert torch.equal(tokens, model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                                              max_new_tokens=6))
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert all(not vars(joint._local)["shared"] for joint in _joints(model)), "nothing is kept after the forward"


def _joints(model):
    found = {id(layer._joint): layer._joint for layer in model.modules() if isinstance(layer, fuse.FusedLinear)}
    return list(found.values())


def test_gate_and_up_are_fused_where_their_row_blocks_fit(tiny_llama, monkeypatch):
    model = quantize_randomly(tiny_llama, block_rows=4)  # 4 divides 172
    orders = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SFMPLinear):
            layer.col_perm = orders.setdefault((name.rpartition(".")[0], layer.in_features), layer.col_perm)
    other = model.model.layers[1].mlp.up_proj
    other.col_perm = other.col_perm.long().flip(0).to(torch.uint16)
    report = fuse.fuse(model)
    parts = [tuple(name.rpartition(".")[2] for name in names) for names in report.fused]
    assert parts == [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_proj", "k_proj", "v_proj")]
    assert report.left == {
        "model.layers.1.mlp.gate_proj": "its column order, group size or device is not that of up_proj; "
                                        "QuantSpec.shared_columns makes the orders equal",
        "model.layers.1.mlp.up_proj": "its column order, group size or device is not that of gate_proj; "
                                      "QuantSpec.shared_columns makes the orders equal"}
    counted = _Counted(monkeypatch)
    with torch.no_grad():
        model(torch.arange(3)[None])
    assert counted.rows == [128, 64, 344, 64, 128, 64, 172, 172, 64]


def test_orders_of_their_own_are_left_and_named(tiny_llama):
    report = fuse.fuse(_quantized(tiny_llama, shared=False))
    assert not report.fused and len(report.left) == 10
    assert all("column order" in report.left[name] for name in QKV)
    assert not _joints(tiny_llama)


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
    counted, x = _Counted(monkeypatch), _x(3, 64)
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
    counted, x = _Counted(monkeypatch), _x(2, 64).requires_grad_()
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
        counted = _Counted(monkeypatch)
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
    counted = _Counted(monkeypatch)
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


def test_a_checkpoint_of_a_fused_model_is_the_model(tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    model = _quantized(tiny_llama)
    model.save_pretrained(tmp_path / "plain")
    assert fuse.fuse(model).fused
    with torch.no_grad():
        expected = model(torch.arange(3, 11)[None]).logits
    model.save_pretrained(tmp_path / "fused")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "fused" / name).read_bytes(), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert not _joints(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(torch.arange(3, 11)[None]).logits, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_models_compute_the_same_in_as_few_products(tiny_llama, backend):
    model, prompt = _quantized(tiny_llama, backend=backend), torch.arange(3, 11)[None]
    assert fuse.fuse(model).fused
    products = []

    def counting(graph, inputs):
        products.extend(node for node in graph.graph.nodes if "cpu_linear" in str(node.target))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(prompt).logits  # merges and repacks
        compiled = torch.compile(model, backend=counting, fullgraph=backend == "cpu")
        assert torch.allclose(compiled(prompt, use_cache=False).logits, expected, atol=1e-5)
        assert len(products) == (2 * (1 + 1 + 2 + 1) if backend == "cpu" else 0)
        assert all(not joint._traced for joint in _joints(model))
        assert torch.allclose(model(prompt).logits, expected, atol=1e-5), "and without the compiler again"
    torch._dynamo.reset()


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
