"""Matrices that read the same activations are found by watching, and only they get one column order."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import sfmp
from sfmp import QuantSpec, make_plan, quantize_model
from sfmp.allocate import block_problem
from sfmp.baselines.guided import guided_salience
from sfmp.linear import SFMPLinear
from sfmp.readers import InputRecord, Salience
from sfmp.salience import (
    activation_salience,
    fisher_salience,
    load_salience,
    magnitude_salience,
    random_salience,
    salience_meta,
    save_salience,
)
from sfmp.spec import Plan, SfmpError

SMALL = dict(group_size=32, block_rows=16)
TOGETHER = [{f"model.layers.{i}.{name}" for name in names} for i in (0, 1) for names in (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"),
    ("self_attn.o_proj",), ("mlp.down_proj",))]


def _windows(count=2, length=12):
    return torch.randint(0, 128, (count, length), generator=torch.Generator().manual_seed(0))


def _comparable(model):
    """Random salience, so that no matrix of a group outweighs the others, with the record of a real one."""
    record, rng = fisher_salience(model, _windows()), np.random.default_rng(0)
    values = {name: rng.lognormal(0, 2, matrix.shape).astype(np.float32) for name, matrix in record.items()}
    return Salience(values, record.readers)


def _groups(model, *samples, skip=()):
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    record = InputRecord(layers)
    with record, torch.no_grad():
        for sample in samples:
            model(sample)
    assert not any(layer._forward_pre_hooks for layer in layers.values())
    return [set(group) for group in record.groups()]


class Block(nn.Module):
    """Every way of handing on an input: the same tensor, a changed one, an equal one, some tokens, a keyword."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        if self.way == "the same":
            return self.a(x) + self.b(input=x) + self.c(x)
        if self.way == "changed in place":
            x = x.clone()
            first = self.a(x)
            return first + self.b(x.mul_(2)) + self.c(x)
        if self.way == "equal":
            return self.a(x) + self.b(x.clone()) + self.c(x + 0)
        if self.way == "sometimes":
            return self.a(x) + self.b(x if len(x) > 4 else x.clone()) + self.c(x)
        if self.way == "twice":  # c reads x, but something else too
            return self.a(x) + self.b(x) + self.c(self.c(x))
        some = x[x[:, 0] > 0]  # two projections of an expert that only some tokens reach; c is of one that none does
        return self.a(some) + self.b(some)


@pytest.mark.parametrize("way, expected", [
    ("the same", [{"a", "b", "c"}]), ("changed in place", [{"a"}, {"b", "c"}]), ("equal", [{"a"}, {"b"}, {"c"}]),
    ("sometimes", [{"a", "c"}, {"b"}]), ("twice", [{"a", "b"}, {"c"}]), ("some tokens", [{"a", "b"}, {"c"}])])
def test_the_very_same_tensor_at_every_call_makes_a_group(way, expected):
    torch.manual_seed(0)
    assert _groups(Block(way), torch.randn(8, 8), torch.randn(3, 8), torch.randn(8, 8)) == expected
    with torch.inference_mode():
        assert len(_groups(Block("the same"), torch.randn(8, 8))) == 1


def test_addresses_that_are_used_again_are_no_groups():
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(12)))  # every input dies at once
    assert _groups(model, torch.randn(4, 8), torch.randn(4, 8)) == [{str(i)} for i in range(12)]


class Experts(nn.Module):
    """A fused projection that reads alone, then experts: all on one input, or each on the tokens sent to it."""

    def __init__(self, routed):
        super().__init__()
        self.routed, self.qkv = routed, nn.Linear(32, 32)
        self.gate, self.up, self.down = (nn.ModuleList(nn.Linear(32, 32) for _ in range(3)) for _ in range(3))

    def forward(self, x):
        x = self.qkv(x).tanh()
        total = torch.zeros_like(x)
        for i in range(3):
            sent = torch.arange(len(x)) % 3 == i if self.routed else torch.ones(len(x), dtype=torch.bool)
            tokens = x[sent] if self.routed else x
            total[sent] += self.down[i](self.gate[i](tokens).sigmoid() * self.up[i](tokens))
        return total


@pytest.mark.parametrize("routed", [False, True])
def test_experts_share_what_they_are_all_given(routed):
    samples, model = [torch.randn(7, 32), torch.randn(5, 32)], Experts(routed)
    names = [[f"gate.{i}", f"up.{i}"] for i in range(3)]
    expected = [set(pair) for pair in names] if routed else [set(sum(names, []))]
    alone = [{"qkv"}, *({f"down.{i}"} for i in range(3))]
    found = fisher_salience(model, samples, loss_fn=lambda m, x: m(x).square().mean())
    groups = [set(group) for group in found.readers]
    assert sorted(map(sorted, groups)) == sorted(map(sorted, expected + alone))
    plan = make_plan(found, QuantSpec(bpw=4.0, shared_columns=True, **SMALL))
    for name in plan:
        same = {other for other in plan if np.array_equal(plan[other].col_perm, plan[name].col_perm)}
        assert same == next(group for group in groups if name in group)


@pytest.mark.parametrize("source", [fisher_salience, activation_salience, guided_salience])
def test_salience_of_data_says_who_reads_together(tiny_llama, source, tmp_path):
    found = source(tiny_llama, _windows())
    assert sorted(map(sorted, found.readers)) == sorted(map(sorted, TOGETHER))
    save_salience(found, tmp_path / "s.safetensors", {"source": "x"})
    assert load_salience(tmp_path / "s.safetensors").readers == found.readers
    assert salience_meta(tmp_path / "s.safetensors") == {"source": "x"}
    kept = copy.deepcopy(found)
    assert kept.readers == found.readers and list(kept) == list(found)


def test_orders_are_shared_exactly_where_inputs_are(tiny_llama):
    salience = _comparable(tiny_llama)
    own, shared = (make_plan(salience, QuantSpec(bpw=4.0, shared_columns=on, **SMALL)) for on in (False, True))
    for group in TOGETHER:
        total = sum(salience[name].sum(0, dtype=np.float64) for name in sorted(group))
        for name in group:
            assert np.array_equal(shared[name].col_perm, np.argsort(-total, kind="stable"))
            assert np.array_equal(shared[name].row_perm, own[name].row_perm)
            assert (len(group) == 1) == np.array_equal(shared[name].col_perm, own[name].col_perm)
    assert len({shared[name].col_perm.tobytes() for name in shared}) == len(TOGETHER)
    gate, up = (shared[f"model.layers.0.mlp.{part}_proj"] for part in ("gate", "up"))
    assert not np.array_equal(gate.bits, up.bits) and not np.array_equal(gate.row_perm, up.row_perm)
    again = make_plan(Salience(dict(reversed(salience.items())), reversed(salience.readers)), shared.spec)
    assert again.hash == shared.hash != own.hash


@pytest.mark.parametrize("levels", [(2, 3, 4), "auto", (1, 2, 8)])
@pytest.mark.parametrize("objective", ["paper", "measured"])
def test_the_budget_is_met(tiny_llama, levels, objective):
    salience = fisher_salience(tiny_llama, _windows())
    spec = QuantSpec(bpw=3.7, levels=levels, objective=objective, shared_columns=True, **SMALL)
    plan, grids = make_plan(salience, spec, tiny_llama), block_problem(salience, spec, tiny_llama).grids
    used = sum(int((grids[name].weights * plan[name].bits).sum()) for name in plan)
    budget = spec.budget_bits(sum(int(grid.weights.sum()) for grid in grids.values()))
    candidates = spec.candidate_levels
    assert budget - 16 * 32 * (candidates[-1] - candidates[0]) < used <= budget


def test_matrices_that_are_not_planned_have_no_say(tiny_llama):
    salience = _comparable(tiny_llama)
    options = dict(bpw=4.0, shared_columns=True, **SMALL)
    everyone = make_plan(salience, QuantSpec(**options))
    fewer = make_plan(salience, QuantSpec(skip=("q_proj", "k_proj"), **options))
    alone, gate = "model.layers.0.self_attn.v_proj", "model.layers.0.mlp.gate_proj"
    own = np.argsort(-salience[alone].sum(0, dtype=np.float64), kind="stable")
    assert np.array_equal(fewer[alone].col_perm, own) and not np.array_equal(everyone[alone].col_perm, own)
    assert np.array_equal(fewer[gate].col_perm, everyone[gate].col_perm)


@pytest.mark.parametrize("reorder", ["both", "rows", "cols", "none"])
def test_only_an_order_of_columns_is_shared(tiny_llama, reorder):
    salience = _comparable(tiny_llama)
    own, shared = (make_plan(salience, QuantSpec(bpw=4.0, reorder=reorder, shared_columns=on, **SMALL))
                   for on in (False, True))
    same = all(np.array_equal(own[name].col_perm, shared[name].col_perm) for name in own)
    assert same == (reorder in ("rows", "none"))
    assert all(np.array_equal(own[name].row_perm, shared[name].row_perm) for name in own)


def test_the_weights_are_the_same_up_to_their_rounding(tiny_llama):
    """At 8 bits nothing but the order is left: the layers compute with what they replace, in natural order."""
    windows, original = _windows(), copy.deepcopy(tiny_llama)
    spec = QuantSpec(bpw=9.0, levels=(8,), method="rtn", shared_columns=True, **SMALL)
    quantize_model(tiny_llama, make_plan(fisher_salience(tiny_llama, windows), spec))
    for name, layer in tiny_llama.named_modules():
        if isinstance(layer, SFMPLinear):
            weight, x = original.get_submodule(name).weight, torch.randn(3, layer.in_features)
            assert (layer.dequantize() - weight).norm() < 5e-3 * weight.norm()
            assert torch.allclose(layer(x), nn.functional.linear(x, layer.dequantize()), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        expected = original(windows).logits
        assert (tiny_llama(windows).logits - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_checkpoints_keep_the_option_and_the_orders(tiny_llama, method, tmp_path):
    from transformers import AutoModelForCausalLM

    windows = _windows(4)
    spec = QuantSpec(bpw=4.0, method=method, shared_columns=True, **SMALL)
    plan = make_plan(fisher_salience(tiny_llama, windows), spec)
    plan.save(tmp_path / "plan.safetensors")
    assert Plan.load(tmp_path / "plan.safetensors").spec == spec
    quantize_model(tiny_llama, plan, windows)
    tiny_llama.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert config["spec"]["shared_columns"] is True and config["plan_hash"] == plan.hash
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name in plan:
        assert np.array_equal(loaded.get_submodule(name).packed.col_perm.numpy(), plan[name].col_perm)
    with torch.no_grad():
        assert torch.equal(loaded(windows).logits, tiny_llama(windows).logits)


def test_plans_without_it_are_those_of_before_it_existed(tmp_path):
    """Literals: written by the version that had no such option."""
    rng = np.random.default_rng(5)
    salience = {name: rng.integers(0, 1000, (rows, 96)).astype(np.float32) for name, rows in (("a.q", 48), ("a.k", 32))}
    plan = make_plan(salience, QuantSpec(bpw=4.0, group_size=32, block_rows=16))
    assert plan.hash == "fe75fb316ad077af744d94d514d5a92e92d0c44ad32f5a7dd3859eb55b06dadb"
    assert json.dumps(QuantSpec().to_dict()) == (
        '{"bpw": 3.0, "group_size": 128, "block_rows": 512, "levels": [2, 3, 4], "reorder": "both", "method": "awq", '
        '"scope": "global", "objective": "paper", "skip": ["lm_head"], "seed": 0}')
    assert QuantSpec.from_dict(QuantSpec().to_dict()).shared_columns is False
    on = QuantSpec(shared_columns=True)
    assert QuantSpec.from_dict(json.loads(json.dumps(on.to_dict()))) == on != QuantSpec()
    recorded = Salience(salience, [("a.q", "a.k")])
    assert make_plan(recorded, plan.spec).hash == plan.hash
    save_salience({name: torch.from_numpy(s) for name, s in salience.items()}, tmp_path / "plain.safetensors")
    assert b"readers" not in (tmp_path / "plain.safetensors").read_bytes()
    assert load_salience(tmp_path / "plain.safetensors").readers is None


def test_salience_without_a_record_says_what_to_do(tiny_llama):
    spec, found = QuantSpec(bpw=4.0, shared_columns=True, **SMALL), fisher_salience(tiny_llama, _windows())
    name = "model.layers.0.mlp.up_proj"
    for salience in (magnitude_salience(tiny_llama), random_salience(tiny_llama), dict(found)):
        with pytest.raises(SfmpError, match="record of which matrices.*compute it again.*leave shared_columns off"):
            make_plan(salience, spec)
    partial = [group for group in found.readers if name not in group]
    with pytest.raises(SfmpError, match="found none of model.layers.0.mlp.(gate|up)_proj"):
        make_plan(Salience(found, partial), spec)
    wrong = [found.readers[0] + ("model.layers.0.mlp.down_proj",), *found.readers]
    with pytest.raises(SfmpError, match="as many columns, found .*down_proj 172"):
        make_plan(Salience(found, wrong), spec)
    # What the message advises works: the record of a few forward passes beside any salience.
    advised = Salience(magnitude_salience(tiny_llama), activation_salience(tiny_llama, _windows()[:1]).readers)
    orders = {make_plan(advised, spec)[f"model.layers.0.mlp.{part}_proj"].col_perm.tobytes() for part in ("gate", "up")}
    assert len(orders) == 1
    with pytest.raises(SfmpError, match="shared_columns: expected one of False, True, found 1"):
        QuantSpec(shared_columns=1)


def test_importing_the_allocation_still_loads_no_torch():
    import subprocess
    import sys

    code = "import sys, sfmp.allocate, sfmp.reorder\nassert 'torch' not in sys.modules"
    folder = next(iter(sfmp.__path__)) + "/.."
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
