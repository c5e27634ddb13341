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
    assert text.startswith(", there was")
    state = torch.random.get_rng_state()
    drawn = [generate(model, tokenizer, "Once", tokens=20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and torch.equal(state, torch.random.get_rng_state())
    assert generate(model, tokenizer, "", tokens=5)
    with pytest.raises(SfmpError, match="temperature"):
        generate(model, tokenizer, "x", temperature=-1.0)


@pytest.mark.parametrize("prompt", ["Once upon a", "Once", "One day, a", ""])
def test_prompt_and_pieces_are_the_decoded_whole(stories, prompt):
    model, tokenizer = load_model(str(stories))
    text = generate(model, tokenizer, prompt, tokens=60)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    ids = ids if ids.numel() else torch.tensor([[tokenizer.bos_token_id]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)
    assert prompt + text == tokenizer.decode(out[0], skip_special_tokens=True)


def test_settings_of_the_model_change_nothing_but_its_end(stories):
    model, tokenizer = load_model(str(stories))
    expected = generate(model, tokenizer, "Once upon a", tokens=20)
    model.generation_config.repetition_penalty, model.generation_config.num_beams = 3.0, 2
    model.generation_config.no_repeat_ngram_size, model.generation_config.num_return_sequences = 1, 2
    assert generate(model, tokenizer, "Once upon a", tokens=20) == expected
    model.generation_config.eos_token_id = tokenizer("Once upon a" + expected)["input_ids"][-9]
    short = generate(model, tokenizer, "Once upon a", tokens=20)
    assert expected.startswith(short) and len(short) < len(expected)


@pytest.mark.slow
def test_a_quantized_model_generates(stories, tmp_path, capsys):
    out = str(tmp_path / "out")
    arguments = ["quantize", str(stories), out, "--bpw", "5", "--levels", "4", "--group-size", "32",
                 "--block-rows", "64", "--method", "rtn", "--salience", "magnitude", "--device", "cpu", "--quiet"]
    assert cli.main(arguments) == 0
    capsys.readouterr()
    assert cli.main(["generate", out, "Once upon a", "--tokens", "20", "--device", "cpu"]) == 0
    model, tokenizer = load_model(out)
    ids = tokenizer("Once upon a", return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=20, do_sample=False)[0], skip_special_tokens=True)
    assert capsys.readouterr().out == expected + "\n"


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
