"""The authors' published folders → our format: values against a float64 oracle written from METHOD.md's facts."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sfmp import cli
from sfmp.authors_format import AXES, CodeLayout, code_axes, packed_matrix
from sfmp.checks import SfmpError
from sfmp.convert import convert_checkpoint
from sfmp.hf import quantized_layers
from sfmp.inspection import read_checkpoint

# 512 rows a block and 128 columns a group, as published; grouped-query attention, so that shapes differ.
CONFIG = {"hidden_size": 512, "num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 8,
          "head_dim": 64, "intermediate_size": 1536, "vocab_size": 64, "max_position_embeddings": 64}
DOWN = "model.layers.0.mlp.down_proj"


def matrix(seed, rows, columns, block_rows=512, group=128):
    """(codes [N, K] uint8, tensors without the codes) of one QuantLinear, drawn at random."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(2, 5, (columns // group, rows // block_rows))
    top = np.kron(2 ** bits.T - 1, np.ones((block_rows, group), int))
    per_group = np.kron(2 ** bits - 1, np.ones((1, block_rows), int))  # [groups, N]
    tensors = {
        "scales": torch.tensor(rng.uniform(0.001, 0.02, (columns // group, rows)), dtype=torch.float16),
        "zeros": torch.tensor(rng.integers(0, 1 << 16, per_group.shape) % (per_group + 1), dtype=torch.float16),
        "block_bitwidth": torch.tensor(bits, dtype=torch.int8),
        "in_reorder": torch.tensor(rng.permutation(columns), dtype=torch.int32),
        "out_reorder": torch.tensor(rng.permutation(rows), dtype=torch.int32),
    }
    return (rng.integers(0, 1 << 16, (rows, columns)) % (top + 1)).astype(np.uint8), tensors


def stored_codes(codes, axes="[N, K/2]", low_first=True, each=2):
    """Put `each` codes in a word, in plain arithmetic."""
    codes = (codes if axes.startswith("[N") else codes.T).astype(np.int64)
    if not axes.endswith("/2]"):
        codes = codes.T
    words = np.zeros((codes.shape[0], codes.shape[1] // each), np.int64)
    for index in range(each):
        place = index if low_first else each - 1 - index
        words += codes[:, index::each] * 16**place
    words = words if axes.endswith("/2]") else words.T
    words = np.ascontiguousarray(words).astype({2: np.uint8, 8: np.uint32}[each])
    return torch.from_numpy(words if each == 2 else words.view(np.int32))


def oracle(codes, tensors):
    """Float64 weight in natural order and the bound of what float16 beta may change: W[i, in[c]] = W'[out[i], c]."""
    scales, zeros = (tensors[key].double().numpy().T for key in ("scales", "zeros"))
    width = codes.shape[1] // scales.shape[1]
    scale, zero = np.repeat(scales, width, 1), np.repeat(zeros, width, 1)
    permuted = (codes.astype(np.float64) - zero) * scale  # METHOD 1.5
    bits = tensors["block_bitwidth"].numpy().T.astype(int)
    top = np.kron(2**bits - 1, np.ones((len(codes) // len(bits), width), int))
    rounding = np.abs(scale * (top / 2 - zero)) * 2.0**-11 + 2.0**-20
    into, out = (tensors[key].numpy() for key in ("in_reorder", "out_reorder"))
    weight, bound = np.empty_like(permuted), np.empty_like(permuted)
    weight[:, into], bound[:, into] = permuted[out], rounding[out]
    return weight, bound


def linear_names(model):
    return [name for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder of theirs, in two files, and the float64 weights behind it."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).half()
    model.config.save_pretrained(folder)
    linears = linear_names(model)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in linears}
    weights = {}
    for seed, name in enumerate(linears):
        codes, parts = matrix(seed, *model.get_submodule(name).weight.shape)
        weights[name] = oracle(codes, parts)
        tensors |= {f"{name}.{key}": tensor for key, tensor in parts.items()}
        tensors[f"{name}.qweight"] = stored_codes(codes)
    names = sorted(tensors)
    half = len(names) // 2  # a matrix may straddle the two files
    for number, part in enumerate((names[:half], names[half:])):
        save_file({name: tensors[name] for name in part}, folder / f"model-0000{number + 1}-of-00002.safetensors")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return folder, weights


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


def _damage(key, change):
    def apply(tensors):
        tensors[f"{DOWN}.{key}"] = change(tensors[f"{DOWN}.{key}"])
    return apply


DAMAGE = {
    "codes beyond their block": ("codes: expected", _damage("qweight", lambda t: t | 0xEE)),
    "codes of another shape": ("qweight: expected", _damage("qweight", lambda t: t[:, :-1].contiguous())),
    "fractional zero": ("zeros: expected integers", _damage("zeros", lambda t: t + 0.5)),
    "zero out of range": ("zeros: expected integers", _damage("zeros", lambda t: t + 16)),
    "scale 0": ("scales: expected positive", _damage("scales", lambda t: t * 0)),
    "scales transposed": ("scales: expected", _damage("scales", lambda t: t.T.contiguous())),
    "5 bits": ("block_bitwidth: expected", _damage("block_bitwidth", lambda t: t + 3)),
    "rows repeat": ("out_reorder: expected a permutation", _damage("out_reorder", lambda t: t * 0)),
    "columns out of range": ("in_reorder: expected a permutation", _damage("in_reorder", lambda t: t + 1)),
    "order with two axes": ("out_reorder: expected 1 axes", _damage("out_reorder", lambda t: t[None])),
    "no scales": ("expected qweight, scales", lambda tensors: tensors.pop(f"{DOWN}.scales")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_nothing_is_written(published, tmp_path, kind):
    message, change = DAMAGE[kind]
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(published[0] / "config.json", folder)
    tensors = {key: tensor for file in published[0].glob("*.safetensors") for key, tensor in load_file(file).items()
               if key.startswith(DOWN)}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SfmpError) as caught:
        convert_checkpoint(folder, tmp_path / "out")
    assert DOWN in str(caught.value) and message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_ambiguous_axes_are_asked_for(tmp_path):
    codes, tensors = matrix(0, 128, 128, block_rows=32, group=64)
    assert code_axes((128, 64), torch.uint8, 128, 128) == {"[N, K/2]", "[K, N/2]"}
    tensors["qweight"] = stored_codes(codes, "[K, N/2]")
    save_file({f"a.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SfmpError, match="say which with --axes"):
        convert_checkpoint(tmp_path, tmp_path / "out")
    out = convert_checkpoint(tmp_path, tmp_path / "out", axes="[K, N/2]")
    checkpoint = read_checkpoint(out)
    assert np.array_equal(checkpoint.matrices["a"].block_bits, tensors["block_bitwidth"].numpy())
    with pytest.raises(SfmpError, match="a: .*codes: expected"):  # codes their blocks cannot have
        convert_checkpoint(tmp_path, tmp_path / "other", axes="[N, K/2]")


def test_what_is_converted_is_not_replaced(published, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(published[0], folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SfmpError, match="apart from"):
        convert_checkpoint(folder, folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_interrupted_replacement_leaves_the_earlier_checkpoint(published, tmp_path, monkeypatch):
    import os

    out, rename = tmp_path / "out", os.replace
    out.mkdir()
    earlier = '{"quantization_config": {"quant_method": "sfmp"}}'
    (out / "config.json").write_text(earlier)

    def fail(old, new):
        if str(new) == str(out) and str(old).endswith(".new"):
            raise OSError(28, "No space left on device")
        rename(old, new)

    monkeypatch.setattr("sfmp.convert.os.replace", fail)
    with pytest.raises(SfmpError, match="no space left"):
        convert_checkpoint(published[0], out, overwrite=True)
    assert (out / "config.json").read_text() == earlier and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_where_nothing_can_be_written(published, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SfmpError, match="choose a place"):
        convert_checkpoint(published[0], tmp_path / "file" / "out")


def test_wrong_folders(published, tmp_path):
    with pytest.raises(SfmpError, match="config.json"):
        convert_checkpoint(tmp_path, tmp_path / "out")
    shutil.copy(published[0] / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(SfmpError, match="pickles"):
        convert_checkpoint(tmp_path, tmp_path / "out")
    with pytest.raises(SfmpError, match="--codes"):
        convert_checkpoint(published[0], tmp_path / "out", codes="weight_packed")
    with pytest.raises(SfmpError, match="--overwrite"):
        convert_checkpoint(published[0], tmp_path)
