"""EfficientQAT: decisions against a NumPy training loop, what each stage may change, bytes, errors."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sfmp.accounting import tensor_sizes
from sfmp.allocate import make_plan
from sfmp.baselines import efficient_qat
from sfmp.baselines.outcome import stored_bytes
from sfmp.checks import SfmpError
from sfmp.hf import quantized_layers, save_checkpoint
from sfmp.linear import keep_dequantized
from sfmp.salience import fisher_salience, random_salience
from sfmp.spec import QuantSpec

REDUCED = dict(group_size=32, n_windows=6, epochs=3, batch_size=2, lr_weights=3e-3, lr_quant=2e-3,
               e2e_windows=4, e2e_lr=1e-3, accumulation=2)


def windows(n=6, seqlen=24, seed=0, vocabulary=128):
    return torch.randint(0, vocabulary, (n, seqlen), generator=torch.Generator().manual_seed(seed))


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits.float()


class Chain(nn.Module):
    """Embedding and two square linear layers: small enough to train by hand."""

    def __init__(self, width=32):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.embedding = nn.Embedding(11, width)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width, bias=False)) for _ in range(2))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 3

    def forward(self, input_ids, labels=None):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=x, loss=x.square().mean())


# ---------------------------------------------------------------- an oracle in NumPy that knows no autograd
class NaiveLayer:
    """Weights, steps, zeros of one group per row at 2 bits, trained by hand-written gradients and Adam."""

    def __init__(self, weight):
        low, high = weight.min(1), weight.max(1)
        scale = 2 * np.float64(np.float16((high - low) / 3 / 2))
        self.values = [weight.astype(np.float64), scale, np.round(-low / scale)]
        self.moments = [(np.zeros_like(v), np.zeros_like(v)) for v in self.values]

    def parts(self):
        weight, scale, zero = self.values
        step = 2 * np.float16(np.float32(scale) / 2).astype(np.float64)
        zero = np.round(zero)
        base = np.float16(np.float32(step * (1.5 - zero))).astype(np.float64) - 1.5 * step
        place = (weight - base[:, None]) / step[:, None]
        return step, zero, base, place, np.clip(np.round(place), 0, 3)

    def quantized(self):
        step, _, base, _, code = self.parts()
        return base[:, None] + code * step[:, None]

    def train(self, x, target, rates, steps, clip):
        first = None
        for number in range(1, steps + 1):
            step, zero, _, place, code = self.parts()
            difference = x @ self.quantized().T - target
            first = (difference**2).mean() if first is None else first
            gradient = 2 / difference.size * difference.T @ x
            inside = np.round(place) == code
            slope = np.where(inside, code - place, code - zero[:, None])
            gradients = [gradient * inside, (gradient * slope).sum(1), (-step[:, None] * gradient * ~inside).sum(1)]
            norm = np.sqrt(sum((g**2).sum() for g in gradients))
            cosine = 0.05 + 0.95 * (1 + np.cos(np.pi * (number - 1) / steps)) / 2
            for index, (value, gradient, rate) in enumerate(zip(self.values, gradients, rates, strict=True)):
                gradient = gradient * min(1.0, clip / (norm + 1e-6))
                m, v = self.moments[index]
                m[:], v[:] = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
                value -= rate * cosine * (m / (1 - 0.9**number)) / (np.sqrt(v / (1 - 0.999**number)) + 1e-8)
        return first


@pytest.mark.parametrize("clip", [0.3, 1e-3])
def test_block_training_follows_the_naive_loop(clip):
    model, tokens = Chain(), windows(2, 16, vocabulary=11)
    teacher = student = model.embedding.weight.detach().double().numpy()[tokens.numpy()].reshape(-1, 32)
    expected, losses, rates, steps = [], [], (3e-3, 2e-3, 2e-3), 5
    for layer in model.layers:
        weight = layer[0].weight.detach().double().numpy()
        teacher, naive = teacher @ weight.T, NaiveLayer(weight)
        losses.append(naive.train(student, teacher, rates, steps, clip))
        student = student @ naive.quantized().T
        expected.append(naive.quantized())
    start = [NaiveLayer(layer[0].weight.detach().double().numpy()).quantized() for layer in model.layers]
    outcome = efficient_qat.quantize(model, tokens, 3.0, group_size=32, batch_size=2, epochs=steps, lr_weights=rates[0],
                                     lr_quant=rates[1], grad_clip=clip, e2e_epochs=0)
    for index, layer in enumerate(model.layers):
        found = layer[0].packed.dequantize().double().numpy()
        np.testing.assert_allclose(found, expected[index], rtol=2e-3, atol=2e-4)
        assert np.abs(found - start[index]).max() > 0.01  # training did move something
        assert outcome.notes["block_loss"][f"layers.{index}"][0] == pytest.approx(losses[index], rel=2e-3)


# ---------------------------------------------------------------------------------------- on a small Llama
@pytest.fixture(scope="module")
def trained():
    """(model, outcome) with block-wise training only, and with both stages; same seed."""
    results = {}
    for stage, epochs in (("blocks", 0), ("both", 2)):
        model = llama()
        results[stage] = model, efficient_qat.quantize(model, windows(), 3.0, **REDUCED, e2e_epochs=epochs)
    return results


def llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=172, vocab_size=128, max_position_embeddings=128,
                         initializer_range=0.1, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def test_block_training_brings_the_outputs_nearer(trained):
    from sfmp.baselines import uniform

    original, rounded, tokens = llama(), llama(), windows()
    uniform.rtn(rounded, None, 3.0, group_size=32)
    wanted = logits(original, tokens)
    model, outcome = trained["blocks"]
    assert (logits(model, tokens) - wanted).norm() < 0.8 * (logits(rounded, tokens) - wanted).norm()
    assert list(outcome.notes["block_loss"]) == ["model.layers.0", "model.layers.1"]
    assert all(after < before for before, after in outcome.notes["block_loss"].values())


def test_end_to_end_training_changes_scales_only(trained):
    (before, _), (after, outcome) = trained["blocks"], trained["both"]
    moved = 0
    for name, layer in quantized_layers(before).items():
        codes, scales, zeros = layer.packed.unpack()
        codes_after, scales_after, zeros_after = after.get_submodule(name).packed.unpack()
        assert torch.equal(codes, codes_after) and torch.equal(zeros, zeros_after)
        moved += int((scales != scales_after).sum())
    assert moved > 1000
    assert len(outcome.notes["e2e_loss"]) == 4  # two epochs of four windows, two to a step
    first, second = np.split(np.array(outcome.notes["e2e_loss"]), 2)  # the same windows in both epochs
    assert second.mean() < first.mean()


def test_stored_model_computes_what_the_trained_one_did(monkeypatch):
    tokens, seen = windows(2, seed=5), {}
    pack = efficient_qat._pack

    def spy(model, plan, linears):
        seen["trained"] = logits(model, tokens)
        pack(model, plan, linears)

    monkeypatch.setattr(efficient_qat, "_pack", spy)
    model = llama()
    efficient_qat.quantize(model, windows(), 3.0, **REDUCED)
    with keep_dequantized(model):
        torch.testing.assert_close(logits(model, tokens), seen["trained"], rtol=1e-4, atol=1e-4)


def test_bytes_are_exact_and_the_checkpoint_loads(trained, tmp_path):
    from transformers import AutoModelForCausalLM

    model, outcome = trained["both"]
    save_checkpoint(model, tmp_path / "saved")
    rows = tensor_sizes(tmp_path / "saved")
    kept = rows[rows.part.isin(["planes", "alpha", "beta"]) & rows.module.isin(quantized_layers(model))]
    assert outcome.stored_bytes == kept.bytes.sum() + len(quantized_layers(model))  # one byte of bits per matrix
    shapes = [(layer.out_features, layer.in_features) for layer in quantized_layers(model).values()]
    groups = sum(n * -(-k // 32) for n, k in shapes)
    assert outcome.stored_bytes == groups * 32 * 2 // 8 + groups * 4 + len(shapes)
    assert outcome.bpw == 3.0 and outcome.stored_bytes == sum(stored_bytes(model).values())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded, windows(1)), logits(model, windows(1)))


def test_same_seed_same_model(trained):
    for seed, same in ((0, True), (1, False)):
        model = llama()
        outcome = efficient_qat.quantize(model, windows(), 3.0, seed=seed, **REDUCED, e2e_epochs=2)
        equal = [torch.equal(tensor, trained["both"][0].get_submodule(name).packed.tensors()[key])
                 for name, layer in quantized_layers(model).items() for key, tensor in layer.packed.tensors().items()]
        assert all(equal) == same
        assert (outcome.notes == trained["both"][1].notes) == same
        assert json.loads(json.dumps(outcome.notes)) == outcome.notes


def test_costs_carry_the_published_amounts(trained):
    blocks, steps = trained["both"][1].cost.counts()
    assert blocks == {"stage": "block-wise training", "evaluations": 30, "unit": "window pass", "units": 18,
                      "full_units": 8192, "unit_scale": 2048 / 24}
    assert steps == {"stage": "end-to-end training", "evaluations": 8, "unit": "window pass", "units": 8,
                     "full_units": 4096, "unit_scale": 4096 / 24}


def test_mixed_bits_are_respected():
    model = llama()
    spec = QuantSpec(bpw=3.5, group_size=32, block_rows=16, levels=(1, 2, 5), method="awq")
    plan = make_plan(random_salience(model), spec)
    outcome = efficient_qat.quantize(model, windows(), 3.5, plan=plan, **REDUCED)
    assert outcome.plan.bpw == plan.bpw <= 3.5 and outcome.plan.spec.method == "rtn"
    largest = 0
    for name, layer in quantized_layers(model).items():
        bits = plan[name].bits
        assert np.array_equal(layer.block_bits.numpy().T, bits)
        assert np.array_equal(layer.row_perm.numpy(), plan[name].row_perm)
        codes = layer.packed.unpack()[0].numpy()
        used = np.array([[codes[i * 16:(i + 1) * 16, j * 32:(j + 1) * 32].max() for j in range(bits.shape[1])]
                         for i in range(bits.shape[0])])
        assert (used < 2 ** bits.astype(int)).all()
        largest = max(largest, used.max())
    assert largest > 7


def test_mixed_makes_the_plan_of_sfmp():
    model, tokens = llama(), windows()
    spec = QuantSpec(bpw=3.25, group_size=32, block_rows=16, levels=(2, 3, 4), method="rtn")
    expected = make_plan(fisher_salience(model, tokens), spec)
    outcome = efficient_qat.quantize(model, tokens, 3.25, mixed=True, block_rows=16, **REDUCED | {"n_windows": 2})
    assert outcome.plan.hash == expected.hash
    assert [row["stage"] for row in outcome.cost.counts()] == [
        "salience", "allocation", "block-wise training", "end-to-end training"]


def test_checkpointing_changes_no_number():
    models = []
    for again in (False, True):
        models.append(llama())
        efficient_qat.quantize(models[-1], windows(), 3.0, **REDUCED, checkpointing=again)
    assert torch.equal(logits(models[0], windows(1)), logits(models[1], windows(1)))


def test_linears_outside_the_layers_and_half_precision():
    model = llama(tie_word_embeddings=True).to(torch.bfloat16)
    spec = QuantSpec(bpw=5.0, group_size=32, block_rows=64, levels=(4,), skip=())
    plan = make_plan(random_salience(model, skip=()), spec)
    embedding = model.get_input_embeddings().weight.detach().clone()
    outcome = efficient_qat.quantize(model, windows(), 5.0, plan=plan, **REDUCED | {"e2e_epochs": 1})
    assert "lm_head" in quantized_layers(model) and len(outcome.notes["block_loss"]) == 2
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert bool(torch.isfinite(logits(model, windows(1))).all())


def test_budget_is_met_from_below():
    model = llama()
    outcome = efficient_qat.quantize(model, windows(1), 3.7, group_size=32, epochs=0, e2e_epochs=0)
    assert outcome.bpw == 3.0 and outcome.notes["knobs"]["lr_weights"] == 2e-5
    outcome = efficient_qat.quantize(llama(), windows(1), 4.0, group_size=32, epochs=0, e2e_epochs=0, lr_quant=(1, 2))
    assert outcome.bpw == 4.0 and outcome.notes["knobs"]["lr_weights"] == 1e-5
    assert outcome.notes["knobs"]["lr_quant"] == 2.0 and outcome.notes["knobs"]["e2e_lr"] == 2e-5


@pytest.mark.parametrize(("bpw", "knobs", "message"), [
    (1.5, {}, r"bpw: .*2\.\.9"),
    (3.0, {"epochs": -1}, "epochs: expected an integer >= 0"),
    (3.0, {"batch_size": 0}, "batch_size: expected"),
    (3.0, {"lr_quant": 0.0}, "lr_quant: expected a positive number"),
    (3.0, {"e2e_lr": (1e-3, 0.0)}, "e2e_lr: expected a positive number or a pair"),
    (3.0, {"lr_weights": "big"}, "lr_weights: expected a positive number"),
    (3.0, {"mixed": True, "salience": "guess"}, "salience: expected one of"),
    (3.0, {"plan": "plan"}, "plan: expected a Plan"),
    (3.0, {"lr_weights": 1e30, "lr_quant": 1e30}, "loss|finite|float16"),
])
def test_bad_input_is_named(bpw, knobs, message):
    with pytest.raises(SfmpError, match=message):
        efficient_qat.quantize(llama(), windows(2), bpw, **{"group_size": 32, "epochs": 1} | knobs)


def test_bad_windows_and_foreign_plans_are_named():
    model = llama()
    with pytest.raises(SfmpError, match=r"windows: expected \[n, seqlen\]"):
        efficient_qat.quantize(model, windows()[0], 3.0, group_size=32)
    plan = make_plan(random_salience(model), QuantSpec(bpw=3.0, group_size=32, levels=(2,)))
    with pytest.raises(SfmpError, match="plan: expected at most 2.5 bits"):
        efficient_qat.quantize(model, windows(), 2.5, plan=plan)
    with pytest.raises(SfmpError, match="expected one of them"):
        efficient_qat.quantize(model, windows(), 3.0, plan=plan, mixed=True)
    other = copy.deepcopy(model)
    other.model.layers[0].mlp.up_proj = nn.Linear(32, 172)
    with pytest.raises(SfmpError, match="up_proj: the plan expects"):
        efficient_qat.quantize(other, windows(), 3.0, plan=plan)
