"""An lm-eval model that reads a question once for all its choices.

lm-eval scores every choice as a sequence of its own, so the question is computed four times. Here the choices of a
question are branches of one sequence: a branch sees the question and itself, and its positions go on from the
question's end. The numbers are the same (the model is asked to prove it before it is used), for about a third of the
work.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from lm_eval.models.huggingface import HFLM

Request = tuple[tuple[str, str], list[int], list[int]]  # strings, tokens of the question, tokens of the choice


class SharedPrefixLM(HFLM):
    """HFLM whose log-likelihoods of choices with a common question come from one branched sequence.

    Use :meth:`suits` before: a model that ignores four-dimensional attention masks must run as plain HFLM.
    """

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ):
        if any(len(question) + len(choice) > self.max_length + 1 for _, question, choice in requests):
            # Too long for the context: the parent truncates, by lm-eval's own rule.
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        trees = defaultdict(list)  # question → indices of its requests
        for index, (_, question, _) in enumerate(requests):
            trees[tuple(question)].append(index)
        # Longest first: rows of a batch are of similar length, and a batch that does not fit memory fails at once.
        order = sorted(trees.items(), key=lambda tree: -_length(tree, requests))
        answers: list[tuple[float, bool] | None] = [None] * len(requests)
        step = max(1, int(override_bs or self.batch_size) // 2)
        for start in range(0, len(order), step):
            batch = order[start : start + step]
            for index, answer in self._score(batch, requests):
                answers[index] = answer
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
        return answers

    def _score(self, trees: list[tuple[tuple[int, ...], list[int]]], requests: list[Request]):
        """Run one batch of trees; yield (index of the request, (log-likelihood, whether greedy))."""
        width = max(_length(tree, requests) for tree in trees)
        ids = torch.zeros(len(trees), width, dtype=torch.int64)
        positions = torch.zeros_like(ids)
        sees = torch.zeros(len(trees), width, width, dtype=torch.bool)
        sees[:, range(width), range(width)] = True  # padding sees itself: no row of the softmax is empty
        places = []  # (request, row, positions whose logits predict the choice, tokens of the choice)
        for row, (question, indices) in enumerate(trees):
            end = len(question)
            ids[row, :end], positions[row, :end] = torch.tensor(question), torch.arange(end)
            sees[row, :end, :end] = torch.ones(end, end).tril().bool()
            at = end
            for index in indices:
                choice = requests[index][2]
                branch = slice(at, at + len(choice) - 1)  # the last token is predicted, not read
                length = len(choice) - 1
                ids[row, branch] = torch.tensor(choice[:-1], dtype=torch.int64)
                positions[row, branch] = torch.arange(end, end + length)
                sees[row, branch, :end] = True
                sees[row, branch, branch] = torch.ones(length, length).tril().bool()
                places.append((index, row, [end - 1, *range(at, at + length)], choice))
                at += length
        mask = torch.zeros(sees.shape, dtype=self.model.dtype).masked_fill(~sees, torch.finfo(self.model.dtype).min)
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask[:, None]}
        with torch.no_grad():
            logits = self.model(**{name: value.to(self.device) for name, value in inputs.items()}).logits
        for index, row, predicting, choice in places:
            logp = logits[row, predicting].float().log_softmax(-1)
            target = torch.tensor(choice, device=logp.device)
            total = logp.gather(1, target[:, None]).sum().item()
            yield index, (total, bool((logp.argmax(-1) == target).all()))

    def suits(self) -> bool:
        """Compare a branched sequence with plain sequences on fixed tokens: True if the model gives the same
        numbers."""
        question, choices = list(range(3, 20)), ([5, 6, 7], [8], [9, 10, 11, 12])
        requests = [(None, question, choice) for choice in choices]
        branched = self._loglikelihood_tokens(requests)
        for (total, _), choice in zip(branched, choices, strict=True):
            sequence = torch.tensor([question + choice], device=self.device)
            with torch.no_grad():
                logp = self.model(input_ids=sequence).logits[0].float().log_softmax(-1)
            plain = sum(logp[len(question) - 1 + i, token].item() for i, token in enumerate(choice))
            if abs(plain - total) > 1e-3 * max(1.0, abs(plain)):
                return False
        return True


def _length(tree: tuple[tuple[int, ...], list[int]], requests: list[Request]) -> int:
    """Tokens of the branched sequence: the question once, and each choice without its last token."""
    question, indices = tree
    return len(question) + sum(len(requests[index][2]) - 1 for index in indices)
