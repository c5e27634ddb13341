"""Greedy decoding with a static cache: every token the same work at the same addresses, so that one CUDA graph does it.

Where a step reads and writes depends on tensors only: transformers' StaticCache keeps its length on the device and
advances it in place, positions and the mask are computed from it, the token that was chosen lies in a buffer, and a
counter says where in the history it goes. Nothing comes back from the device before `tokens`.

Source: CUDA.md section 7; transformers 5.17 to 5.23, `cache_utils.StaticLayer`.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from sfmp.checks import SfmpError

WARM_STEPS = 3


class StaticDecoder:
    """A model, a cache for one prompt and its continuation, and the graph of a step once it was captured.

    Parameters
    ----------
    network : transformers causal language model
    prompt_tokens, new_tokens : int
        The most that will be asked for.
    batch : int
    compiled : callable, optional
        The network as ``torch.compile`` gives it, for steps; prompts are read without.
    """

    def __init__(self, network: nn.Module, prompt_tokens: int, new_tokens: int, batch: int = 1, compiled=None):
        steps = max(new_tokens, WARM_STEPS)
        self.network, self._stepping = network, network if compiled is None else compiled
        self.cache = StaticCache(config=network.config, max_cache_len=prompt_tokens + steps)
        if any(type(layer) is not StaticLayer for layer in self.cache.layers):
            kinds = sorted({type(layer).__name__ for layer in self.cache.layers})
            raise SfmpError(f"network: expected full attention in every layer, found caches {', '.join(kinds)}, which "
                            "keep their length outside the device; choose a model without sliding windows")
        device = network.get_input_embeddings().weight.device
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.history = torch.zeros(batch, steps + 1, dtype=torch.int64, device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.replay = None

    def start(self, prompt: torch.Tensor) -> None:
        """Forget what was before, read a prompt, int64 [batch, tokens], and choose the token after it; no graph."""
        self.cache.reset()
        self.count.zero_()
        self._read(self.network, prompt)

    def step(self) -> None:
        """Read the token that was chosen last and choose the next; the same work at any position."""
        self._read(self._stepping, self.token)

    @torch.no_grad()
    def _read(self, network, ids):
        logits = network(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.token.copy_(logits[:, -1].argmax(dim=-1, keepdim=True))
        self.history.index_copy_(1, self.count, self.token)
        self.count.add_(1)

    def capture(self) -> None:
        """Make a step a CUDA graph, after a `start`; the next generation needs another `start`.

        The steps that warm up run on another stream, as ``torch.cuda.graph`` wants it.
        """
        side = torch.cuda.Stream(self.token.device)
        side.wait_stream(torch.cuda.current_stream(self.token.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_STEPS):
                self.step()
        torch.cuda.current_stream(self.token.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        self.replay = graph.replay

    def run(self, steps: int, graph: bool) -> None:
        """Enqueue that many steps, as replays of the graph or one operation after another."""
        step = self.replay if graph else self.step
        for _ in range(steps):
            step()

    def tokens(self) -> torch.Tensor:
        """What was generated since `start`, int64 [batch, tokens], on the CPU: a copy, whatever comes next."""
        return self.history[:, : int(self.count)].to("cpu", copy=True)
