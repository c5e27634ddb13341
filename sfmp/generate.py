"""Text that appears token by token."""

from __future__ import annotations

from collections.abc import Callable

from sfmp.checks import SfmpError, integer
from sfmp.model_source import context_of

_PLAIN = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
          "typical_p": 1.0, "min_p": None}


class TextPieces:
    """A transformers streamer that hands on text as soon as its characters are complete.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    write : callable (str)
        Called with each new piece; pieces joined are what the new tokens add to the decoded prompt. (Decoded alone
        they may lack their first space.)
    """

    TAIL = 8  # tokens of the prompt that decide how the first new one is decoded

    def __init__(self, tokenizer, write: Callable[[str], object]):
        self.tokenizer, self.write = tokenizer, write
        self.tokens: list[int] | None = None
        self.shown = 0  # tokens at the head of `tokens` whose text was handed on

    def put(self, tokens) -> None:
        """Take the prompt first (not shown), then the tokens of one step."""
        tokens = tokens.reshape(-1).tolist()
        if self.tokens is None:
            self.tokens = tokens[-self.TAIL:]
            self.shown = len(self.tokens)
            return
        self.tokens += tokens
        piece = self._unshown()
        if not piece.endswith("\N{REPLACEMENT CHARACTER}"):  # else the bytes of a character are not all there yet
            self._show(piece)

    def end(self) -> None:
        """Hand on what is left."""
        self._show(self._unshown())

    def _unshown(self):
        return self._text(self.tokens)[len(self._text(self.tokens[:self.shown])):]

    def _text(self, tokens):
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _show(self, piece):
        if piece:
            self.write(piece)
            self.tokens = self.tokens[max(0, self.shown - self.TAIL):]  # decoding stays short however long the text is
            self.shown = len(self.tokens)


def generate(model, tokenizer, prompt: str, *, tokens: int = 100, temperature: float = 0.0, top_p: float = 1.0,
             seed: int = 0, write: Callable[[str], object] = lambda piece: None) -> str:
    """Continue a text.

    Parameters
    ----------
    model, tokenizer
        A causal language model of transformers, quantized or not.
    prompt : str
        An empty one starts from the tokenizer's first token.
    tokens : int
        Largest number of new tokens; fewer if the model ends the text.
    temperature : float
        0 takes the likeliest token at each step. Penalties, beams and the like of the model's own settings are unused;
        its end-of-text tokens are.
    top_p : float
        With a temperature: sample among the likeliest tokens that have this total probability.
    seed : int
        Of the sampling; the same seed gives the same text.
    write : callable (str)
        Called with each piece of new text as it comes.

    Returns
    -------
    str
        The new text without the prompt.

    Raises
    ------
    SfmpError
        A number out of range, a prompt that leaves no room in the model's context, or no token to start from.
    """
    import torch

    integer("tokens", tokens, 1)
    if not 0 <= temperature < float("inf") or not 0 < top_p <= 1:
        raise SfmpError(f"temperature, top_p: expected a temperature >= 0 and top_p within 0..1, found {temperature} "
                        f"and {top_p}; correct them")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].long()
    if ids.numel() == 0:
        if tokenizer.bos_token_id is None:
            raise SfmpError("prompt: expected text, found none, and this tokenizer has no first token; give some")
        ids = torch.tensor([[tokenizer.bos_token_id]])
    context = context_of(model, ids.shape[1] + tokens)
    if ids.shape[1] + tokens > context:
        raise SfmpError(f"prompt: expected at most {context} tokens together with the {tokens} new ones, found "
                        f"{ids.shape[1]} in the prompt; shorten it or ask for fewer")
    chosen = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {
        "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    pieces: list[str] = []

    def take(piece):
        pieces.append(piece)
        write(piece)

    ids = ids.to(model.device)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(integer("seed", seed, 0))
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, pad_token_id=padding,
                       streamer=TextPieces(tokenizer, take), **_PLAIN, **chosen)
    return "".join(pieces)
