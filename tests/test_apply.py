"""quantize_model on whole models: every method, dtype and kind of module tree; and on a trained model."""

import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import sfmp.apply
from sfmp.apply import quantize_model
from sfmp.linear import SFMPLinear
from sfmp.solvers import gptq
from sfmp.spec import MatrixPlan, Plan, QuantSpec, SfmpError
from sfmp.walk import capture, find_layers, is_chain, run_layer

METHODS = ("rtn", "awq", "gptq")


def _plan(model, method, bpw=4.0, levels=(2, 3, 4), group_size=32, block_rows=24, skip=("lm_head",), seed=0):
    """Random permutations and bits: what is tested here must hold for any plan."""
    generator = np.random.default_rng(seed)
    spec = QuantSpec(bpw=bpw, group_size=group_size, block_rows=block_rows, levels=levels, method=method,
                     skip=skip)
    matrices = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in skip:
            rows, columns = module.weight.shape
            bits = generator.choice(levels, (-(-rows // block_rows), -(-columns // group_size)))
            matrices[name] = MatrixPlan(generator.permutation(rows), generator.permutation(columns), bits)
    return Plan(spec, matrices)


def _windows(count=6, length=32, vocabulary=128):
    return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(1))


def _logits(model, windows):
    with torch.no_grad():
        return model(windows).logits.float()


@pytest.mark.parametrize("method", METHODS)
def test_every_planned_linear_is_replaced(tiny_llama, method):
    plan = _plan(tiny_llama, method, bpw=9.0, levels=(8,))
    before = _logits(tiny_llama, _windows())
    tiny_llama.train()
    assert quantize_model(tiny_llama, plan, _windows()) is tiny_llama
    assert tiny_llama.training and all(m.training for m in tiny_llama.modules())
    tiny_llama.eval()
    replaced = {n for n, m in tiny_llama.named_modules() if isinstance(m, SFMPLinear)}
    assert replaced == set(plan) and len(replaced) == 14
    after = _logits(tiny_llama, _windows())
    assert (after - before).square().mean().sqrt() < 0.02 * before.std()
    report = json.loads(json.dumps(tiny_llama.sfmp_report))
    assert set(report["matrices"]) == set(plan) and report["refused"] == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(tiny_llama, method, dtype):
    model = tiny_llama.to(dtype)
    before = _logits(model, _windows())
    quantize_model(model, _plan(model, method, bpw=9.0, levels=(8,)), _windows())
    floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
    assert floats == {dtype}
    after = _logits(model, _windows())
    assert (after - before).square().mean().sqrt() < 0.03 * before.std()


@pytest.mark.parametrize("method", METHODS)
def test_deterministic(tiny_llama, method):
    import copy

    first, second = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    for model in (first, second):
        quantize_model(model, _plan(model, method), _windows())
    other = second.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in first.state_dict().items())
    assert list(first.sfmp_report["matrices"]) == list(second.sfmp_report["matrices"])


@pytest.mark.parametrize("form", [list, lambda w: [row[None] for row in w], lambda w: w.numpy(),
                                  lambda w: w.to(torch.int32), lambda w: w.tolist()])
def test_windows_come_in_any_form(tiny_llama, form):
    import copy

    first, second = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    quantize_model(first, _plan(first, "gptq"), _windows())
    quantize_model(second, _plan(second, "gptq"), form(_windows()))
    other = second.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in first.state_dict().items())


def test_gptq_sees_the_output_of_quantized_layers(tiny_llama, monkeypatch):
    """Gram matrices of the second layer must come from activations behind the quantized first layer."""
    grams = []

    def spy(weight, stats, matrix, spec):
        grams.append((stats.gram.clone(), stats.tokens))
        return gptq(weight, stats, matrix, spec)

    monkeypatch.setitem(sfmp.apply.SOLVERS, "gptq", spy)
    plan = _plan(tiny_llama, "gptq", levels=(2,), bpw=3.0)
    quantize_model(tiny_llama, plan, _windows())
    seen = []
    target = tiny_llama.model.layers[1].self_attn.q_proj
    target.register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, 64)))
    _logits(tiny_llama, _windows())
    names = [n for n in tiny_llama.sfmp_report["matrices"]]
    gram, tokens = grams[names.index("model.layers.1.self_attn.q_proj")]
    assert tokens == 6 * 32 and torch.allclose(seen[0].T @ seen[0], gram, rtol=1e-3, atol=1e-2)


def test_awq_sees_the_full_precision_output_of_the_layers_before(tiny_llama, monkeypatch):
    """METHOD 1.6: the second layer is searched on what the first gave before it was quantized."""
    seen, search = {}, sfmp.apply.search_layer

    def spy(layer, planned, batches, probe, index, *rest):
        seen[index] = torch.cat([batch.hidden for batch in batches])
        return search(layer, planned, batches, probe, index, *rest)

    monkeypatch.setattr(sfmp.apply, "search_layer", spy)
    with torch.no_grad():
        expected = tiny_llama(_windows(), output_hidden_states=True).hidden_states
    quantize_model(tiny_llama, _plan(tiny_llama, "awq", levels=(2,), bpw=3.0), _windows())
    for index in (0, 1):
        assert torch.allclose(seen[index], expected[index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_plain_mlp_with_features(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10))
    features = torch.randn(500, 40)
    with torch.no_grad():
        before = model(features)
    quantize_model(model, _plan(model, method, bpw=9.0, levels=(8,)), features)
    with torch.no_grad():
        after = model(features)
    assert isinstance(model[0], SFMPLinear) and (after - before).norm() < 0.02 * before.norm()


def test_gptq_and_awq_beat_rtn_on_correlated_features():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    features = torch.randn(1000, 64) @ (torch.randn(64, 64) * torch.logspace(0, -2, 64))
    errors = {}
    for method in METHODS:
        copy = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
        copy.load_state_dict(model.state_dict())
        quantize_model(copy, _plan(copy, method, bpw=4.0, levels=(3,)), features[:500])
        with torch.no_grad():
            errors[method] = float((copy(features[500:]) - model(features[500:])).square().mean())
    assert errors["gptq"] < errors["rtn"] and errors["awq"] < errors["rtn"]


@pytest.mark.parametrize("method", METHODS)
def test_tied_head_can_be_quantized_without_touching_the_embedding(tiny_llama, method):
    embedding = tiny_llama.model.embed_tokens.weight.detach().clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantize_model(tiny_llama, _plan(tiny_llama, method, skip=(), bpw=5.0, levels=(4,)), _windows())
    assert any("lm_head would change a shared weight" in str(w.message) for w in caught) == (method == "awq")
    assert isinstance(tiny_llama.lm_head, SFMPLinear)
    assert torch.equal(tiny_llama.model.embed_tokens.weight, embedding)


class _Branches(nn.Module):
    """A ModuleList that is no chain: its entries all read the same input."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        return sum(branch(x) for branch in self.branches)


class _Conditioned(nn.Module):
    """Layers that also receive something computed from the data."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Bilinear(8, 8, 8) for _ in range(2))

    def forward(self, x):
        condition = x.mean(0, keepdim=True).expand_as(x)
        for layer in self.layers:
            x = layer(x, condition)
        return x


def test_arguments_that_depend_on_the_data_are_kept_per_batch():
    torch.manual_seed(0)
    model, groups = _Conditioned(), [torch.randn(4, 8) for _ in range(4)]
    batches = capture(model, list(model.layers), groups)
    for batch, group in zip(batches, groups, strict=True):
        hidden = batch.hidden
        for index, layer in enumerate(model.layers):
            batch.hidden = hidden
            hidden = run_layer(layer, batch, index)
        assert torch.allclose(hidden, model(group), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_module_list_that_is_no_chain(method):
    torch.manual_seed(0)
    model, features = _Branches(), torch.randn(64, 32)
    (stack,) = find_layers(model, ["branches.0"])
    assert not is_chain(model, [layer for _, layer in stack], features)
    before = model(features).detach()
    quantize_model(model, _plan(model, method, bpw=9.0, levels=(8,)), features)
    assert (model(features) - before).norm() < 0.02 * before.norm()


def test_partly_planned_layers(tiny_llama):
    plan = _plan(tiny_llama, "awq")
    part = Plan(plan.spec, {n: m for n, m in plan.items() if n.endswith(("gate_proj", "o_proj"))})
    before = _logits(tiny_llama, _windows())
    quantize_model(tiny_llama, part, _windows())
    assert isinstance(tiny_llama.model.layers[0].mlp.up_proj, nn.Linear)
    assert (_logits(tiny_llama, _windows()) - before).square().mean().sqrt() < 0.5 * before.std()


def test_refused_groups_are_warned_about():
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=128, ffn_dim=96,
                       max_position_embeddings=64, word_embed_proj_dim=64, do_layer_norm_before=False)
    model = OPTForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data *= 3.0
    with pytest.warns(UserWarning, match=r"fc1.*without an AWQ scale.*decoder.layers.1"):
        quantize_model(model, _plan(model, "awq"), _windows())
    assert len(model.sfmp_report["refused"]) >= 2


def test_linears_no_token_reaches_are_rounded():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.used(x)

    for method in ("gptq", "awq"):
        torch.manual_seed(0)
        model = Lazy()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            quantize_model(model, _plan(model, method), torch.randn(50, 32))
        assert isinstance(model.unused, SFMPLinear)
        assert any(f"{method}: no calibration token" in str(w.message) and "reached unused" in str(w.message)
                   for w in caught)


def test_errors(tiny_llama):
    plan = _plan(tiny_llama, "awq")
    with pytest.raises(SfmpError, match=r"awq needs calibration.*method='rtn'"):
        quantize_model(tiny_llama, plan)
    with pytest.raises(SfmpError, match=r"windows: expected shape \[n, seqlen\]"):
        quantize_model(tiny_llama, plan, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(SfmpError, match=r"windows: .*of equal length"):
        quantize_model(tiny_llama, plan, [torch.zeros(5), torch.zeros(6)])
    with pytest.raises(SfmpError, match=r"token ids within 0..127, found 1..128; .*another tokenizer"):
        quantize_model(tiny_llama, plan, _windows() % 128 + 1)
    other = Plan(plan.spec, {"model.layers.9.mlp.up_proj": plan["model.layers.0.mlp.up_proj"]})
    with pytest.raises(SfmpError, match="layers.9.mlp.up_proj: the plan expects an nn.Linear, found nothing"):
        quantize_model(tiny_llama, other, _windows())
    wrong = Plan(plan.spec, {"model.layers.0.mlp.up_proj": plan["model.layers.0.mlp.down_proj"]})
    with pytest.raises(SfmpError, match=r"up_proj: the plan expects shape \(64, 172\), found \(172, 64"):
        quantize_model(tiny_llama, wrong, _windows())
    tiny_llama.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(SfmpError, match="model.layers.0.mlp.up_proj: .*NaN"):
        quantize_model(tiny_llama, _plan(tiny_llama, "rtn"))


@pytest.fixture(scope="module")
def stories(shared_data):
    """A trained model of 260 thousand weights, and stories it tells itself (its own domain)."""
    from transformers import AutoModelForCausalLM

    path = shared_data / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start = torch.ones(48, 1, dtype=torch.int64)
        tokens = model.generate(start, do_sample=True, min_new_tokens=127, max_new_tokens=127, pad_token_id=0)
    return path, tokens


def _stories_perplexity(path, tokens, method, levels, bpw):
    from transformers import AutoModelForCausalLM

    from sfmp import make_plan
    from sfmp.salience import fisher_salience

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    if method is not None:
        spec = QuantSpec(bpw=bpw, group_size=32, block_rows=32, levels=levels, method=method)
        plan = make_plan(fisher_salience(model, tokens[:4]), spec)
        quantize_model(model, plan, tokens[:32])
    with torch.no_grad():
        losses = [model(w[None], labels=w[None]).loss for w in tokens[32:]]
    return float(torch.stack(losses).mean().exp())


def test_trained_model(stories):
    path, tokens = stories
    reference = _stories_perplexity(path, tokens, None, None, None)
    for method in METHODS:
        assert _stories_perplexity(path, tokens, method, (8,), 9.0) == pytest.approx(reference, rel=0.01)
    three = {method: _stories_perplexity(path, tokens, method, (3,), 4.0) for method in METHODS}
    print(reference, three)
    assert reference < three["gptq"] < three["rtn"] and reference < three["awq"] < three["rtn"]
