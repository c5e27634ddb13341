"""Decoding with a static cache: the tokens of `generate`, and the same work at any position.

A CUDA graph replays operations with the addresses and numbers they had when it was captured. `Tape` does that on the
CPU: it notes one step as torch's dispatcher sees it, and runs the notes again.
"""

import copy

import pytest
import torch
from tape import Tape, stand_in
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from kernels_numba.cpu import targets
from sfmp import SfmpError, fuse
from sfmp.bench import decode_models
from sfmp.bench.random_model import quantize_randomly, random_network
from sfmp.bench.static_decode import StaticDecoder
from sfmp.linear import SFMPLinear

needs_kernels = [pytest.mark.cpu, pytest.mark.skipif(targets.detect()[0] is None, reason=targets.detect()[1])]
TINY = decode_models.MODELS["tiny"]
TOKENS = 10


def _prompt(tokens, seed=0, vocabulary=128):
    return torch.randint(3, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(seed))


def _generated(model, prompt):
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, min_new_tokens=TOKENS,
                           max_new_tokens=TOKENS)
    return found[:, prompt.shape[1]:]


def _models(embedded):
    """Dense, with norms of queries and keys, packed on both backends, fused, and a trained model."""
    yield "dense", random_network(TINY)
    yield "qwen3", random_network({**TINY, "model_type": "qwen3"}, seed=1)
    for backend in ("reference", "cpu"):
        if backend == "cpu" and targets.detect()[0] is None:
            continue
        packed = quantize_randomly(random_network(TINY), 4.0, 32, 32, shared_columns=True)
        for layer in packed.modules():
            if isinstance(layer, SFMPLinear):
                layer.backend = backend
        yield f"packed {backend}", copy.deepcopy(packed)
        assert len(fuse.fuse(packed).fused) == 4
        yield f"fused {backend}", packed
    yield "embedded", embedded[0]


def test_a_static_loop_says_what_generate_does(embedded):
    for name, model in _models(embedded):
        decoder, varied = StaticDecoder(model, 9, TOKENS), 0
        for length in (9, 4, 1):  # one cache, several prompts
            prompt = _prompt(length, length)
            decoder.start(prompt)
            decoder.run(TOKENS - 1, graph=False)
            expected = _generated(model, prompt)
            assert torch.equal(decoder.tokens(), expected), (name, length)
            varied = max(varied, len(set(expected[0].tolist())))
        assert varied > 3, f"{name}: these tokens would be right by chance"


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=needs_kernels)])
def test_a_step_that_was_recorded_once_decodes_from_any_position(packed):
    model = random_network(TINY)
    if packed:
        quantize_randomly(model, 4.0, 32, 32, shared_columns=True)
        assert fuse.fuse(model).fused
    decoder, tape = StaticDecoder(model, 12, TOKENS), Tape()
    decoder.start(_prompt(5))
    decoder.run(2, graph=False)
    with tape:
        decoder.step()
    assert not any("_local_scalar_dense" in str(function) for function, *_ in tape.operations), "nothing is read back"
    decoder.replay = tape.replay
    said = []
    for length in (12, 5, 2):
        prompt = _prompt(length, length)
        decoder.start(prompt)
        decoder.run(TOKENS - 1, graph=True)
        said.append(decoder.tokens())
        assert torch.equal(said[-1], _generated(model, prompt)), length
    assert len({tuple(tokens[0].tolist()) for tokens in said}) == 3


def test_a_captured_step_decodes_from_any_position(monkeypatch):
    model = random_network(TINY)
    captured, decoder = stand_in(monkeypatch), StaticDecoder(model, 12, TOKENS)
    decoder.start(_prompt(5))
    decoder.capture()
    assert len(captured) == 1 and decoder.replay == captured[0].replay
    for length in (12, 2):
        prompt = _prompt(length, length)
        decoder.start(prompt)
        decoder.run(TOKENS - 1, graph=True)
        assert torch.equal(decoder.tokens(), _generated(model, prompt)), length


def test_a_tape_keeps_constants():
    """What makes the test above able to fail: a position that Python counts is the same in every replay."""
    counted, total = [0], torch.zeros(1)

    def step():
        counted[0] += 1
        total.add_(counted[0])

    with Tape() as tape:
        step()
    tape.replay()
    tape.replay()
    assert total.item() == 3 and counted == [1]


def test_a_step_on_a_device_stays_there():
    """On a device that has no memory and so cannot be read: no step asks it for a number or copies anything to it."""
    seen = []

    class Devices(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            seen.append((str(function), {tensor.device.type for tensor in tree_leaves((args, kwargs, out))
                                         if isinstance(tensor, torch.Tensor) and tensor.dim()}))
            return out

    for kind in ("llama", "qwen3"):
        with torch.device("meta"):
            config = AutoConfig.for_model(**{**TINY, "model_type": kind})
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()
        decoder = StaticDecoder(model, 8, TOKENS)
        decoder.start(torch.zeros(1, 8, dtype=torch.int64, device="meta"))
        seen.clear()
        with Devices():
            decoder.step()
        assert len(seen) > 50 and all(devices <= {"meta"} for _, devices in seen), seen
        assert not any("_local_scalar_dense" in name or "lift_fresh" in name for name, _ in seen)


@pytest.mark.cpu
@pytest.mark.skipif(targets.detect()[0] is None, reason=targets.detect()[1])
def test_compiled_steps_say_the_same():
    model = quantize_randomly(random_network(TINY), 4.0, 32, 32, shared_columns=True)
    fuse.fuse(model)
    torch._dynamo.reset()
    decoder = StaticDecoder(model, 6, TOKENS)
    decoder.start(_prompt(5))
    decoder.run(2, graph=False)  # merges and repacks
    decoder = StaticDecoder(model, 6, TOKENS, compiled=torch.compile(model, backend="eager", fullgraph=True))
    for length in (5, 3):
        prompt = _prompt(length, length)
        decoder.start(prompt)
        with torch._dynamo.config.patch(error_on_recompile=length == 3):  # whatever the position
            decoder.run(TOKENS - 1, graph=False)
        assert torch.equal(decoder.tokens(), _generated(model, prompt)), length
    torch._dynamo.reset()


def test_caches_that_count_in_python_are_refused():
    config = MistralConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                           num_key_value_heads=2, vocab_size=64, sliding_window=16)
    with pytest.raises(SfmpError, match="full attention in every layer, found caches StaticSlidingWindowLayer"):
        StaticDecoder(MistralForCausalLM(config), 4, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", [None, "mma", "lut"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_captured_graph_says_what_its_steps_say(mode, fused, compiled):
    if mode is None and fused:
        pytest.skip("nothing to fuse")
    dense = random_network(TINY, torch.float16, device="cuda")
    model = dense if mode is None else decode_models.packed_model(dense, 3.0, "cuda", mode, fused)
    decoder = StaticDecoder(model, 12, TOKENS)
    decoder.start(_prompt(5).cuda())
    decoder.run(2, graph=False)
    if compiled:
        decoder = StaticDecoder(model, 12, TOKENS, compiled=torch.compile(model))
    decoder.start(_prompt(5).cuda())
    decoder.run(2, graph=False)
    decoder.start(_prompt(5).cuda())
    decoder.capture()
    for length in (12, 5, 2):
        prompt, said = _prompt(length, length).cuda(), []
        for graph in (False, True):
            decoder.start(prompt)
            decoder.run(TOKENS - 1, graph)
            said.append(decoder.tokens())
        assert torch.equal(*said), length
