"""Sources of text and windows of tokens."""

import json

import numpy as np
import pytest
import torch

from sfmp import data
from sfmp.spec import SfmpError


class Letters:
    """A tokenizer whose tokens are code points."""

    def __call__(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}


def test_local_files_are_read_in_order(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo", "utf-8")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("x", "y")), "utf-8")
    assert data.load_text(str(tmp_path / "a.txt")) == ["one\ntwo"]
    assert data.load_text(str(tmp_path / "b.jsonl")) == ["x", "y"]


@pytest.mark.parametrize(
    ("source", "content", "says"),
    [
        ("python:test", None, "python:calibration"),
        ("missing.txt", None, "existing .txt"),
        ("table.csv", "a,b", "existing .txt"),
        ("empty.txt", " \n", "found none"),
        ("bad.jsonl", '{"text": "fine"}\n{"body": 1}\n', "line 2"),
        ("broken.jsonl", "{", "line 1"),
        ("hub:only-an-id", None, "hub:ID:SPLIT"),
    ],
)
def test_a_bad_source_is_one_clear_error(tmp_path, monkeypatch, source, content, says):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / source).write_text(content, "utf-8")
    with pytest.raises(SfmpError, match=says):
        data.load_text(source)


def test_rows_end_where_json_says(tmp_path):
    """C4 has documents with characters at which Python, and not JSON, ends a line."""
    rows = ["one\u2028two", "\x85", "three\u2029four\n"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in rows]
    (tmp_path / "a.jsonl").write_text("".join(lines), "utf-8")
    assert data.load_text(str(tmp_path / "a.jsonl"), blank=True) == rows


def test_what_is_no_text_is_one_clear_error(tmp_path):
    (tmp_path / "packed.jsonl").write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(SfmpError, match="packed.jsonl: expected text in UTF-8"):
        data.load_text(str(tmp_path / "packed.jsonl"))
    (tmp_path / "numbers.jsonl").write_text('{"text": 5}\n', "utf-8")
    with pytest.raises(SfmpError, match="line 1: expected a JSON object with a field 'text'"):
        data.load_text(str(tmp_path / "numbers.jsonl"))


def test_hub_source_passes_id_config_split_and_revision(monkeypatch):
    import datasets

    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or {"text": ["some text"]})
    assert data.load_text("hub:Salesforce/wikitext:wikitext-2-raw-v1:test@abc") == ["some text"]
    assert calls == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test", "revision": "abc"})]


def test_a_hub_that_does_not_answer_is_one_clear_error(monkeypatch):
    import datasets
    from datasets.exceptions import DatasetNotFoundError, ExpectedMoreSplitsError

    for raised in (ConnectionError("no way"), DatasetNotFoundError("no way"), ValueError("no way"),
                   ExpectedMoreSplitsError("no way")):
        def load_dataset(*_, raised=raised, **__):
            raise raised

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(SfmpError, match="data set a/b: expected the Hub to give train .* found: no way; check"):
            data.load_text("hub:a/b:train")


def test_calibration_windows_are_pieces_of_long_enough_documents():
    documents = ["abcdefghij", "KLMNOPQRSTUVWXYZ", "short"]
    windows = data.calibration_windows(documents, Letters(), n_windows=7, seqlen=8, seed=3)
    assert windows.shape == (7, 8) and windows.dtype == torch.int64
    for row in windows.tolist():
        assert any("".join(map(chr, row)) in text for text in documents[:2])
    again = data.calibration_windows(documents, Letters(), n_windows=7, seqlen=8, seed=3)
    other = data.calibration_windows(documents, Letters(), n_windows=7, seqlen=8, seed=4)
    assert torch.equal(windows, again) and not torch.equal(windows, other)
    with pytest.raises(SfmpError, match="at least 17"):
        data.calibration_windows(documents, Letters(), n_windows=1, seqlen=17)


def test_evaluation_windows_cut_the_joined_text_without_overlap():
    windows, bytes_per_token = data.evaluation_windows(["abc", "dé"], Letters(), seqlen=3)
    assert ["".join(map(chr, row)) for row in windows.tolist()] == ["abc", "\n\nd"]  # the tail "é" is dropped
    assert bytes_per_token == 8 / 7
    with pytest.raises(SfmpError, match="at least 9"):
        data.evaluation_windows(["abc", "dé"], Letters(), seqlen=9)


def test_windows_round_trip_and_a_changed_file_is_refused(tmp_path):
    windows = torch.from_numpy(np.arange(12).reshape(3, 4))
    data.save_windows(windows, tmp_path / "w.safetensors", source="python:calibration", seed=0, model="m")
    data.save_windows(windows, tmp_path / "again.safetensors", source="python:calibration", seed=0, model="m")
    assert (tmp_path / "w.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    loaded, meta = data.load_windows(tmp_path / "w.safetensors")
    assert torch.equal(loaded, windows) and meta["source"] == "python:calibration"
    assert meta["fingerprint"] == data.fingerprint(windows) != data.fingerprint(windows.view(4, 3))
    with pytest.raises(SfmpError, match="none: expected a file of windows, found"):
        data.load_windows(tmp_path / "none")
    raw = bytearray((tmp_path / "w.safetensors").read_bytes())
    raw[-8] ^= 1
    (tmp_path / "w.safetensors").write_bytes(raw)
    with pytest.raises(SfmpError, match="fingerprint"):
        data.load_windows(tmp_path / "w.safetensors")


def test_wikitext_and_c4_rows_are_read_from_local_files(shared_data):
    rows = data.load_text(str(shared_data / "c4_sample" / "docs.jsonl"))
    assert len(rows) == 118
