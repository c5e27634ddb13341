"""Conv1D and fused experts as linear layers: same function, same memory, gradients and statistics of their own."""

import copy
import pickle
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from families import WINDOWS, loaded_afresh, logits, quantized, saved, tiny
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import sfmp.apply
from sfmp import QuantSpec, fisher_salience, make_plan
from sfmp.checkpoint import read_headers
from sfmp.hf import quantized_layers
from sfmp.inspection import read_checkpoint
from sfmp.layer_bits import bits_by_layer_table, bits_frame
from sfmp.salience import SALIENCE_SOURCES
from sfmp.scale_groups import find_groups, fold
from sfmp.solvers import gptq
from sfmp.unfuse import RoutedExperts, all_experts, expose_linears, is_fused, linears_exposed, unknown_fused
from sfmp.walk import capture

CONFIG = SimpleNamespace(
    num_local_experts=3, moe_num_experts=3, n_routed_experts=3, hidden_size=8, moe_hidden_size=8, intermediate_size=6,
    moe_intermediate_size=6, moe_latent_size=None, hidden_act="silu", mlp_hidden_act="relu", post_norm_eps=1e-5,
    swiglu_alpha=1.7, swiglu_limit=7.0, _experts_implementation="eager")


@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "Aria", "MuseSpark", "NemotronH"])
def test_experts_of_every_layout_compute_what_the_fused_did(family):
    """Transposed or not, with biases, without a gate, with a norm behind; experts twice, never, and nobody."""
    module = re.sub("(?<=[a-z])(?=[A-Z])", "_", family).lower()
    kind = pytest.importorskip(f"transformers.models.{module}.modeling_{module}").__dict__[f"{family}Experts"]
    generator = torch.Generator().manual_seed(0)
    block = nn.Sequential(kind(CONFIG))
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    tokens, weights = (torch.randn(5, size, generator=generator) for size in (8, 2))
    index = torch.tensor([[0, 1], [1, 0], [1, 1], [0, 0], [1, 0]])
    with torch.no_grad():
        before = block[0](tokens, index, weights)
    expose_linears(block)
    experts = block[0]
    assert isinstance(experts, RoutedExperts) and not unknown_fused(block)
    for copied in (experts, copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        with torch.no_grad():
            assert torch.allclose(copied(tokens, index, weights), before, rtol=1e-5, atol=1e-5)
    nobody = torch.full((5, 1), 3)
    with torch.no_grad():
        more = experts(tokens, torch.cat([index, nobody], 1), torch.cat([weights, torch.ones(5, 1)], 1))
        with all_experts(block):
            everyone = experts(tokens, index, weights)
            shares = sum(experts.expert(number, tokens) for number in range(3)) / 3
        assert torch.allclose(more, before, rtol=1e-5, atol=1e-5)
    assert torch.allclose(everyone, before + shares, rtol=1e-4, atol=1e-4) and not experts.everyone


@pytest.mark.parametrize("family", ["GPT2", "Mixtral", "GptOss"])
def test_a_model_shows_linear_layers_and_is_then_as_it_was(family):
    model = tiny(family)
    modules, before = dict(model.named_modules()), logits(model)
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with linears_exposed(model):
        assert not any(is_fused(module) or type(module).__name__ == "Conv1D" for module in model.modules())
        assert {p.untyped_storage().data_ptr() for p in model.parameters()} <= storages  # views: no memory
        assert (logits(model) - before).abs().max() < 1e-5 * before.std()
    after = dict(model.named_modules())
    assert modules.keys() == after.keys() and all(module is after[name] for name, module in modules.items())
    assert torch.equal(logits(model), before)


def test_fisher_salience_is_that_of_the_fused_parameters():
    model, expected = tiny("Mixtral"), {}
    for window in WINDOWS[:3]:
        model.zero_grad()
        model(input_ids=window[None], labels=window[None]).loss.backward()
        for name, parameter in model.named_parameters():
            expected[name] = expected.get(name, 0) + parameter.grad.square()
    found = fisher_salience(model, WINDOWS[:3])
    for number in range(4):
        for matrix in ("gate_up_proj", "down_proj"):
            want = expected[f"model.layers.1.mlp.experts.{matrix}"][number]
            got = found[f"model.layers.1.mlp.experts.{number}.{matrix}"]
            assert torch.allclose(got, want, rtol=1e-3, atol=1e-5 * float(want.max())) and want.max() > 0

    model = tiny("GPT2")
    model(input_ids=WINDOWS[:1], labels=WINDOWS[:1]).loss.backward()
    name = "transformer.h.0.attn.c_attn"
    want = model.get_submodule(name).weight.grad.T.square()
    assert torch.allclose(fisher_salience(model, WINDOWS[:1])[name], want, rtol=1e-3, atol=1e-5 * float(want.max()))


@pytest.mark.parametrize("source", SALIENCE_SOURCES)
def test_every_salience_and_objective_knows_them(source):
    for family, name in (("GPT2", "transformer.h.1.mlp.c_fc"), ("Mixtral", "model.layers.1.mlp.experts.2.down_proj")):
        model = tiny(family)
        salience = SALIENCE_SOURCES[source](model, WINDOWS[:2], 0)
        spec = QuantSpec(bpw=4.0, group_size=32, block_rows=32, levels=(2, 3, 4), objective="measured")
        assert name in make_plan(salience, spec, model)


def test_gptq_sees_the_tokens_routed_to_each_expert(monkeypatch):
    seen, want = {}, {}

    def spy(weight, stats, matrix, spec):
        seen[len(seen)] = stats.tokens, stats.gram.clone()
        return gptq(weight, stats, matrix, spec)

    monkeypatch.setitem(sfmp.apply.SOLVERS, "gptq", spy)
    model = tiny("Mixtral")
    experts = model.model.layers[0].mlp.experts
    handle = experts.register_forward_hook(lambda module, args, output: want.update(enumerate(args)))
    logits(model)
    handle.remove()
    report = quantized(model, "gptq").sfmp_report
    names = list(report["matrices"])
    for number in range(4):
        token = torch.where(want[1] == number)[0]
        tokens, gram = seen[names.index(f"model.layers.0.mlp.experts.{number}.gate_up_proj")]
        assert tokens == len(token) and torch.allclose(gram, want[0][token].T @ want[0][token], rtol=1e-3, atol=1e-2)


def test_scales_hold_for_experts_that_the_probe_does_not_reach():
    """Two tokens prove the scales of sixteen experts: what is folded for one is folded for all."""
    model = tiny("Mixtral", num_local_experts=16)
    expose_linears(model)
    before, layer = logits(model), model.model.layers[0]
    (probe,) = capture(model, list(model.model.layers), [WINDOWS[:1, :2]])
    planned = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    groups, refused = find_groups(layer, probe, 0, planned)
    assert len(groups) == 19 and not refused
    for group in groups:
        scale = torch.arange(len(group.outputs(layer))) % 3 - 1
        fold(layer, group, torch.exp2(scale.float()))
    assert torch.equal(logits(model), before)


def test_experts_without_tokens_are_named_and_still_stored(tmp_path):
    """Three tokens reach few of sixteen experts: no gradient, no scale or clip range, no Hessian; never silently."""
    folders = []
    for method in ("awq", "gptq"):
        model = tiny("Mixtral", num_local_experts=16)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            quantized(model, method, WINDOWS[:1, :3])
        said = [str(warning.message) for warning in caught]
        (unused,) = [line for line in said if line.startswith("no gradient reached")]
        name = unused.split("reached ")[1].split(",")[0]
        assert ".experts." in name
        short = name if method == "gptq" else name.split("layers.0.")[-1]
        assert any(line.startswith(f"{method}: no calibration token") and short in line for line in said)
        assert len(quantized_layers(model)) == 2 * (4 + 32)
        folders.append(saved(model, tmp_path / method))
    assert all(loaded_afresh(folders).values())


def test_tensors_are_stored_under_the_names_in_the_configuration(tmp_path):
    """transformers saves a Mixtral under other names than it has in memory, and would so save its packed matrices."""
    model = quantized(tiny("Mixtral"), "rtn")
    for folder in (tmp_path / "first", tmp_path / "again"):
        model.save_pretrained(folder)
        assert set(read_headers(folder.glob("*.safetensors"))) == set(model.state_dict())
        table = bits_by_layer_table(bits_frame(read_checkpoint(folder).matrices))
        assert list(table.index) == ["0", "1", "all"] and {"gate_up", "down", "q", "o"} < set(table.columns)
        model = AutoModelForCausalLM.from_pretrained(folder)


def test_some_of_an_experts_matrices_bfloat16_and_dequantized(tmp_path):
    """What is skipped is stored expert by expert; dequantizing gives an ordinary checkpoint of transformers."""
    model = quantized(tiny("Qwen3Moe", torch.bfloat16), skip=("lm_head", "down_proj"))
    kept = model.model.layers[0].mlp.experts.get_submodule("3").down_proj
    assert isinstance(kept, nn.Linear) and kept.weight.dtype == torch.bfloat16
    folders = [saved(model, tmp_path / "skipped")]
    again = AutoModelForCausalLM.from_pretrained(folders[0])
    folders.append(saved(again, tmp_path / "again"))
    assert torch.equal(logits(again), logits(model)) and all(loaded_afresh(folders).values())
    base, path = AutoModel.from_pretrained(folders[0]), "layers.1.mlp.experts.4.down_proj"  # names without "model."
    assert torch.equal(base.get_submodule(path).weight, model.model.get_submodule(path).weight)
    for family in ("Qwen3Moe", "GptOss", "GPT2"):
        model = quantized(tiny(family), "rtn")
        expected = logits(model)
        model.dequantize()
        model.save_pretrained(tmp_path / family)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / family)
        assert type(plain) is type(model) and not quantized_layers(plain)
        assert (logits(plain) - expected).abs().max() < 1e-4 * expected.std()
