"""Every family: quantized by every method, saved, loaded in a fresh process with the same bits; scales proved."""

import warnings

import pytest
import torch
from families import FAMILIES, FOLDED, WINDOWS, loaded_afresh, logits, quantized, saved, tiny
from torch import nn

from sfmp import QuantSpec, fisher_salience, make_plan, quantize_model
from sfmp.readers import weights_read_elsewhere
from sfmp.salience import linear_modules, magnitude_salience
from sfmp.scale_groups import find_groups, fold
from sfmp.spec import SfmpError
from sfmp.unfuse import expose_linears
from sfmp.walk import capture, find_layers, run_layer

METHODS = ("rtn", "awq", "gptq")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """(family, method) → (same bits in a fresh process, relative error of the logits, account of quantize_model)."""
    root, made = tmp_path_factory.mktemp("families"), {}
    for family in FAMILIES:
        reference = logits(tiny(family))
        for method in METHODS:
            model = quantized(tiny(family), method)
            folder = saved(model, root / f"{family}-{method}")
            error = (logits(model) - reference).square().mean().sqrt() / reference.std()
            made[family, method] = folder, float(error), model.sfmp_report
    equal = loaded_afresh([folder for folder, _, _ in made.values()])
    return {key: (equal[folder], error, report) for key, (folder, error, report) in made.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_process_finds_the_same_bits(checkpoints, family, method):
    same, error, report = checkpoints[family, method]
    assert same and 0.01 < error < 0.6 and not report["refused"]
    assert method == "rtn" or error < checkpoints[family, "rtn"][1]


def _layers(model):
    """(layer, probe as it enters it, its number, names of its linears), one after the other."""
    names = list(linear_modules(model))
    (stack,) = find_layers(model, names)
    (probe,) = capture(model, [layer for _, layer in stack], [WINDOWS[:1]])
    for index, (prefix, layer) in enumerate(stack):
        yield layer, probe, index, [name[len(prefix) + 1:] for name in names if name.startswith(prefix + ".")]
        probe.hidden = run_layer(layer, probe, index)


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_leave_the_function_as_it_is(family):
    """Powers of two change no bit of the logits (1 + w may round once); any scale changes no more than rounding."""
    model = tiny(family)
    expose_linears(model)
    before = logits(model)
    noise, found = torch.Generator().manual_seed(2), []
    for layer, probe, index, planned in _layers(model):
        groups, refused = find_groups(layer, probe, index, planned)
        assert {group.previous for group in groups} == FOLDED[family] and not refused
        found += [(layer, group) for group in groups]
    weights = [layer.get_submodule(name).weight.clone() for layer, group in found for name in group.linears]
    for layer, group in found:
        exponents = torch.randint(-2, 3, (len(group.outputs(layer)),), generator=noise)
        fold(layer, group, torch.exp2(exponents.float()))
    changed = [layer.get_submodule(name).weight for layer, group in found for name in group.linears]
    assert not any(torch.equal(old, new) for old, new in zip(weights, changed, strict=True))
    rounds = any(group.form == "one_plus_weight" for _, group in found)
    assert (logits(model) - before).abs().max() <= (1e-5 * before.std() if rounds else 0)
    for layer, group in found:
        fold(layer, group, torch.exp(torch.randn(len(group.outputs(layer)), generator=noise) / 2))
    assert (logits(model) - before).abs().max() < 1e-4 * before.std()


def test_a_scale_in_the_wrong_place_is_seen():
    """The check above can fail: keys of a fused projection are no values."""
    model = tiny("GPTNeoX")
    before = logits(model)
    layer, probe, index, planned = next(_layers(model))
    groups, _ = find_groups(layer, probe, index, planned)
    group = next(group for group in groups if group.part)
    assert group.part == (32, 16, 48)
    wrong = type(group)(group.previous, group.linears, group.inspect, group.form, 0, (16, 16, 48))
    fold(layer, wrong, torch.rand(64) + 0.5)
    assert (logits(model) - before).abs().max() > 0.05 * before.std()


class _Unknown(nn.Module):
    """A family nobody knows: no norm module in front of its linears, and nothing linear between them."""

    def __init__(self):
        super().__init__()
        self.config = None
        self.layers = nn.ModuleList(nn.ModuleDict({"first": nn.Linear(32, 48), "second": nn.Linear(48, 32)})
                                    for _ in range(2))
        self.mixed = nn.Parameter(torch.randn(3, 32, 32))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["second"](torch.tanh(layer["first"](x / x.norm(dim=-1, keepdim=True))))
        return x @ self.mixed.sum(0)


def test_an_unknown_family_is_quantized_without_scales_and_says_so():
    torch.manual_seed(0)
    model, tokens = _Unknown().eval(), torch.randn(64, 32)
    spec = QuantSpec(bpw=9.0, group_size=32, block_rows=32, levels=(8,), method="awq")
    plan = make_plan({name: linear.weight.detach().square() for name, linear in linear_modules(model).items()}, spec)
    with torch.no_grad():
        before = model(tokens)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            quantize_model(model, plan, tokens)
        assert (model(tokens) - before).abs().max() < 0.05 * before.std()
    said = " / ".join(str(warning.message) for warning in caught)
    assert "mixed: these 3-D parameters stay as they are" in said
    assert "a scale for" in said and "layers.0.first" in said and "quantized without an AWQ scale" in said


class _Bypass(nn.Module):
    """One linear is called, of one only the weight is used, and one is a router that derives from nn.Linear."""

    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x).softmax(-1), None

    def __init__(self):
        super().__init__()
        self.called, self.used, self.router = nn.Linear(32, 32), nn.Linear(32, 32), self.Router(32, 32)

    def forward(self, x):
        return (self.called(x) @ self.used.weight.T) * self.router(x)[0]


def test_what_is_not_called_as_a_linear_layer_is_left_alone():
    torch.manual_seed(0)
    model = _Bypass()
    with pytest.warns(UserWarning, match="^used: used without calling the layer"):
        salience = fisher_salience(model, torch.randn(3, 4, 32), loss_fn=lambda m, x: m(x).square().sum())
    assert list(salience) == ["called"] and salience.readers == (("called",),)
    linears, kind = {name: model.get_submodule(name) for name in ("called", "used")}, type(model.used)
    model.called.forward = model.called.forward  # as accelerate leaves it
    assert weights_read_elsewhere(linears, lambda: model(torch.randn(4, 32))) == ["used"]
    assert type(model.used) is type(model.called) is kind


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_what_must_stay_a_tensor_is_refused_under_salience_that_does_not_see_it(method):
    """Mamba multiplies by the weight of dt_proj itself: a checkpoint without that weight could not run."""
    def attempt(skip):
        model = tiny("Mamba")
        spec = QuantSpec(bpw=4.0, group_size=32, block_rows=32, levels=(2, 3, 4), method=method, skip=skip)
        return quantize_model(model, make_plan(magnitude_salience(model, skip=skip), spec), WINDOWS)

    with pytest.raises(SfmpError, match=r"layers.0.mixer.dt_proj: .*read by other code.*--skip lm_head dt_proj"):
        attempt(("lm_head",))
    model = attempt(("lm_head", "dt_proj"))
    assert logits(model).isfinite().all() and type(model.backbone.layers[0].mixer.dt_proj) is nn.Linear


def test_an_embedding_is_no_linear_layer(tiny_llama):
    salience = {"model.embed_tokens": tiny_llama.model.embed_tokens.weight.detach().square()}
    spec = QuantSpec(bpw=4.0, group_size=32, block_rows=32, levels=(2, 3, 4), method="rtn")
    with pytest.raises(SfmpError, match=r"embed_tokens: the plan expects an nn.Linear, found Embedding"):
        quantize_model(tiny_llama, make_plan(salience, spec))
