"""Text that appears token by token, on the smallest real model."""

import builtins

import pytest
import torch
from command_line import command

from sfmp import cli
from sfmp.checks import SfmpError
from sfmp.generate import TextPieces, generate
from sfmp.stages import load_model


@pytest.fixture(scope="module")
def stories(shared_data):
    return shared_data / "models" / "stories260K"


def test_generate_prints_tokens_as_they_come(stories, monkeypatch):
    printed = []
    monkeypatch.setattr(builtins, "print", lambda *a, **k: printed.append((a, k)))
    assert cli.main(["generate", str(stories), "Once upon", "--tokens", "12", "--device", "cpu"]) == 0
    pieces = [a[0] for a, k in printed if k.get("end") == ""]
    assert pieces[0] == "Once upon" and len(pieces) >= 8 and all(k["flush"] for _, k in printed if "end" in k)


def test_generate_is_what_transformers_generates(stories):
    model, tokenizer = load_model(str(stories))
    pieces = []
    text = generate(model, tokenizer, "Once upon a time", tokens=30, write=pieces.append)
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
    expected = tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True)
    assert text.strip() == expected.strip() and "".join(pieces) == text and len(pieces) > 15
    state = torch.random.get_rng_state()
    drawn = [generate(model, tokenizer, "Once", tokens=20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and torch.equal(state, torch.random.get_rng_state())
    assert generate(model, tokenizer, "", tokens=5)
    with pytest.raises(SfmpError, match="temperature"):
        generate(model, tokenizer, "x", temperature=-1.0)


def test_pieces_wait_for_whole_characters():
    class Bytes:
        def decode(self, tokens, **_):
            return bytes(tokens).decode("utf-8", errors="replace")

    pieces = []
    streamer = TextPieces(Bytes(), pieces.append)
    streamer.put(torch.tensor([[1, 2]]))  # the prompt
    for byte in "aé–".encode():
        streamer.put(torch.tensor([byte]))
    streamer.put(torch.tensor([0xE2]))
    streamer.end()
    assert pieces == ["a", "é", "–", "\N{REPLACEMENT CHARACTER}"]


def test_generate_reads_standard_input(stories):
    done = command("generate", stories, "--tokens", "5", "--device", "cpu", input="Once upon")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon") and len(done.stdout.strip()) > len("Once upon")
