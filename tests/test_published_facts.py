"""Facts the publications report that can be checked offline, on the model that is shipped.

The numbers of METHOD.md 2.1 and 2.2 are of models a thousand times as large.  What has to carry over is the
order and where the gap opens; how far it opens does not, and where it does not the test says so.
"""

import copy
import math

import pytest

import sfmp.awq
from sfmp import data, stages
from sfmp.baselines import uniform
from sfmp.stage_evaluation import perplexity

TWO_BITS, THREE_BITS = 2.25, 3.25  # with groups of 128


@pytest.fixture(scope="module")
def excess(embedded):
    """Nats per token that ``method(model, windows, bpw)`` adds to the loss; measured once per case."""
    original, tokenizer = embedded
    documents = stages.documents("embedded", "calibration")
    windows = data.calibration_windows(documents, tokenizer, n_windows=8, seqlen=256, seed=0)
    evaluation, _ = stages.evaluation_set("embedded", tokenizer, 4, 512)
    reference = math.log(perplexity(original, evaluation, 512))
    known = {}

    def measured(method, bpw):
        if (method, bpw) not in known:
            model = copy.deepcopy(original)
            method(model, windows, bpw)
            known[method, bpw] = math.log(perplexity(model, evaluation, 512)) - reference
        return known[method, bpw]

    return measured


def _awq(model, windows, bpw):
    """AWQ on half of the windows and a coarser grid of exponents (0, 1/4, 1/2, 3/4), for speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sfmp.awq, "GRID", 4)
        uniform.awq(model, windows[::2], bpw)


def _awq_without_clip(model, windows, bpw):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sfmp.awq, "SHRINK", (1.0,))
        _awq(model, windows, bpw)


@pytest.mark.parametrize("bpw", [TWO_BITS, THREE_BITS])
def test_gptq_adds_less_than_two_thirds_of_the_loss_of_rtn(excess, bpw):
    """METHOD 2.1: LLaMA-7B at 3 bits, RTN 25.54 and GPTQ 6.61 with groups (FP 5.68): 1.50 and 0.15 nats."""
    assert 0 < excess(uniform.gptq, bpw) < excess(uniform.rtn, bpw) * 2 / 3


def test_the_gap_between_rtn_and_gptq_opens_towards_two_bits(excess):
    gaps = [excess(uniform.rtn, bpw) - excess(uniform.gptq, bpw) for bpw in (THREE_BITS, TWO_BITS)]
    assert gaps[1] > 4 * gaps[0] > 0


def test_three_bits_are_close_to_full_precision_and_two_are_not(excess):
    """METHOD 2.1: Llama-3-8B (FP 5.75), GPTQ 8.19 at 3 bits and 210 at 2: 0.35 and 3.6 nats."""
    assert excess(uniform.gptq, THREE_BITS) < 0.35
    assert excess(uniform.gptq, TWO_BITS) > 5 * excess(uniform.gptq, THREE_BITS)


def test_awq_without_clip_loses_its_lead_at_two_bits(excess):
    """METHOD 2.2: without asymmetric clipping AWQ fails completely at 2 bits.

    The published perplexities of 1e5 and more do not show here: even plain rounding stays near 100 on this
    model.  What holds is that without the clip AWQ is hardly better than rounding at 2 bits and at least
    doubles the perplexity that it has with the clip, while at 3 bits it stays usable.
    """
    plain, clipped = excess(uniform.rtn, TWO_BITS), excess(_awq, TWO_BITS)
    unclipped = excess(_awq_without_clip, TWO_BITS)
    assert clipped < 0.5 * plain
    assert unclipped > clipped + 0.7  # twice the perplexity
    assert unclipped > 0.8 * plain
    assert excess(_awq_without_clip, THREE_BITS) < 0.35
