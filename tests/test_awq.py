"""The AWQ searches against brute force that shares no code with them."""

import naive
import numpy as np
import pytest
import torch
from torch import nn

from sfmp.awq import GRID, SHRINK, round_trip, search_clip, search_layer
from sfmp.quantize import dequantize
from sfmp.solvers import Stats, rtn
from sfmp.spec import MatrixPlan, QuantSpec
from sfmp.walk import Batch

SPEC = QuantSpec(bpw=4.0, group_size=32, block_rows=8, levels=(2, 3, 4))


def _matrix(rows, columns, seed=0, levels=(2, 3, 4)):
    generator = np.random.default_rng(seed)
    bits = generator.choice(levels, (-(-rows // 8), -(-columns // 32))).astype(np.uint8)
    return MatrixPlan(generator.permutation(rows), generator.permutation(columns), bits)


class _Block(nn.Module):
    """Norm and one linear, whose inputs have a few loud channels."""

    def __init__(self):
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(64), nn.Linear(64, 24)

    def forward(self, x):
        return self.proj(self.norm(x))


def _block():
    torch.manual_seed(0)
    block = _Block().eval()
    block.norm.weight.data[::9] = 12.0
    return block, torch.randn(300, 64)


def _oracle_round_trip(weight, matrix):
    rows, columns = matrix.row_perm, matrix.col_perm
    restored = np.empty_like(weight)
    restored[np.ix_(rows, columns)] = naive.quantize_blocks(weight[rows][:, columns], matrix.bits, 32, 8)
    return restored


def test_scale_search_finds_what_brute_force_finds():
    block, tokens = _block()
    matrix = _matrix(24, 64)
    with torch.no_grad():
        inputs = block.norm(tokens).double().numpy()
    weight = block.proj.weight.detach().double().numpy().copy()
    losses = []
    for step in range(20):
        scale = np.maximum(np.abs(inputs).mean(0) ** (step / 20), 1e-4)
        scale /= np.sqrt(scale.max() * scale.min())
        difference = _oracle_round_trip(weight * scale, matrix) / scale - weight
        losses.append(np.square(inputs @ difference.T).sum())
    batch = Batch(tokens)
    _, stats, refused = search_layer(block, {"proj": matrix}, [batch], batch, 0, SPEC, torch.float32)
    assert not refused and GRID == 20
    assert stats["proj"].notes["awq_exponent"] == pytest.approx(np.argmin(losses) / 20)
    assert min(losses) < 0.7 * losses[0]


def test_search_keeps_the_function_and_returns_full_precision_outputs():
    block, tokens = _block()
    with torch.no_grad():
        before = block(tokens)
    norm = block.norm.weight.detach().clone()
    batches = [Batch(tokens[:200]), Batch(tokens[200:])]
    plan, probe = {"proj": _matrix(24, 64)}, Batch(tokens[:8])
    outputs, _, _ = search_layer(block, plan, batches, probe, 0, SPEC, torch.float32)
    with torch.no_grad():
        after = block(tokens)
    assert not torch.allclose(block.norm.weight, norm)
    assert torch.allclose(torch.cat(outputs), before, atol=1e-6)
    assert torch.allclose(after, before, atol=1e-4)


@pytest.mark.parametrize("columns", [64, 70])
def test_clip_search_finds_what_brute_force_finds(columns):
    generator = np.random.default_rng(1)
    weight = generator.standard_t(3, (8, columns))
    tokens = generator.standard_normal((50, columns)) * generator.uniform(0.2, 3, columns)
    matrix = _matrix(8, columns, seed=1)
    lower, upper = search_clip(torch.tensor(weight).float(), torch.tensor(tokens).float(), matrix, SPEC)
    weight, tokens = weight[matrix.row_perm][:, matrix.col_perm], tokens[:, matrix.col_perm]
    clipped = 0
    for i in range(8):
        for g, start in enumerate(range(0, columns, 32)):
            group, x = weight[i, start : start + 32], tokens[:, start : start + 32]
            errors = []
            for step in range(10):
                factor = 1 - step / 20
                edges = np.array([group.min(), group.max()]) * factor
                levels = naive.naive_levels(edges, int(matrix.bits[i // 8, g]))
                nearest = levels[np.abs(group[:, None] - levels).argmin(1)]
                errors.append(np.square(x @ (nearest - group)).sum())
            found = float(upper[i, g]) / group.max()
            assert float(lower[i, g]) / group.min() == pytest.approx(found, rel=1e-5)
            # Near-ties may fall either way in float32: what is found must be as good as the best.
            assert errors[round((1 - found) * 20)] <= min(errors) * 1.001 + 1e-9
            clipped += found < 0.99
    assert clipped > 4 and len(SHRINK) == 10


def test_clipping_lowers_the_output_error():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(16, 64, generator=generator) ** 3  # heavy tails
    tokens, matrix = torch.randn(200, 64, generator=generator), _matrix(16, 64, levels=(2,))
    lower, upper = search_clip(weight, tokens, matrix, SPEC)

    def error(stats):
        permuted = weight[matrix.row_perm][:, matrix.col_perm]
        difference = dequantize(rtn(weight, stats, matrix, SPEC)) - permuted
        return float((tokens[:, matrix.col_perm] @ difference.T).square().sum())

    assert error(Stats(lower=lower, upper=upper)) < 0.9 * error(None)


def test_query_and_key_are_not_clipped(tiny_llama):
    layer = tiny_llama.model.layers[0]
    plan = {n: _matrix(*m.weight.shape) for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
    x = torch.randn(2, 16, 64)
    rotary = tiny_llama.model.rotary_emb(x, position_ids=torch.arange(16)[None])
    batch = Batch(x, [(0, (None,), {"position_embeddings": rotary, "attention_mask": None})])
    _, stats, _ = search_layer(layer, plan, [batch], batch, 0, SPEC, torch.float32)
    unclipped = {name for name in stats if stats[name].lower is None}
    assert unclipped == {"self_attn.q_proj", "self_attn.k_proj"}
    assert all("awq_exponent" in stats[name].notes for name in stats)


def test_defect_12_names_are_compared_whole():
    """METHOD 1.12 #12: tests such as "q_" in name also caught layers that only sound like a query or a key."""
    layer = nn.Sequential()
    for name in ("seq_proj", "query_mixer", "k_proj_out"):
        layer.add_module(name, nn.Linear(32, 32))
    plan, batch = {name: _matrix(32, 32) for name, _ in layer.named_children()}, Batch(torch.randn(40, 32))
    _, stats, _ = search_layer(layer, plan, [batch], batch, 0, SPEC, torch.float32)
    assert all(found.lower is not None for found in stats.values())


def test_round_trip_uses_permutation_and_bit_map():
    weight, matrix = np.random.default_rng(3).standard_normal((24, 64)), _matrix(24, 64, seed=3)
    got = round_trip(torch.tensor(weight).float(), matrix, SPEC).numpy()
    assert np.allclose(got, _oracle_round_trip(weight, matrix), atol=1e-5)
