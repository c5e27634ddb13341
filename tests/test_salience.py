"""Salience equals a per-sample oracle, holds one gradient at a time, and leaves the model as found."""

import copy
import weakref

import naive
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sfmp import salience as module
from sfmp.salience import (
    SALIENCE_SOURCES,
    activation_salience,
    fisher_salience,
    load_salience,
    magnitude_salience,
    random_salience,
    salience_meta,
    save_salience,
)
from sfmp.spec import SfmpError


def token_windows(count, length=16, seed=0):
    return torch.randint(0, 128, (count, length), generator=torch.Generator().manual_seed(seed))


def class_loss(model, sample):
    inputs, label = sample
    return nn.functional.cross_entropy(model(inputs[None]), label[None])


def classifier(sizes=(12, 20, 5), seed=0):
    """A ReLU network and eight labelled samples."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), nn.ReLU())]
        model = nn.Sequential(*layers[:-1])
        samples = [(torch.randn(sizes[0]), torch.randint(0, sizes[-1], ())) for _ in range(8)]
    return model, samples


def autograd_oracle(model, samples, loss_fn, names):
    """Whole gradients of every parameter, one sample after the other, squared in float64."""
    weights = {name: model.get_submodule(name).weight for name in names}
    sums = {name: torch.zeros(w.shape, dtype=torch.float64) for name, w in weights.items()}
    for sample in samples:
        gradients = torch.autograd.grad(loss_fn(model, sample), list(weights.values()))
        for name, gradient in zip(names, gradients, strict=True):
            sums[name] += gradient.double() ** 2
    return sums


def assert_close(found, expected):
    assert set(found) == set(expected)
    for name, value in found.items():
        assert value.dtype == torch.float32 and value.device.type == "cpu"
        scale = float(expected[name].max())
        np.testing.assert_allclose(value.numpy(), expected[name].numpy(), rtol=1e-3, atol=1e-6 * scale)


LLAMA = [f"model.layers.{i}.{p}" for i in (0, 1) for p in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]


def test_llama_equals_autograd_of_one_window_at_a_time(tiny_llama):
    windows = token_windows(4)
    found = fisher_salience(tiny_llama, windows)
    assert list(found) == LLAMA  # the tied lm_head is skipped, grouped-query k and v are covered
    assert found["model.layers.0.self_attn.k_proj"].shape == (32, 64)
    assert_close(found, autograd_oracle(tiny_llama, windows, module.causal_lm_loss, LLAMA))
    batched = tiny_llama(input_ids=windows, labels=windows).loss
    gradient = torch.autograd.grad(batched, tiny_llama.model.layers[0].mlp.up_proj.weight)[0]
    summed = found["model.layers.0.mlp.up_proj"]
    assert not torch.allclose(summed, 16 * gradient**2, rtol=0.1)  # not the square of a mean


def test_mlp_equals_backpropagation_by_hand():
    model, samples = classifier()
    found = fisher_salience(model, samples, loss_fn=class_loss)
    weights = [model[i].weight.detach().double().numpy() for i in (0, 2)]
    biases = [model[i].bias.detach().double().numpy() for i in (0, 2)]
    inputs, labels = ([s[k].numpy() for s in samples] for k in (0, 1))
    expected = naive.mlp_fisher(weights, biases, inputs, labels)
    assert_close(found, {n: torch.from_numpy(e) for n, e in zip(("0", "2"), expected, strict=True)})


@pytest.mark.parametrize("form", [
    lambda w: w.numpy(), lambda w: w.to(torch.int32), list, lambda w: [row[None] for row in w],
    lambda w: w.tolist(), lambda w: w.numpy().astype(np.uint16), iter,
])
def test_windows_come_in_any_form_of_token_ids(tiny_llama, form):
    windows = token_windows(2)
    expected, found = fisher_salience(tiny_llama, windows), fisher_salience(tiny_llama, form(windows))
    assert all(torch.equal(found[name], expected[name]) for name in LLAMA)


@pytest.mark.parametrize("windows, message", [
    (token_windows(2)[None], r"window: expected token ids \[seqlen\] of one sequence, found shape \(2, 16\)"),
    (torch.rand(2, 16), "window: expected integer token ids, found torch.float32"),
    (token_windows(2) + 100, r"window: expected token ids within 0..127, found .*another tokenizer"),
    ([{"input_ids": token_windows(1)}], "window: expected a tensor, an array or .*found dict"),
])
def test_windows_that_are_no_sequence_are_refused(tiny_llama, windows, message):
    for source in (fisher_salience, activation_salience):
        with pytest.raises(SfmpError, match=message):
            source(tiny_llama, windows)


def test_a_model_without_token_ids_wants_a_loss():
    with pytest.raises(SfmpError, match=r"found Sequential; pass loss_fn\(model, window\)"):
        fisher_salience(classifier()[0], token_windows(1))


def test_sum_over_windows_not_mean(tiny_llama):
    windows = token_windows(3)
    whole = fisher_salience(tiny_llama, windows)
    parts = [fisher_salience(tiny_llama, windows[i : i + 1]) for i in range(3)]
    assert_close(whole, {n: sum(p[n] for p in parts) for n in whole})


def test_untied_head_and_tied_head_when_not_skipped(tiny_llama):
    windows = token_windows(2)
    found = fisher_salience(tiny_llama, windows, skip=())
    assert_close(found, autograd_oracle(tiny_llama, windows, module.causal_lm_loss, [*LLAMA, "lm_head"]))


def test_a_weight_used_twice_gets_the_gradient_of_both_uses():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.other, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)
            self.again = self.first  # the same module
            self.other.weight = self.first.weight  # the same parameter in another module

        def forward(self, x):
            return self.out(self.again(torch.tanh(self.other(torch.tanh(self.first(x))))))

    torch.manual_seed(0)
    model, samples = Shared(), [(torch.randn(6), torch.tensor(i % 5)) for i in range(4)]
    found = fisher_salience(model, samples, loss_fn=class_loss)
    assert list(found) == ["first", "other", "out"]
    oracle = autograd_oracle(model, samples, class_loss, ["first", "out"])
    assert_close(found, {**oracle, "other": oracle["first"]})


def test_skip_by_last_component_and_by_full_name(tiny_llama):
    windows = token_windows(1)
    names = fisher_salience(tiny_llama, windows, skip=("down_proj", "model.layers.0.mlp.up_proj", "lm_head"))
    gone = {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.0.mlp.up_proj"}
    assert set(names) == set(LLAMA) - gone
    similar = random_salience(tiny_llama, skip=("proj", "model.layers.0.mlp.up", "p_proj", "lm_head"))
    assert list(similar) == LLAMA  # a part of a name is no name


def test_one_gradient_alive_at_a_time(tiny_llama):
    windows, alive = token_windows(2), []

    def count(_):
        alive.append(sum(p.grad is not None for p in tiny_llama.parameters()))

    handles = [p.register_post_accumulate_grad_hook(count) for p in tiny_llama.parameters()]
    fisher_salience(tiny_llama, windows)
    for handle in handles:
        handle.remove()
    assert alive == [1] * (len(LLAMA) * 2)  # and none at all for embeddings, norms and the head


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside the block that are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known | inputs:
                    self.known.add(storage._cdata)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return result

    def freed(self, key, size):
        self.known.discard(key)
        self.live -= size


def test_peak_memory_is_accumulators_and_one_gradient_and_activations():
    sizes = (256,) * 9 + (8,)  # eight equal matrices of 256 KiB; activations are 1 KiB a layer
    model, samples = classifier(sizes)
    one, accumulators = 4 * 256 * 256, 4 * (8 * 256 * 256 + 8 * 256)
    activations = 1 << 15

    with LiveBytes() as keeping_all:
        class_loss(model, samples[0]).backward()
    assert keeping_all.peak >= 8 * one  # the meter sees what a plain backward pass keeps
    model.zero_grad()

    with LiveBytes() as streamed:
        fisher_salience(model, samples, loss_fn=class_loss)
    assert accumulators <= streamed.peak <= accumulators + one + activations


def test_model_is_left_as_found(tiny_llama):
    model = tiny_llama.train()
    model.model.layers[0].mlp.eval()
    frozen = model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    kept = model.model.norm.weight
    kept.grad = torch.ones_like(kept)
    model.config.use_cache = True
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    found = fisher_salience(model, token_windows(1))
    assert found["model.layers.1.mlp.up_proj"].max() > 0  # frozen by its owner, measured all the same
    assert [m.training for m in model.modules()] == modes and model.config.use_cache is True
    still_frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert still_frozen == ["model.layers.1.mlp.up_proj.weight"]
    assert frozen.grad is None and torch.equal(kept.grad, torch.ones_like(kept))
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["model.norm.weight"]
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_model_is_left_as_found_after_an_error(tiny_llama):
    def broken(model, window):
        raise KeyError("inside")

    tiny_llama.train()
    with pytest.raises(KeyError, match="inside"):
        fisher_salience(tiny_llama, token_windows(1), loss_fn=broken)
    assert tiny_llama.training and all(p.requires_grad for p in tiny_llama.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in tiny_llama.parameters())


def test_dropout_is_off_and_no_grad_of_the_caller_is_harmless():
    model, samples = classifier()
    expected = fisher_salience(model, samples, loss_fn=class_loss)
    noisy = nn.Sequential(model[0], nn.ReLU(), nn.Dropout(0.5), model[2]).train()
    with torch.no_grad():
        found = fisher_salience(noisy, samples, loss_fn=class_loss)
    assert torch.equal(found["0"], expected["0"]) and torch.equal(found["3"], expected["2"])


def test_defect_1_bfloat16_models_accumulate_in_float32():
    # METHOD.md 1.12 #1: in bfloat16, 1000 equal terms stop adding up at 256.
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).bfloat16()
    ones = torch.ones(4, dtype=torch.bfloat16)
    found = fisher_salience(model, [ones] * 1000, loss_fn=lambda m, x: m(x).sum())
    assert torch.equal(found["0"], torch.full((3, 4), 1000.0))


def test_an_unused_layer_is_zero_and_said_to_be():
    model, samples = classifier()
    model.add_module("spare", nn.Linear(5, 5))
    with pytest.warns(UserWarning, match="spare"):
        found = fisher_salience(model, samples, loss_fn=lambda m, s: class_loss(m[:3], s))
    assert found["spare"].max() == 0 and found["0"].max() > 0


def test_nan_weights_and_windows_are_named(tiny_llama):
    windows = token_windows(3)

    def loss(model, window):
        value = module.causal_lm_loss(model, window)
        return value * float("nan") if torch.equal(window, windows[1]) else value

    with pytest.raises(SfmpError, match="loss of window 1: expected a finite number, found nan"):
        fisher_salience(tiny_llama, windows, loss_fn=loss)
    # The loss is finite, but its gradient overflows when it is squared.
    with pytest.raises(SfmpError, match=r"model.layers.*infinite of"):
        fisher_salience(tiny_llama, windows, loss_fn=lambda m, w: module.causal_lm_loss(m, w) * 1e30)


@pytest.mark.parametrize("loss, message", [
    (lambda m, s: torch.tensor(1.0), "depends on a linear weight"),
    (lambda m, s: 1.0, "depends on a linear weight"),
    (lambda m, s: m(s[0]), "expected a scalar"),
])
def test_useless_losses_are_refused(loss, message):
    model, samples = classifier()
    with pytest.raises(SfmpError, match=message):
        fisher_salience(model, samples, loss_fn=loss)


def test_missing_parts_are_named(tiny_llama):
    model, samples = classifier()
    with pytest.raises(SfmpError, match="expected at least one sample"):
        fisher_salience(model, [], loss_fn=class_loss)
    with pytest.raises(SfmpError, match="expected at least one nn.Linear"):
        fisher_salience(nn.Sequential(nn.ReLU()), samples, loss_fn=class_loss)
    with pytest.raises(SfmpError, match=r"pass loss_fn"):
        fisher_salience(Headless(), token_windows(1))


class Headless(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(2, 2)

    def forward(self, input_ids, labels):
        return self.proj.weight.sum()


def test_magnitude_is_the_absolute_weight(tiny_llama):
    found = magnitude_salience(tiny_llama)
    weights = {name: tiny_llama.get_submodule(name).weight.detach() for name in LLAMA}
    assert list(found) == LLAMA
    assert all(torch.equal(found[name], weight.abs()) for name, weight in weights.items())
    found[LLAMA[0]].zero_()
    assert weights[LLAMA[0]].abs().max() > 0  # not a view of the model


def test_activation_salience_is_weight_times_rms_of_the_column(tiny_llama):
    windows, seen = token_windows(3), []
    name = "model.layers.1.mlp.down_proj"
    layer = tiny_llama.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].detach()[0]))
    with torch.no_grad():
        for window in windows:
            tiny_llama(input_ids=window[None])
    handle.remove()
    rms = torch.cat(seen).double().square().mean(0).sqrt()
    found = activation_salience(tiny_llama, windows)
    np.testing.assert_allclose(found[name].numpy(), (layer.weight.abs() * rms).detach().numpy(), rtol=1e-5)
    assert list(found) == LLAMA and not layer._forward_pre_hooks

    model, samples = classifier()
    found = activation_salience(model, samples, forward=lambda m, s: m(s[0]))
    rms = torch.stack([s[0] for s in samples]).square().mean(0).sqrt()
    assert torch.allclose(found["0"], model[0].weight.abs() * rms, rtol=1e-5)
    with pytest.raises(SfmpError, match="0: expected inputs"):
        activation_salience(model, [], forward=lambda m, s: m(s[0]))


def test_random_salience_depends_on_seed_and_name_only(tiny_llama):
    first, again, other = (random_salience(tiny_llama, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[n], again[n]) and not torch.equal(first[n], other[n]) for n in LLAMA)
    fewer = random_salience(tiny_llama, 0, skip=("lm_head", "q_proj"))
    assert all(torch.equal(first[n], fewer[n]) for n in fewer)
    same_shape = [first[n] for n in LLAMA if n.endswith("q_proj")]
    assert not torch.equal(*same_shape) and 0.45 < same_shape[0].mean() < 0.55


def test_every_source_has_one_signature(tiny_llama):
    windows = token_windows(1)
    for name, source in SALIENCE_SOURCES.items():
        found = source(tiny_llama, windows, seed=3, skip=("lm_head",))
        assert list(found) == LLAMA, name
        assert all(v.dtype == torch.float32 and (v >= 0).all() for v in found.values())
    assert torch.equal(SALIENCE_SOURCES["random"](tiny_llama, windows, seed=3)[LLAMA[0]],
                       random_salience(tiny_llama, 3)[LLAMA[0]])


def test_file_round_trip_is_exact_and_byte_identical(tmp_path):
    salience = {"b": torch.rand(3, 4) * 1e-30, "a.q": torch.rand(5, 2).t()}
    shared = {**salience, "c": salience["b"]}  # tied weights share storage
    save_salience(shared, tmp_path / "one.safetensors", {"source": "fisher", "n": 3})
    loaded = load_salience(tmp_path / "one.safetensors")
    assert all(torch.equal(loaded[name], shared[name]) for name in shared) and len(loaded) == 3
    assert salience_meta(tmp_path / "one.safetensors") == {"source": "fisher", "n": 3}
    save_salience(loaded, tmp_path / "two.safetensors", {"n": 3, "source": "fisher"})
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("value, shown", [
    (float("nan"), "1 NaN of 6"), (float("inf"), "1 infinite of 6"), (-1.0, "1 negative of 6")])
def test_bad_salience_is_refused_on_saving_and_on_loading(tmp_path, value, shown):
    from safetensors.torch import save_file

    bad = {"good": torch.ones(2, 3), "layer.q": torch.ones(2, 3)}
    bad["layer.q"][1, 2] = value
    path = tmp_path / "s.safetensors"
    with pytest.raises(SfmpError, match=f"layer.q: .*{shown}"):
        save_salience(bad, path)
    assert not path.exists()
    save_file(bad, path, metadata={"sfmp_salience": '{"format_version": 1}'})
    with pytest.raises(SfmpError, match=f"layer.q: .*{shown}"):
        load_salience(path)


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "s.safetensors"
    save_file({"w": torch.ones(2, 3)}, path)
    with pytest.raises(SfmpError, match="written by save_salience"):
        load_salience(path)
    save_file({"w": torch.ones(2, 3)}, path, metadata={"sfmp_salience": '{"format_version": 9}'})
    with pytest.raises(SfmpError, match="format_version 1"):
        load_salience(path)
    path.write_bytes(b"not a tensor file")
    with pytest.raises(SfmpError, match="damaged"):
        load_salience(path)
    save_salience({"w": torch.ones(2)[None]}, path)
    with pytest.raises(SfmpError, match=r"\[N, K\]"):
        save_salience({"w": torch.ones(2)}, path)


def test_float16_models_are_warned_about(tiny_llama):
    with pytest.warns(UserWarning, match="underflow"):
        fisher_salience(tiny_llama.half(), torch.arange(16)[None])
