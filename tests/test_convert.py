"""The authors' published folders → our format: values against a float64 oracle written from METHOD.md's facts."""

import json

import numpy as np
import pytest
import torch
from authors_folder import CONFIG, matrix, oracle, stored_codes, write_published
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sfmp import cli
from sfmp.authors_format import AXES, CodeLayout, packed_matrix
from sfmp.convert import convert_checkpoint
from sfmp.hf import quantized_layers
from sfmp.inspection import read_checkpoint


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    return folder, write_published(folder)


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "converted"
    return convert_checkpoint(published[0], out, base={"model": "meta/tiny", "revision": "abc"})


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("low_first", [True, False])
@pytest.mark.parametrize("each", [2, 8])
def test_codes_scales_zeros_and_order_survive_in_any_layout(axes, low_first, each):
    codes, tensors = matrix(3, 32, 128, block_rows=16, group=64)
    stored = stored_codes(codes, axes, low_first, each)
    packed = packed_matrix("m", {**tensors, "qweight": stored}, CodeLayout(low_first=low_first))
    found_codes, scales, zeros = packed.unpack()
    assert np.array_equal(found_codes, codes)
    assert torch.equal(scales, tensors["scales"].float().T) and torch.equal(zeros, tensors["zeros"].float().T)
    assert torch.equal(packed.block_bits, tensors["block_bitwidth"].to(torch.uint8))
    weight, bound = oracle(codes, tensors)
    assert (np.abs(packed.dequantize().double().numpy() - weight) <= bound).all()
    # And as a product, straight from the facts: x' = x[in_reorder], y = y'[out_reorder].
    x = np.random.default_rng(0).normal(size=128)
    permuted = (codes - np.repeat(tensors["zeros"].double().numpy().T, 64, 1)) * np.repeat(
        tensors["scales"].double().numpy().T, 64, 1)
    y = (permuted @ x[tensors["in_reorder"].numpy()])[tensors["out_reorder"].numpy()]
    assert np.allclose(packed.dequantize().double().numpy() @ x, y, atol=1e-2 * np.abs(y).max())


def test_the_other_half_first_gives_other_weights():
    codes, tensors = matrix(3, 32, 128, block_rows=16, group=64)
    tensors["qweight"] = stored_codes(codes, low_first=False)
    right, wrong = (packed_matrix("m", tensors, CodeLayout(low_first=low)).dequantize() for low in (False, True))
    assert not torch.equal(right, wrong)


def test_weights_of_the_converted_model(published, converted):
    model = AutoModelForCausalLM.from_pretrained(converted)
    layers = quantized_layers(model)
    assert set(layers) == set(published[1])
    for name, (weight, bound) in published[1].items():
        assert (np.abs(layers[name].dequantize().double().numpy() - weight) <= bound).all(), name


def test_logits_are_those_of_the_oracles_weights(published, converted):
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    plain = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    state = model.state_dict()
    plain.load_state_dict({name: tensor for name, tensor in state.items() if name in plain.state_dict()}, strict=False)
    with torch.no_grad():
        for name, (weight, _) in published[1].items():
            plain.get_submodule(name).weight.copy_(torch.from_numpy(weight))
        model.dequantize()
        ids = torch.arange(24).view(1, 24)
        expected, found = plain(ids).logits, model(ids).logits
    assert (found - expected).abs().max() <= 0.01 * expected.abs().max()


def test_other_tensors_and_files_are_copied_but_no_pickle(published, converted):
    there, here = ({key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
                   for folder in (published[0], converted))
    others = [key for key in there if key.rpartition(".")[0] not in published[1]]
    assert others and all(torch.equal(there[key], here[key]) for key in others)
    assert {path.name for path in converted.iterdir()} == {"README.md", "config.json", "model.safetensors",
                                                           "tokenizer.json"}


def test_weights_are_as_readable_as_the_rest(converted):
    modes = {path.stat().st_mode & 0o777 for path in (converted / "config.json", *converted.glob("*.safetensors"))}
    assert len(modes) == 1


def test_config_says_what_the_bit_maps_show(converted):
    config = json.loads((converted / "config.json").read_text())["quantization_config"]
    checkpoint = read_checkpoint(converted)
    assert config["spec"]["levels"] == [2, 3, 4] and config["spec"]["block_rows"] == 512
    assert config["source"] == {"model": "meta/tiny", "revision": "abc"}
    assert checkpoint.recomputed_hash() == config["plan_hash"]
    mean = np.average([m.bpw for m in checkpoint.matrices.values()],
                      weights=[m.shape[0] * m.shape[1] for m in checkpoint.matrices.values()])
    assert config["spec"]["bpw"] == pytest.approx(mean, abs=1e-6)
    assert "base_model: meta/tiny" in (converted / "README.md").read_text()


def test_several_output_files_hold_the_same_tensors(published, converted, tmp_path):
    out = convert_checkpoint(published[0], tmp_path / "out", max_shard_bytes=300_000)
    files = sorted(out.glob("model-*-of-*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    one = load_file(converted / "model.safetensors")
    many = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert len(files) > 2 and index["weight_map"].keys() == one.keys() == many.keys()
    assert all(torch.equal(one[key], many[key]) for key in one)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in one.values())
    model = AutoModelForCausalLM.from_pretrained(out)
    assert len(quantized_layers(model)) == len(published[1])


def test_the_command_converts_the_same(published, converted, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["convert", str(published[0]), str(out), "--base-model", "meta/tiny@abc"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert "(confirmed)" in printed.out and "convert" in printed.err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in converted.iterdir()}
    assert cli.main([*arguments, "--nibbles", "high-first", "--quiet"]) == 2  # it exists
    capsys.readouterr()
    assert cli.main([*arguments, "--nibbles", "high-first", "--quiet", "--overwrite"]) == 0
    assert capsys.readouterr().err == ""
    assert (out / "model.safetensors").read_bytes() != (converted / "model.safetensors").read_bytes()
