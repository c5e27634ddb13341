"""Choices as branches of one sequence give the numbers of lm-eval's own model."""

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from sfmp import evaluate
from sfmp.shared_prefix import SharedPrefixLM


@pytest.fixture
def both(embedded):
    model, tokenizer = embedded
    arguments = {"pretrained": model, "tokenizer": tokenizer, "batch_size": 4, "max_length": 64, "device": "cpu"}
    return SharedPrefixLM(**arguments), HFLM(**arguments)


def requests(lengths, seed=0):
    """Questions of the given lengths with choices of 1 to 5 tokens, interleaved."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(count):
        return torch.randint(1, 4096, (count,), generator=draw).tolist()

    questions = [tokens(n) for n in lengths]
    return [(None, question, tokens(n)) for n in (1, 3, 5, 2) for question in questions]


def test_the_numbers_are_those_of_lm_eval(both):
    branched, plain = both
    asked = requests([1, 7, 20, 33, 2])
    for ours, theirs in zip(
        branched._loglikelihood_tokens(asked), plain._loglikelihood_tokens(asked, disable_tqdm=True), strict=True
    ):
        assert ours[0] == pytest.approx(theirs[0], abs=2e-4)
        assert ours[1] == theirs[1]


def test_a_greedy_choice_is_recognised(both):
    branched, _ = both
    question = [5, 6, 7]
    with torch.no_grad():
        best = int(branched.model(input_ids=torch.tensor([question])).logits[0, -1].argmax())
    answers = branched._loglikelihood_tokens([(None, question, [best]), (None, question, [best + 1])])
    assert [greedy for _, greedy in answers] == [True, False]


def test_sequences_beyond_the_context_are_truncated_as_lm_eval_does(both):
    branched, plain = both
    asked = requests([80])
    ours = branched._loglikelihood_tokens(asked, disable_tqdm=True)
    assert ours == plain._loglikelihood_tokens(asked, disable_tqdm=True)


def test_a_model_that_ignores_the_mask_is_run_plainly(embedded, monkeypatch):
    model, tokenizer = embedded
    items = [{"question": "import os\nimport ", "choices": ["sys", "zzqx", "return", "):"], "answer": 0}]
    expected = evaluate.accuracy(model, tokenizer, {"mini": items})

    class Deaf(type(model)):
        def forward(self, input_ids, attention_mask=None, position_ids=None):
            return super().forward(input_ids)

    monkeypatch.setattr(model, "__class__", Deaf)
    lm = SharedPrefixLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=64, device="cpu")
    assert not lm.suits()
    assert evaluate.accuracy(model, tokenizer, {"mini": items}) == expected
