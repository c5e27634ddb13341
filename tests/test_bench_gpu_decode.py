"""The GPU bench of decoding: its models, which candidates there are, what it writes, and what failures cost."""

import argparse
import copy
import json

import cuda_stand_in
import pytest
import tape
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kernels_numba.cpu import layout, targets
from sfmp import SfmpError, fuse
from sfmp.bench import decode_models, decode_worker, gpu_decode
from sfmp.bench.__main__ import main
from sfmp.bench.decode import weight_bytes
from sfmp.bench.random_model import quantize_randomly, random_network
from sfmp.linear import SFMPLinear

needs_kernels = [pytest.mark.cpu, pytest.mark.skipif(targets.detect()[0] is None, reason=targets.detect()[1])]
TINY = decode_models.MODELS["tiny"]


def test_what_is_compiled():
    settings = {"device": "cuda", "bpw": [2.5, 3.0], "modes": ["mma", "lut"], "compile": [3.0]}
    compiled = [candidate.name for candidate in decode_models.candidates(None, [2.5, 3.0], ["mma", "lut"], "cuda")
                if "compiled" in decode_worker.ways(candidate, settings)]
    assert compiled == ["torch fp16", "sfmp mma 3 bpw fused"]
    assert decode_worker.ways(decode_models.Candidate("torch fp16", None, False, None), {**settings, "compile": []}
                              ) == ["eager", "graph"]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_kernels)])
def test_repeated_layers_have_memory_of_their_own(monkeypatch, fused, backend):
    dense = random_network({**TINY, "num_hidden_layers": 3}, torch.float16)
    model = decode_models.packed_model(dense, 3.0, backend, None, fused)
    assert model.lm_head.weight is dense.lm_head.weight
    assert type(dense.model.layers[0].mlp.up_proj) is torch.nn.Linear, "the model that was shared is as it was"
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    layers = [layer for layer in model.modules() if isinstance(layer, SFMPLinear)]
    assert len(layers) == 21 and len({layer.planes.data_ptr() for layer in layers}) == 21
    assert weight_bytes(model) == sum(layer.packed.nbytes for layer in layers) + dense.lm_head.weight.nbytes
    kept = sum(tensor.nbytes for tensor in (dense.model.embed_tokens.weight, dense.lm_head.weight))
    assert kept < decode_models.shared_bytes(model, dense) < kept + 10_000, "norms and rotary frequencies besides"
    rebuilt = copy.deepcopy(model)  # lays out everything again
    prompt = torch.arange(3, 9)[None]
    with torch.no_grad():
        expected = rebuilt(prompt).logits
        if backend == "cpu":
            images = [product._cache["cpu"].image for layer in model.model.layers
                      for product in _joints_or_layers(layer, fused)]
            assert len(images) == 3 * (4 if fused else 7) == len({image.data_ptr() for image in images})
            monkeypatch.setattr(layout, "make_image", None)  # nothing is laid out again
        assert torch.equal(model(prompt).logits, expected) and expected.isfinite().all()


def test_weights_on_a_device_are_laid_out_once_and_copied(monkeypatch):
    """With a stand-in for the driver, as no device is needed to lay out and to copy."""
    devices = pytest.importorskip("kernels_numba.gpu.devices", reason="needs numba-cuda")
    from kernels_numba.gpu import weight

    key, made, stand_in = ("cuda", 0, "mma", "mma"), [], cuda_stand_in.stand_in(cuda_stand_in.Library())
    monkeypatch.setattr(devices, "get", lambda index: stand_in)

    def first_product(layer, x):
        made.append(weight.make_weight(layer.packed, "mma", torch.device("cpu")))
        layer._cache[key] = made[-1]

    monkeypatch.setattr(SFMPLinear, "forward", first_product)
    dense = random_network({**TINY, "num_hidden_layers": 3}, torch.float16)
    model = decode_models.packed_model(dense, 3.0, "cuda", "mma", True)
    products = [product for layer in model.model.layers for product in _joints_or_layers(layer, True)]
    found = [product._cache[key] for product in products]
    assert len(made) == 4 and len(found) == 12 == len({each.image.data_ptr() for each in found})
    for number, each in enumerate(found):
        first, start = made[number % 4], each.image.data_ptr()
        assert torch.equal(each.image, first.image) and each.structure is first.structure
        assert each._addresses == {name: start + place for name, place in each.structure.places.items()}
        assert each.columns == products[number].in_features and each.rows == products[number].out_features


def _joints_or_layers(layer, fused):
    """What multiplies, in the order of the layer."""
    layers = [module for module in layer.modules() if isinstance(module, SFMPLinear)]
    if fused:
        layers = [module._joint._cache["product"] if isinstance(module, fuse.FusedLinear) else module
                  for module in layers]
    return list({id(found): found for found in layers}.values())


def test_a_model_that_cannot_be_fused_says_so(monkeypatch):
    dense = random_network(TINY, torch.float16)
    monkeypatch.setattr(decode_models, "quantize_randomly", lambda layer, bpw, shared_columns: quantize_randomly(
        layer, bpw))
    with pytest.raises(SfmpError, match="expected q, k, v and gate, up to be one product each"):
        decode_models.packed_model(dense, 3.0, "reference", None, True)


def test_published_shapes():
    weights = {"Llama-3.1-8B": 8.03e9, "Qwen3-8B": 8.19e9, "Llama-3.1-70B": 70.55e9}
    for name, expected in weights.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**decode_models.MODELS[name]))
        assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(expected, rel=1e-3)
        assert hasattr(model.model.layers[0].self_attn, "q_norm") == (name == "Qwen3-8B")


def _options(path, *given):
    parser = argparse.ArgumentParser()
    gpu_decode.add_arguments(parser)
    return parser.parse_args(["--out", str(path), *given])


@pytest.mark.cpu
@pytest.mark.skipif("lut16" not in targets.MODES.get(targets.detect()[0], ()), reason="no lut16 here")
def test_every_way_is_measured_on_a_device(monkeypatch):
    """With stand-ins for torch.cuda: what there is on a device only, and what a failure costs."""
    settings = {"device": "cuda", "bpw": [3.0, 9.0], "modes": ["lut16"], "compile": [3.0], **gpu_decode.QUICK}
    part, told = {"model": "tiny", "layers": 2, "skip": {}}, []
    tape.stand_in(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda network: network.forward)
    original = decode_worker.candidates
    monkeypatch.setattr(decode_worker, "candidates", lambda *given: original(*given[:3], "cpu"))
    dense = decode_models.dense_model("tiny", 2, "cpu")
    monkeypatch.setattr(decode_worker, "dense_model", lambda *_: dense)
    ready, absent = decode_worker.prepare(part, settings, told.append)
    assert told == ["torch fp16", *["sfmp lut16"] * 4]
    assert [(one.candidate.name, one.graph, one.compiled) for one in ready] == [
        ("torch fp16", False, False), ("torch fp16", True, False), ("torch fp16", True, True),
        ("sfmp lut16 3 bpw", False, False), ("sfmp lut16 3 bpw", True, False), ("sfmp lut16 3 bpw fused", False, False),
        ("sfmp lut16 3 bpw fused", True, False), ("sfmp lut16 3 bpw fused", True, True)]
    assert absent.keys() == {"sfmp lut16 9 bpw eager", "sfmp lut16 9 bpw fused eager"}
    kept = 2 * 2 * 256 * 128
    assert [one.peak_bytes for one in ready[:3]] == [0, 7, 14], "nothing is shared"
    assert kept < ready[3].peak_bytes - 14 < kept + 10_000 and ready[4].peak_bytes == ready[3].peak_bytes + 7
    rows = decode_worker.measure(ready, settings, {"random": True}, told.append)
    assert [row["tokens"] for row in rows] == [4, 8, 8, 4, 8, 4, 8, 8] and all(row["random"] for row in rows)
    said = [decode_worker._sample(one, 6, settings) and one.decoder.tokens() for one in ready]
    assert all(torch.equal(tokens, said[0]) for tokens in said[:3])
    assert all(torch.equal(tokens, said[3]) for tokens in said[3:]), "fused and compiled or not"
    skipped, why = decode_worker.prepare({**part, "skip": {"sfmp lut16": "broke"}}, settings, told.append)
    assert len(skipped) == 3 and why["sfmp lut16 3 bpw fused"] == "broke"


@pytest.mark.cpu
@pytest.mark.skipif("lut16" not in targets.MODES.get(targets.detect()[0], ()), reason="no lut16 here")
def test_the_command_writes_rows_and_what_failed(tmp_path, capsys):
    path = tmp_path / "decode.json"
    assert gpu_decode.run(_options(path, "--device", "cpu", "--quick", "--bpw", "3", "9")) == 1
    assert "failed: decode tiny" in capsys.readouterr().err
    found = json.loads(path.read_text())
    assert found["kind"] == "gpu decode" and found["device"]["capability"] is None
    assert found["ceilings"].keys() == {"copy_gbps", "read_gbps", "matmul_tflops"} and found["versions"]["torch"]
    (part,) = found["parts"]
    assert (part["part"], part["model"], part["layers"]) == ("decode", "tiny", 2)
    assert part["absent"].keys() == {"sfmp lut16 9 bpw eager", "sfmp lut16 9 bpw fused eager"}
    assert all("expected 2 to 4 code bits" in why for why in part["absent"].values())
    assert [(row["weights"], row["bpw"], row["fused"]) for row in part["rows"]] == [
        ("torch fp16", None, False), ("sfmp lut16", 3.0, False), ("sfmp lut16", 3.0, True)]
    for row in part["rows"]:
        assert (row["random"], row["graph"], row["compiled"], row["peak_bytes"]) == (True, False, False, None)
        assert row["layers"] == row["full_layers"] == 2 and len(row["seconds_per_token"]) == 2
        middle = sum(row["seconds_per_token"]) / 2
        assert row["tokens_per_second"] * middle == pytest.approx(1)
        assert row["gigabytes_per_second"] == pytest.approx(row["weight_bytes"] / 1e9 / middle)
    assert part["rows"][1]["weight_bytes"] == part["rows"][2]["weight_bytes"] < part["rows"][0]["weight_bytes"] / 3


def test_bad_arguments_are_refused(tmp_path, capsys):
    for given, said in ((("--models", "GPT-9"), "expected some of Llama-3.1-8B"), (("--layers", "0"), ">= 1, found 0")):
        assert gpu_decode.run(_options(tmp_path / "out.json", "--device", "cpu", *given)) == 2
        assert said in capsys.readouterr().err
    assert main(["decode", "--out", str(tmp_path / "out.json"), "--device", "cpu", "--models", "GPT-9"]) == 2
    assert "expected some of Llama-3.1-8B" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert gpu_decode.run(_options(tmp_path / "file" / "out.json", "--device", "cpu")) == 2
    assert "--out: expected a file that can be written" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert gpu_decode.run(_options(tmp_path / "out.json", "--device", "cuda")) == 2
        assert "torch sees no CUDA device here" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_by_default_a_gpu_measures_published_models():
    options = _options("out.json", "--layers", "4", "--quick")
    options.device = "cpu"
    parts, settings = gpu_decode.session(options)
    assert parts == [{"part": "decode", "model": "tiny", "layers": 4}] and settings["modes"] == ["lut16"]
    options.layers, options.models = None, ["Llama-3.1-8B", "Llama-3.1-70B"]
    assert [part["layers"] for part in gpu_decode.session(options)[0]] == [32, 8]


def test_weights_that_break_the_process_are_left_out(monkeypatch, tmp_path):
    asked = []

    def broken(part, settings):
        asked.append(dict(part["skip"]))
        if "sfmp lut" not in part["skip"]:
            return {"failed": "an illegal memory access"}, "sfmp lut"
        return {"rows": [], "absent": {"sfmp lut 3 bpw": part["skip"]["sfmp lut"]}, "device": {"name": "x"}}, ""

    monkeypatch.setattr(gpu_decode, "_in_a_process", broken)
    part = {"part": "decode", "model": "tiny", "layers": 2}
    found = gpu_decode.measure([part], {}, tmp_path / "out.json", log=lambda *_, **__: None)
    assert asked == [{}, {"sfmp lut": "broke the process: an illegal memory access"}]
    assert found["parts"][0]["absent"] == {"sfmp lut 3 bpw": "broke the process: an illegal memory access"}
    monkeypatch.setattr(gpu_decode, "_in_a_process", lambda part, settings: ({"failed": "no memory"}, "torch fp16"))
    found = gpu_decode.measure([part, part], {}, tmp_path / "out.json", log=lambda *_, **__: None)
    assert all(part["failed"] == "no memory" for part in found["parts"])
    found = gpu_decode.measure([part], {}, tmp_path / "out.json", limit=-1, log=lambda *_, **__: None)
    assert found["parts"][0]["failed"].startswith("not begun") and json.loads((tmp_path / "out.json").read_text())


def test_a_process_that_dies_says_what_it_tried():
    part = {"part": "decode", "model": "no such model", "layers": 1, "skip": {}}
    result, trying = gpu_decode._in_a_process(part, {"device": "cpu", "compile": [], **gpu_decode.QUICK})
    assert "KeyError: 'no such model'" in result["failed"] and trying == ""
