"""Tokens per second of whole models: ``generate`` with packed weights beside torch, in one process, interleaved.

All candidates are in memory at once; each generates once a round, in random order. The first token of a generation
(the prompt is read, prefill) is timed apart from the others (decode steps). A step during which threads of this
process waited for a processor is not counted (`sfmp.bench.timing`).

Packed models keep embeddings, norms and the output layer in bfloat16, as a user has them who loads a bfloat16
checkpoint; they share these with the bfloat16 candidate. Random models have random weights: only their times mean
something.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import time
from collections.abc import Iterable

import torch
from torch import nn

from sfmp.bench.random_model import SHAPES, quantize_randomly, random_network
from sfmp.bench.timing import WAITED, first_served, median, waiting
from sfmp.checks import SfmpError, integer
from sfmp.linear import SFMPLinear

EMBEDDED = "embedded"
BPW = (2.5, 3.0, 4.0)
MODES = ("lut16", "lut8", "exact")
CALIBRATION = 8, 256  # windows, tokens: for the widths of blocks, on which time depends
WARM_TOKENS = 3


@dataclasses.dataclass
class Decoder:
    """A model that generates, and what is known about it.

    Attributes
    ----------
    model, weights : str
        "1.1B", "torch bf16" or "sfmp lut16".
    network : transformers model
    mode, bpw : of the packed layers; None without
    random : bool
        Whether the weights are random, so that only times mean something.
    """

    model: str
    weights: str
    network: nn.Module
    mode: str | None = None
    bpw: float | None = None
    random: bool = False


class _Clock:
    """A streamer that notes when each token came, and whether threads had to wait for a processor meanwhile.

    The time it takes itself is not part of any step.
    """

    def __init__(self):
        self.steps: list[tuple[float, float]] = []  # seconds and seconds waited, the prompt first
        self.own = 0.0
        self._last: tuple[float, float] | None = None

    def put(self, tokens):
        arrived, waited = time.perf_counter(), waiting()
        if self._last is not None:
            self.steps.append((arrived - self._last[0], waited - self._last[1]))
        self._last = time.perf_counter(), waited
        self.own += self._last[0] - arrived

    def end(self):
        """Called by ``generate`` after the last token, which has been noted."""


def measure_decode(decoders: list[Decoder], *, prompt_tokens: int = 32, new_tokens: int = 32, rounds: int = 5,
                   batch: int = 1, seed: int = 0) -> list[dict]:
    """Generate with every model in `rounds` rounds.

    Parameters
    ----------
    decoders : list of Decoder
    prompt_tokens, new_tokens : int
        Of each sequence; the prompt is random tokens.
    rounds, batch, seed : int

    Returns
    -------
    list of dict
        One row per decoder: model, weights, mode, bpw, random, batch, prompt_tokens, new_tokens, threads, rounds;
        prefill_seconds and prefill_tokens_per_second; seconds_per_token (median of the decode steps) and
        tokens_per_second = batch / it; generate_seconds and generate_tokens_per_second, end to end with the prompt;
        weight_bytes of one step (`weight_bytes`) and gigabytes_per_second = weight_bytes / seconds_per_token;
        counted, the share of steps that were; steps, the median step of each round, seconds or None. Medians
        over rounds; None where nothing was counted.

    Raises
    ------
    SfmpError
        Sizes below 1, or fewer than two new tokens, which is no decode step.
    """
    for name, value, low in (("prompt_tokens", prompt_tokens, 1), ("new_tokens", new_tokens, 2), ("rounds", rounds, 1),
                             ("batch", batch, 1)):
        integer(name, value, low)
    order, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    notes = [[] for _ in decoders]
    for decoder in decoders:
        _generate(decoder, _prompt(decoder, batch, prompt_tokens, generator), WARM_TOKENS)
    for _ in range(rounds):
        for index in order.sample(range(len(decoders)), len(decoders)):
            prompt = _prompt(decoders[index], batch, prompt_tokens, generator)
            notes[index].append(_generate(decoders[index], prompt, new_tokens))
    sizes = {"batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens,
             "threads": torch.get_num_threads(), "rounds": rounds}
    return [_row(decoder, noted, sizes) for decoder, noted in zip(decoders, notes, strict=True)]


def _prompt(decoder, batch, tokens, generator):
    # The first tokens of a vocabulary are often special.
    return torch.randint(3, decoder.network.config.vocab_size, (batch, tokens), generator=generator)


def _generate(decoder, prompt, new_tokens):
    """(seconds of the whole, the steps of its clock)."""
    for layer in decoder.network.modules():
        if isinstance(layer, SFMPLinear):
            layer.backend, layer.mode = "cpu", decoder.mode
    with torch.no_grad():
        decoder.network(prompt[:, :1])  # a layer's first product in another mode takes the long way
    clock = _Clock()
    start = time.perf_counter()
    # min_new_tokens: models that can end a text go on, too.
    with first_served():
        decoder.network.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, use_cache=True,
                                 min_new_tokens=new_tokens, max_new_tokens=new_tokens, streamer=clock)
    return time.perf_counter() - start - clock.own, clock.steps


def _row(decoder, noted, sizes):
    facts = {field.name: getattr(decoder, field.name) for field in dataclasses.fields(decoder)
             if field.name != "network"}
    steps = [step for _, (_, *decoding) in noted for step in decoding]
    step = median(map(_counted, steps))
    prefill = median(_counted(first) for _, (first, *_) in noted)
    whole = median(_counted((seconds, sum(waited for _, waited in clock))) for seconds, clock in noted)
    read, batch = weight_bytes(decoder.network), sizes["batch"]
    return {
        **facts, **sizes,
        "prefill_seconds": prefill, "prefill_tokens_per_second": _rate(batch * sizes["prompt_tokens"], prefill),
        "seconds_per_token": step, "tokens_per_second": _rate(batch, step),
        "generate_seconds": whole, "generate_tokens_per_second": _rate(batch * sizes["new_tokens"], whole),
        "weight_bytes": read, "gigabytes_per_second": _rate(read / 1e9, step),
        "counted": sum(_counted(s) is not None for s in steps) / len(steps),
        "steps": [median(map(_counted, decoding)) for _, (_, *decoding) in noted],
    }


def _counted(step):
    seconds, waited = step
    return None if waited > WAITED * seconds else seconds


def _rate(amount, seconds):
    return None if seconds is None else amount / seconds


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that one decode step reads: what is stored of packed matrices, and linear layers as they are.

    The row of the embeddings and the norms are not counted.
    """
    packed = [layer.packed.nbytes for layer in model.modules() if isinstance(layer, SFMPLinear)]
    dense = [parameter.nbytes for layer in model.modules() if isinstance(layer, nn.Linear)
             for parameter in layer.parameters()]
    return sum(packed) + sum(dense)


def decoders_of(model: str, bpw: Iterable[float] = BPW, modes: Iterable[str] = MODES,
                references=("torch fp32", "torch bf16"), seed: int = 0) -> list[Decoder]:
    """Return what is compared for one model: torch, and packed weights of each `bpw` in each mode.

    All are in memory together: for 1.1B parameters about 10 GB.

    Parameters
    ----------
    model : "embedded" or a name of `sfmp.bench.random_model.SHAPES`
        The embedded model is quantized for real (salience, plan, rounding to nearest); others are random.
    bpw, modes
    references : of "torch fp32", "torch bf16"
        The bfloat16 model is made anyway, for what packed models share with it.
    """
    if model != EMBEDDED and model not in SHAPES:
        raise SfmpError(f"model: expected {EMBEDDED} or one of {', '.join(SHAPES)}, found {model!r}")
    if model == EMBEDDED:
        dense, packed_of = _embedded()
    else:
        dense = random_network(model, torch.float32, seed)

        def packed_of(value):
            return quantize_randomly(sharing(rounded), value, seed=seed)

    rounded = copy.deepcopy(dense).to(torch.bfloat16)
    facts = {"random": model != EMBEDDED}
    found = {"torch fp32": dense, "torch bf16": rounded}
    decoders = [Decoder(model, label, found[label], **facts) for label in references]
    del dense, found
    for value in bpw:
        network = packed_of(value)
        decoders += [Decoder(model, f"sfmp {mode}", network, mode, value, **facts) for mode in modes]
    return decoders


def _embedded():
    """(dense model, bpw → the model quantized)."""
    from sfmp import QuantSpec, embedded, fisher_salience, make_plan, quantize_model
    from sfmp.data import calibration_windows, load_text

    dense, tokenizer = embedded.load()
    windows = calibration_windows(load_text("python:calibration"), tokenizer, *CALIBRATION)
    salience = fisher_salience(dense, windows)

    def packed_of(bpw):
        plan = make_plan(salience, QuantSpec(bpw=bpw, method="rtn"))
        return quantize_model(copy.deepcopy(dense), plan).to(torch.bfloat16)

    return dense, packed_of


def sharing(model: nn.Module) -> nn.Module:
    """Return a copy of the module tree that shares all parameters and buffers with the model."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
