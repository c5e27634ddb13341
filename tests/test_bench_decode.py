"""Decoding with packed weights: what `generate` says on the kernels, what the benchmark of it reports."""

import copy

import pytest
import torch
from cases import quantize_randomly as quantize_in_all_widths
from torch import nn
from transformers import StaticCache

from kernels_numba.cpu import targets
from sfmp import QuantSpec, SfmpError, make_plan, quantize_model
from sfmp.bench import decode, random_model
from sfmp.bench.random_model import quantize_randomly, random_network, random_packed
from sfmp.linear import SFMPLinear
from sfmp.pack import pack
from sfmp.packed import PackedMatrix

TINY = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 128, "tie_word_embeddings": False}
needs_kernels = pytest.mark.skipif(targets.detect()[0] is None, reason=targets.detect()[1])
MODES = targets.MODES.get(targets.detect()[0], ())


@pytest.mark.parametrize("bpw", [2.25, 2.5, 3, 3.5, 4, 4.25])
def test_a_random_matrix_has_the_bits_and_bytes_that_were_asked_for(bpw):
    rows, columns = 1024, 2048
    packed = random_packed(rows, columns, bpw, seed=1)
    assert packed.bpw == bpw
    words = rows * columns * (bpw - 0.25) / 32
    assert packed.nbytes == 4 * words + 2 * 2 * rows * 16 + 2 * 16 + 2 * (rows + columns)
    mixed = {2.25: {2}, 4.25: {4}}.get(bpw, {2, 3, 4})
    assert set(packed.block_bits.unique().tolist()) == mixed
    assert packed.dequantize().std() == pytest.approx(random_model.WEIGHT_STD, rel=0.05)


@pytest.mark.parametrize(("rows", "columns", "group_size", "block_rows"), [(768, 256, 128, 512), (70, 172, 64, 16),
                                                                           (33, 100, 32, 512)])
def test_a_random_matrix_is_stored_like_any_other(rows, columns, group_size, block_rows):
    packed = random_packed(rows, columns, 3.7, group_size, block_rows)
    again = PackedMatrix.from_tensors("again", packed.tensors(), shape=(rows, columns), group_size=group_size,
                                      block_rows=packed.block_rows)
    block = group_size * packed.block_rows / (rows * columns)
    assert 3.7 - block < again.bpw <= 3.7
    codes, scales, zeros = packed.unpack()
    by_codes = pack(codes, scales, zeros, packed.block_bits.T, group_size=group_size, block_rows=packed.block_rows,
                    row_perm=packed.row_perm, col_perm=packed.col_perm)
    for key, tensor in by_codes.tensors().items():
        assert torch.equal(tensor, getattr(packed, key)), key
    assert not torch.equal(packed.planes, random_packed(rows, columns, 3.7, group_size, block_rows, seed=1).planes)


def test_what_no_mixture_gives_is_refused():
    for bpw in (2, 4.5):
        with pytest.raises(SfmpError, match="2 to 4 code bits and 0.25 for scales"):
            random_packed(512, 512, bpw)
    with pytest.raises(SfmpError, match="multiple of 32"):
        random_packed(64, 64, 3, group_size=48)
    with pytest.raises(SfmpError, match="expected one of 1.1B or a dict"):
        random_network("7B")
    with pytest.raises(SfmpError, match="expected embedded or one of 1.1B"):
        decode.decoders_of("7B")


def test_random_models_keep_what_is_not_quantized():
    dense = random_network(TINY)
    model = quantize_randomly(decode.sharing(dense), 3.5, group_size=64, block_rows=16)
    kinds = {name.rpartition(".")[2]: type(module) for name, module in model.named_modules()}
    assert kinds["lm_head"] is nn.Linear and kinds["down_proj"] is kinds["q_proj"] is SFMPLinear
    assert model.lm_head.weight is dense.lm_head.weight
    assert isinstance(dense.model.layers[0].mlp.up_proj, nn.Linear), "the model that was shared is as it was"
    layers = [layer for layer in model.modules() if isinstance(layer, SFMPLinear)]
    assert decode.weight_bytes(model) == sum(layer.packed.nbytes for layer in layers) + 4 * 64 * 128
    with torch.no_grad():
        assert model(torch.arange(3, 40)[None]).logits.isfinite().all()


@pytest.fixture(scope="module")
def quantized(embedded):
    """The embedded model at 3 bpw, float32; widths by the size of the weights."""
    model = copy.deepcopy(embedded[0])
    salience = {name: module.weight.detach().square() for name, module in model.named_modules()
                if isinstance(module, nn.Linear) and name != "lm_head"}
    return quantize_model(model, make_plan(salience, QuantSpec(bpw=3, method="rtn")))


def _use(model, backend, mode=None):
    for layer in model.modules():
        if isinstance(layer, SFMPLinear):
            layer.backend, layer.mode = backend, mode
    return model


def _generate(model, prompt, mask=None, **options):
    mask = torch.ones_like(prompt) if mask is None else mask
    return model.generate(prompt, attention_mask=mask, do_sample=False, min_new_tokens=12, max_new_tokens=12, **options)


def _prompt(tokenizer, *texts):
    found = tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="left")
    return found["input_ids"], found["attention_mask"]


@needs_kernels
@pytest.mark.cpu
def test_the_kernels_generate_what_the_reference_does(quantized, embedded):
    short, long = "def add(a, b):\n", "class Stack:\n    def __init__(self, items=None):\n"
    single, padded = _prompt(embedded[1], long), _prompt(embedded[1], short, long)
    assert (padded[1] == 0).any(), "the batch has padding on the left"
    runs = [(single, {}), (padded, {}), (padded, {"cache_implementation": "static"})]
    expected = [_generate(_use(quantized, "reference"), *inputs, **options) for inputs, options in runs]
    with torch.no_grad():
        logits = quantized(*expected[1:2]).logits
    assert torch.equal(expected[1], expected[2]) and len(set(expected[0][0, -12:].tolist())) > 3
    for mode in MODES:
        _use(quantized, "cpu", mode)
        with torch.no_grad():
            error = (quantized(expected[1]).logits - logits).norm() / logits.norm()
        assert 0 < error < {"exact": 1e-5, "lut16": 1e-3, "lut8": 5e-2}[mode]
        if mode != "lut8":
            for (inputs, options), tokens in zip(runs, expected, strict=True):
                assert torch.equal(_generate(quantized, *inputs, **options), tokens), (mode, options)


@needs_kernels
@pytest.mark.cpu
def test_a_static_cache_of_ones_own(quantized, embedded):
    prompt, _ = _prompt(embedded[1], "import os\n")
    expected = _generate(_use(quantized, "cpu"), prompt)
    cache = StaticCache(config=quantized.config, max_cache_len=prompt.shape[1] + 12)
    assert torch.equal(_generate(quantized, prompt, past_key_values=cache), expected)


@needs_kernels
@pytest.mark.cpu
def test_compiled_models_compute_the_same(tiny_llama):
    fresh = _use(quantize_in_all_widths(tiny_llama), "cpu")
    used, prompt = copy.deepcopy(fresh), torch.arange(3, 11).view(2, 4)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = used(prompt).logits
        whole = torch.compile(used, backend="aot_eager", fullgraph=True)
        assert torch.equal(whole(prompt, use_cache=False).logits, expected)
        layer = fresh.model.layers[0].mlp.down_proj
        x = torch.randn(1, 1, layer.in_features)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="call the model once before it is compiled"):
            torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="aot_eager")
        assert torch.equal(compiled(x), layer(x)) and torch.equal(compiled(x), layer(x)), "it repacks on its own"
    torch._dynamo.reset()


@needs_kernels
@pytest.mark.cpu
def test_rows_say_what_was_measured(monkeypatch):
    monkeypatch.setattr(decode, "waiting", lambda: 0.0)
    dense = random_network(TINY, torch.bfloat16)
    packed = quantize_randomly(decode.sharing(dense), 3.5, group_size=64, block_rows=16)
    decoders = [decode.Decoder("tiny", "torch bf16", dense, random=True)]
    decoders += [decode.Decoder("tiny", f"sfmp {mode}", packed, mode, 3.5, random=True) for mode in MODES]
    rows = decode.measure_decode(decoders, prompt_tokens=5, new_tokens=4, rounds=2, batch=2)
    assert [row["weights"] for row in rows] == ["torch bf16", *(f"sfmp {mode}" for mode in MODES)]
    assert {row["mode"] for row in rows} == {None, *MODES} and {row["bpw"] for row in rows} == {None, 3.5}
    for row in rows:
        assert row["batch"] == row["rounds"] == 2 and row["prompt_tokens"] == 5 and row["new_tokens"] == 4
        assert row["threads"] == torch.get_num_threads() and row["counted"] == 1 and row["random"]
        assert len(row["steps"]) == 2 and min(row["steps"]) <= row["seconds_per_token"] <= max(row["steps"])
        assert row["tokens_per_second"] == pytest.approx(2 / row["seconds_per_token"])
        assert row["prefill_tokens_per_second"] == pytest.approx(10 / row["prefill_seconds"])
        assert row["generate_tokens_per_second"] == pytest.approx(8 / row["generate_seconds"])
        assert row["generate_seconds"] > row["prefill_seconds"] + 2 * row["seconds_per_token"]
        assert row["gigabytes_per_second"] * row["seconds_per_token"] == pytest.approx(row["weight_bytes"] / 1e9)
    assert rows[0]["weight_bytes"] == 2 * sum(p.numel() for m in dense.modules() if isinstance(m, nn.Linear)
                                              for p in m.parameters())
    assert rows[1]["weight_bytes"] < rows[0]["weight_bytes"] / 2


def test_steps_that_waited_for_a_processor_are_not_counted(monkeypatch):
    moments = iter(range(10**6))
    monkeypatch.setattr(decode, "waiting", lambda: float(next(moments)))
    decoder = decode.Decoder("tiny", "torch fp32", random_network(TINY), random=True)
    (row,) = decode.measure_decode([decoder], prompt_tokens=2, new_tokens=3, rounds=1)
    assert row["counted"] == 0 and row["steps"] == [None]
    missing = {key for key, value in row.items() if value is None}
    assert missing == {"mode", "bpw", "prefill_seconds", "prefill_tokens_per_second", "seconds_per_token",
                       "tokens_per_second", "generate_seconds", "generate_tokens_per_second", "gigabytes_per_second"}
    with pytest.raises(SfmpError, match="new_tokens: expected an integer >= 2, found 1"):
        decode.measure_decode([decoder], new_tokens=1)


@needs_kernels
@pytest.mark.cpu
def test_the_embedded_model_is_compared_as_it_is_quantized_for_real():
    fp32, bf16, packed = decode.decoders_of("embedded", bpw=(2.5,), modes=MODES[:1])
    assert (fp32.weights, bf16.weights, packed.weights) == ("torch fp32", "torch bf16", f"sfmp {MODES[0]}")
    assert {fp32.network.dtype, bf16.network.dtype} == {torch.float32, torch.bfloat16}
    assert packed.network.lm_head.weight.dtype == torch.bfloat16 and not packed.random
    matrices = [layer.packed for layer in packed.network.modules() if isinstance(layer, SFMPLinear)]
    weights = [matrix.shape[0] * matrix.shape[1] for matrix in matrices]
    mean = sum(matrix.bpw * count for matrix, count in zip(matrices, weights, strict=True)) / sum(weights)
    assert mean == pytest.approx(2.5, abs=0.01)
    prompt = torch.arange(10, 20)[None]
    with torch.no_grad():
        logits = [decoder.network(prompt).logits.float() for decoder in (fp32, bf16, packed)]
    assert torch.corrcoef(torch.stack([each.flatten() for each in logits])).min() > 0.7, "they are the same model"
