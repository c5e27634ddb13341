"""fuse: a model computes what it did, in fewer products."""

import pytest
import torch
from cases import quantize_randomly
from torch import nn

from kernels_numba.cpu import targets
from sfmp import QuantSpec, SfmpError, fisher_salience, fuse, make_plan, quantize_model
from sfmp.linear import SFMPLinear

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


class Counted:
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
    counted = Counted(monkeypatch)
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
    counted = Counted(monkeypatch)
    with torch.no_grad():
        model(torch.arange(3)[None])
    assert counted.rows == [128, 64, 344, 64, 128, 64, 172, 172, 64]


def test_orders_of_their_own_are_left_and_named(tiny_llama):
    report = fuse.fuse(_quantized(tiny_llama, shared=False))
    assert not report.fused and len(report.left) == 10
    assert all("column order" in report.left[name] for name in QKV)
    assert not _joints(tiny_llama)


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
