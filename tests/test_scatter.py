"""Layers quantized in pieces, each from a file of its inputs: the bytes of one process, or a refusal."""

import json
import warnings

import pytest
import torch
from tiny_models import contents, write

from sfmp import apply, stream_quantize
from sfmp.allocate import make_plan
from sfmp.apply import quantize_model
from sfmp.hf import quantized_layers, save_checkpoint
from sfmp.model_source import load, skeleton
from sfmp.salience import linear_modules, magnitude_salience
from sfmp.scatter import gather, identity_of, quantize_piece, ranges_of
from sfmp.spec import QuantSpec, SfmpError
from sfmp.stream import NotStreamable, open_stream
from sfmp.stream_inputs import cache_inputs, read_inputs, write_inputs
from sfmp.unfuse import linears_exposed
from sfmp.walk import Batch

CPU = torch.device("cpu")
SPEC = QuantSpec(bpw=4.0, group_size=32, block_rows=32)


@pytest.fixture(scope="module")
def windows():
    return torch.randint(0, 4096, (7, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Several batches, of two shapes beside the probe's."""
    for module in (apply, stream_quantize):
        monkeypatch.setattr(module, "SEARCH_TOKENS", 80)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder of a tiny model by family, made once."""
    made, place = {}, tmp_path_factory.mktemp("models")

    def folder(family):
        if family not in made:
            made[family] = str(write(place / family, family))
        return made[family]

    return folder


def _plan(folder, spec, dtype="auto"):
    model, tokenizer = load(folder, dtype, "cpu")
    with linears_exposed(model):
        return make_plan(magnitude_salience(model, skip=spec.skip), spec, model), model, tokenizer


def _stream(folder, scratch, dtype="auto"):
    stream = open_stream(folder, skeleton(folder)[0], dtype, CPU, SPEC.skip, scratch / "offloaded")
    with linears_exposed(stream.model):
        stream.exposed = list(linear_modules(stream.model, SPEC.skip))
    return stream


def _pieces(folder, plan, windows, place, count, dtype="auto"):
    """Layer inputs, then every piece in a stream of its own; (folders, identity)."""
    stream = _stream(folder, place, dtype)
    what = {"dtype": stream.model.dtype, "device": "cpu"}
    made_from = identity_of(folder, stream.model.config, plan.spec, windows, **what)
    identity = identity_of(folder, stream.model.config, plan.spec, windows, **what, plan=plan)
    files = [place / f"inputs-{piece}" for piece in range(count)]
    if plan.spec.method == "rtn":
        found = [(layers, []) for layers in ranges_of(len(stream), count)]
    else:
        cache_inputs(stream, windows, ranges_of(len(stream), count), files, made_from)
        found = [read_inputs(file, CPU, made_from) for file in files]
    folders = [place / f"piece-{piece}" for piece in range(count)]
    for piece in reversed(range(count)):  # in no order
        quantize_piece(_stream(folder, place, dtype), plan, *found[piece], folders[piece], identity)
    return folders, identity


@pytest.mark.parametrize("family, method, count, dtype", [
    ("llama", "awq", 2, "auto"), ("llama", "awq", 5, "float32"), ("llama", "rtn", 3, "auto"),
    ("gpt2", "awq", 3, "auto"), ("mixtral", "awq", 2, "auto"), ("neox", "awq", 1, "auto")])
def test_gathered_pieces_have_the_bytes_of_one_process(models, windows, tmp_path, family, method, count, dtype):
    folder = models(family)
    plan, model, tokenizer = _plan(folder, QuantSpec(bpw=4.0, group_size=32, block_rows=32, method=method), dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="awq: ")
        save_checkpoint(quantize_model(model, plan, windows), tmp_path / "whole", tokenizer)
        pieces, identity = _pieces(folder, plan, windows, tmp_path, count, dtype)
    models = {"model": load(folder, dtype, "cpu")[0], "stream": _stream(folder, tmp_path, dtype).model}
    for name, gathered in models.items():
        seconds = gather(gathered, plan, pieces, identity)
        assert len(seconds) == count and gathered.sfmp_report == model.sfmp_report
        save_checkpoint(gathered, tmp_path / name, tokenizer)
        assert contents(tmp_path / name) == contents(tmp_path / "whole")
        assert torch.equal(_logits(gathered, windows), _logits(model, windows))


def _logits(model, windows):
    for layer in quantized_layers(model).values():
        layer.backend = "reference"  # compiles nothing
    with torch.no_grad():
        return model(windows[:1]).logits


def test_pieces_read_no_layers_but_their_own(models, windows, tmp_path, monkeypatch):
    plan, _, _ = _plan(models("llama"), SPEC)
    stream = _stream(models("llama"), tmp_path)
    read = []
    resident = type(stream).resident
    monkeypatch.setattr(type(stream), "resident", lambda self, index: (read.append(index), resident(self, index))[1])
    monkeypatch.setattr(type(stream), "running", None)
    file, made_from = tmp_path / "inputs", {"by": "hand"}
    calls = [(0, (None,), {}), *[(0, (None,), {"position_embeddings": _rotary(stream, 8)})] * 2]
    write_inputs(file, [Batch(torch.randn(1, 8, 64), calls) for _ in range(2)], range(1, 2), made_from)
    quantize_piece(stream, plan, *read_inputs(file, CPU, made_from), tmp_path / "piece", made_from)
    assert read == [1] and sorted(path.name for path in (tmp_path / "piece").iterdir()) == [
        "layer-00001.safetensors", "piece.json"]


def _rotary(stream, length):
    return stream.model.model.rotary_emb(torch.zeros(1, length, 64), torch.arange(length)[None])


def test_arguments_come_back_as_they_were(tmp_path):
    shared = torch.arange(4)
    calls = [("hidden_states", (), {"mask": (shared, [None, {"a": shared, "b": 1.5}]), "flag": True, "name": "x"}),
             (0, (None, 3), {})]
    write_inputs(tmp_path / "file", [Batch(torch.ones(2, 3), calls), Batch(torch.zeros(1, 3), calls)], range(2), {})
    layers, (first, second) = read_inputs(tmp_path / "file", CPU, {})
    assert layers == range(2) and first.calls is second.calls and torch.equal(second.hidden, torch.zeros(1, 3))
    key, args, kwargs = first.calls[0]
    mask, (nothing, inner) = kwargs["mask"]
    assert (key, args, nothing, inner["b"]) == ("hidden_states", (), None, 1.5)
    assert (kwargs["flag"], kwargs["name"]) == (True, "x")
    assert torch.equal(mask, shared) and inner["a"] is mask and first.calls[1] == (0, (None, 3), {})
    with pytest.raises(NotStreamable, match="given a object, which cannot"):
        write_inputs(tmp_path / "file", [Batch(torch.ones(1), [(0, (object(),), {})])], range(1), {})


def test_what_was_made_from_something_else_is_refused(models, windows, tmp_path):
    folder = models("llama")
    plan, model, _ = _plan(folder, SPEC)
    pieces, identity = _pieces(folder, plan, windows, tmp_path, 2)
    other, _, _ = _plan(folder, QuantSpec(bpw=5.0, group_size=32, block_rows=32))
    what = {"dtype": model.dtype, "device": "cpu"}
    of_other = identity_of(folder, model.config, other.spec, windows, **what, plan=other)
    with pytest.raises(SfmpError, match="piece was made from something else: plan: expected"):
        gather(model, other, pieces, of_other)
    fewer = identity_of(folder, model.config, plan.spec, windows[1:], **what, plan=plan)
    with pytest.raises(SfmpError, match="something else: calibration: expected"):
        gather(model, plan, pieces, fewer)
    with pytest.raises(SfmpError, match="layer inputs were made from something else: calibration"):
        read_inputs(tmp_path / "inputs-0", CPU, identity_of(folder, model.config, plan.spec, windows[1:], **what))
    with pytest.raises(SfmpError, match=r"model.layers.2.mlp.down_proj: .* none of 1; 7 are missing"):
        gather(model, plan, pieces[:1], identity)
    with pytest.raises(SfmpError, match="expected layer inputs, found"):
        read_inputs(pieces[0] / "piece.json", CPU, identity)
    assert not hasattr(model, "sfmp_report") and type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    record = pieces[1] / "piece.json"
    text = record.read_text()
    record.write_text(json.dumps(json.loads(text) | {"layers": [1, 3]}))
    with pytest.raises(SfmpError, match="layer-00001"):
        gather(model, plan, pieces[1:], identity)
    for damaged in ("[]", "{", '{"layers": [0, 1]}'):
        record.write_text(damaged)
        with pytest.raises(SfmpError, match="expected a finished piece, found"):
            gather(model, plan, pieces, identity)
    record.unlink()
    with pytest.raises(SfmpError, match="expected a finished piece, found"):
        gather(model, plan, iter(pieces), identity)
    layer = pieces[0] / "layer-00000.safetensors"
    layer.write_bytes(layer.read_bytes()[:-8])
    with pytest.raises(SfmpError, match="layer-00000.safetensors: expected a quantized layer, found"):
        gather(model, plan, pieces[:1], identity)


def test_a_piece_that_was_killed_is_made_again_and_a_finished_one_is_kept(models, windows, tmp_path, monkeypatch):
    """A killed job leaves nothing under the name of its piece: what is there is whole."""
    from sfmp import scatter

    folder, steps = models("llama"), scatter.quantize_range
    plan, _, _ = _plan(folder, SPEC)

    def killed(stream, plan, layers, batches, place, *rest):
        steps(stream, plan, range(layers.start, layers.start + 1), batches, place, *rest)
        raise KeyboardInterrupt  # as abrupt as a test can be: nothing below cleans up

    monkeypatch.setattr(scatter, "quantize_range", killed)
    with pytest.raises(KeyboardInterrupt):
        _pieces(folder, plan, windows, tmp_path, 1)
    assert not (tmp_path / "piece-0").exists() and list(tmp_path.glob(".piece-0*/layer-00000.safetensors"))
    monkeypatch.setattr(scatter, "quantize_range", steps)
    (piece,), identity = _pieces(folder, plan, windows, tmp_path, 1)
    assert not list(tmp_path.glob(".piece-0*"))
    once = contents(piece)
    (whole,), _ = _pieces(folder, plan, windows, tmp_path / "undisturbed", 1)
    assert {name: data for name, data in contents(whole).items() if name != "piece.json"} == {
        name: data for name, data in once.items() if name != "piece.json"}  # that holds seconds
    with pytest.raises(SfmpError, match="piece-0: expected no such folder"):
        _pieces(folder, plan, windows, tmp_path, 1)
    assert contents(piece) == once


def test_damaged_layers_are_refused(models, windows, tmp_path):
    from safetensors.torch import load_file, save_file

    plan, model, _ = _plan(models("llama"), SPEC)
    pieces, identity = _pieces(models("llama"), plan, windows, tmp_path, 1)
    file = pieces[0] / "layer-00001.safetensors"
    tensors, name = load_file(file), "model.layers.1.mlp.up_proj"
    tensors[f"{name}.planes"][0] ^= 1
    from safetensors import safe_open
    with safe_open(file, framework="pt") as old:
        metadata = old.metadata()
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(SfmpError, match=name):
        gather(model, plan, pieces, identity)


def test_gptq_is_not_scattered(models, windows, tmp_path):
    plan, _, _ = _plan(models("llama"), QuantSpec(bpw=4.0, group_size=32, block_rows=32, method="gptq"))
    with pytest.raises(SfmpError, match="expected one of awq, rtn for pieces, found 'gptq'"):
        quantize_piece(_stream(models("llama"), tmp_path), plan, range(1), [], tmp_path / "piece", {})
    assert not (tmp_path / "piece").exists()


@pytest.mark.parametrize("depth, pieces", [(1, 1), (6, 4), (7, 7), (3, 5), (80, 32)])
def test_ranges_cover_all_layers_evenly(depth, pieces):
    ranges = ranges_of(depth, pieces)
    assert [index for layers in ranges for index in layers] == list(range(depth)) and len(ranges) == pieces
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1
