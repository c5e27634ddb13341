"""Scale groups: what is found, what is refused, what folding does; whole families are in test_architectures."""

import pytest
import torch
from families import tiny
from torch import nn

from sfmp.scale_groups import ScaleGroup, find_groups, fold
from sfmp.walk import Batch, capture, find_layers


def _first_layer(model, tokens=24):
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    (stack,) = find_layers(model, names)
    windows = torch.arange(tokens)[None] * 7 % 96
    (probe,) = capture(model, [layer for _, layer in stack], [windows])
    prefix, layer = stack[0]
    return layer, probe, [n[len(prefix) + 1:] for n in names if n.startswith(prefix + ".")], windows


def test_a_wrong_fold_changes_the_model():
    """The check above can fail: query and output projection are no scale group."""
    model = tiny("Llama", num_key_value_heads=4)
    layer, _, _, windows = _first_layer(model)
    with torch.no_grad():
        before = model(windows).logits
        fold(layer, ScaleGroup("self_attn.q_proj", ("self_attn.o_proj",), "", "rows"), torch.rand(64) + 0.5)
        assert (model(windows).logits - before).abs().max() > 0.05 * before.std()


def test_grouped_query_value_to_output():
    """Defect 11 of METHOD 1.12: the output projection was never scaled under grouped-query attention."""
    layer, probe, planned, _ = _first_layer(tiny("Llama"))
    group = next(g for g in find_groups(layer, probe, 0, planned)[0] if g.previous == "self_attn.v_proj")
    assert group.head_dim == 16
    # 4 query heads read 2 value heads in pairs.
    assert group.channels(layer).view(4, 16)[:, 0].tolist() == [0, 0, 16, 16]


def test_norms_of_one_plus_weight_are_recognised():
    layer, probe, planned, _ = _first_layer(tiny("Gemma2"))
    forms = {g.previous: g.form for g in find_groups(layer, probe, 0, planned)[0]}
    assert forms["input_layernorm"] == "one_plus_weight" and forms["mlp.up_proj"] == "rows"


def test_post_norm_layer_is_refused_by_name():
    """OPT-350m style: the norm's output is also the residual, so scaling it would change the model."""
    model = tiny("OPT", do_layer_norm_before=False)
    layer, probe, planned, _ = _first_layer(model)
    groups, refused = find_groups(layer, probe, 0, planned)
    assert "final_layer_norm" not in {g.previous for g in groups}
    assert any("fc1" in sentence and "without an AWQ scale" in sentence for sentence in refused)


def test_a_clamp_that_the_probe_stays_within_is_noticed():
    """OLMo can clamp queries, keys and values: a value that a scale makes larger would be cut."""
    for limit in (None, 8.0):
        layer, probe, planned, _ = _first_layer(tiny("Olmo", clip_qkv=limit))
        values = layer.self_attn.v_proj(layer.input_layernorm(probe.hidden))
        assert values.abs().max() < 8
        groups, _ = find_groups(layer, probe, 0, planned)
        assert {g.previous for g in groups} == {"mlp.up_proj"} | ({"self_attn.v_proj"} if limit is None else set())


@pytest.mark.parametrize("family", ["Olmo", "Olmo2"])
def test_what_reads_no_norm_with_a_weight_is_named(family):
    """Without a weight (OLMo), or behind the linears (OLMo 2), a norm takes no scale."""
    layer, probe, planned, _ = _first_layer(tiny(family))
    groups, refused = find_groups(layer, probe, 0, planned)
    lost = [sentence.split("scale for ")[1].split(" can be")[0] for sentence in refused]
    assert lost == ["self_attn.q_proj, self_attn.k_proj, self_attn.v_proj", "mlp.gate_proj, mlp.up_proj"]
    assert all("without an AWQ scale" in sentence for sentence in refused) and len(groups) == 2


def test_shared_parameters_are_never_scaled():
    layer, probe, planned, _ = _first_layer(tiny("Llama"))
    shared = {id(layer.mlp.up_proj.weight)}
    previous = {g.previous for g in find_groups(layer, probe, 0, planned, shared)[0]}
    assert previous == {"input_layernorm", "self_attn.v_proj"}


def test_finding_groups_leaves_the_weights_alone():
    layer, probe, planned, _ = _first_layer(tiny("GPTNeoX"))
    before = {n: p.clone() for n, p in layer.named_parameters()}
    find_groups(layer, probe, 0, planned)
    assert all(torch.equal(p, before[n]) for n, p in layer.named_parameters())


class _Strange(nn.Module):
    """No known names: a gated block whose gate is not linear and whose value path is."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
        self.n = nn.LayerNorm(32)
        self.register_buffer("unused", torch.zeros(1))

    def forward(self, x):
        y = self.n(x)
        return x + self.c(torch.sigmoid(self.a(y)) * self.b(y))


def test_unknown_architecture_is_discovered():
    torch.manual_seed(0)
    layer, probe = _Strange().eval(), Batch(torch.randn(16, 32))
    groups, refused = find_groups(layer, probe, 0, ["a", "b", "c"])
    assert [(g.previous, g.linears) for g in groups] == [("n", ("a", "b")), ("b", ("c",))] and not refused


def test_relu_pairs_and_only_those():
    torch.manual_seed(0)
    relu = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    groups, _ = find_groups(relu, Batch(torch.randn(8, 16)), 0, ["0", "2", "4"])
    assert [(g.previous, g.linears) for g in groups] == [("0", ("2",))]


def test_half_precision_norms_fold_exactly():
    """The linears get the scale that rounding the norm to bfloat16 left, not the one asked for."""
    torch.manual_seed(0)
    layer = _Strange().eval()
    layer.n.weight.data = (torch.rand(32) + 0.5).to(torch.bfloat16).float()
    layer.n.bias.data.zero_()
    x = torch.randn(16, 32)
    with torch.no_grad():
        before = layer(x)
        fold(layer, ScaleGroup("n", ("a", "b"), "", "weight"), torch.rand(32) + 0.5, torch.bfloat16)
        assert torch.equal(layer.n.weight, layer.n.weight.to(torch.bfloat16).float())
        assert (layer(x) - before).abs().max() < 1e-5


def test_a_linear_called_twice_is_in_no_group():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.n, self.a = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            return self.a(self.a(self.n(x)))

    torch.manual_seed(0)
    groups, _ = find_groups(Twice().eval(), Batch(torch.randn(4, 8)), 0, ["a"])
    assert groups == []
