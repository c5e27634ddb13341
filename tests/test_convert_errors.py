"""What is no checkpoint of the authors, or a damaged one, is named, and nothing is written."""

import shutil

import numpy as np
import pytest
import torch
from authors_folder import DOWN, matrix, stored_codes, write_published
from safetensors.torch import load_file, save_file

from sfmp.authors_format import code_axes
from sfmp.checks import SfmpError
from sfmp.convert import convert_checkpoint
from sfmp.inspection import read_checkpoint


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    return folder, write_published(folder)


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
    "bits that are no integers": ("block_bitwidth: expected integers", _damage("block_bitwidth", lambda t: t.half())),
    "order that is no integers": ("in_reorder: expected integers", _damage("in_reorder", lambda t: t.float())),
    "scales that are integers": ("scales: expected floating", _damage("scales", lambda t: t.int() + 1)),
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


def test_what_is_not_known_is_left_out(published, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(published[0] / "config.json", folder)
    tensors = {key: tensor for file in published[0].glob("*.safetensors") for key, tensor in load_file(file).items()}
    save_file({**tensors, f"{DOWN}.g_idx": torch.arange(3)}, folder / "model.safetensors")
    for name in ("LICENSE", "tokenizer.model", "model.h5", "weights.pkl", "notes.txt", "modeling_x.py"):
        (folder / name).write_text(name)
    with pytest.warns(UserWarning, match="g_idx: tensors of quantized modules"):
        out = convert_checkpoint(folder, tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {"README.md", "config.json", "model.safetensors", "LICENSE",
                                                     "tokenizer.model"}
    assert f"{DOWN}.g_idx" not in load_file(out / "model.safetensors")
