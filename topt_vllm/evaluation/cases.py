"""Questions behind long prompts: does the model still answer when it decodes under a rule?

The prompt is prefilled densely, as the server does; question and answer are decoded under the rule. An answer is
retrieved when the right one is likelier than every wrong one, and exact when each of its tokens is the model's
first choice.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from topt_vllm.replay.attention import RuleAttention
from topt_vllm.replay.dense_pass import DensePass


@dataclass(frozen=True)
class Case:
    """One question.

    Attributes:
        length: Tokens of prompt, the longest question behind it, and the answer but for its last.
        prompt: Its tokens; other cases may share it.
        question: Its tokens.
        answers: Tokens of the answers, all of one length, the right one first.
    """

    length: int
    prompt: list[int]
    question: list[int]
    answers: list[list[int]]

    @property
    def right(self) -> torch.Tensor:
        """Tokens of the right answer, int64."""
        return torch.tensor(self.answers[0])

    @property
    def contexts(self) -> torch.Tensor:
        """Contexts of the decoded rows: the question, and all but the last token of an answer; int64."""
        decoded = len(self.question) + len(self.answers[0]) - 1
        return torch.arange(1, decoded + 1) + len(self.prompt)


@dataclass(frozen=True)
class Answered:
    """A case under one rule.

    Attributes:
        log_probabilities: float32 [answer tokens, vocabulary], before each token of the right answer.
        likelihoods: Log likelihood of each answer.
    """

    log_probabilities: torch.Tensor
    likelihoods: list[float]

    @property
    def margin(self) -> float:
        """Log likelihood of the right answer over that of the likeliest wrong one (nats)."""
        return self.likelihoods[0] - max(self.likelihoods[1:])

    @property
    def retrieved(self) -> bool:
        """Whether the right answer is the likeliest."""
        return self.margin > 0

    def exact(self, case: Case) -> bool:
        """Whether greedy decoding gives the right answer."""
        return self.log_probabilities.argmax(dim=-1).tolist() == case.answers[0]


def batches(cases: Iterable[Case]) -> list[list[Case]]:
    """Neighbours that can be decoded together: behind one prompt, with as many tokens."""

    def alike(case: Case) -> tuple[int, ...]:
        return id(case.prompt), len(case.question), len(case.answers), len(case.answers[0])

    return [list(batch) for _, batch in groupby(cases, alike)]


def answer(
    prompt: DensePass,
    batch: Sequence[Case],
    right: RuleAttention | None,
    wrong: RuleAttention | None,
) -> list[Answered]:
    """Answers the cases of a batch.

    Args:
        prompt: The dense pass over their prompt.
        batch: The cases.
        right: Attention while questions and right answers are decoded; None for dense.
        wrong: The same, while the wrong answers are; apart, so that ``right`` counts each row once.
    """
    before: list[torch.Tensor] = []
    likelihoods: list[list[float]] = [[] for _ in batch]
    last = slice(len(batch[0].question) - 1, None)
    for which, attention in ((slice(1), right), (slice(1, None), wrong)):
        asked = [(index, tokens) for index, case in enumerate(batch) for tokens in case.answers[which]]
        rows = [batch[index].question + tokens[:-1] for index, tokens in asked]
        inputs = torch.tensor(rows, device=prompt.model.device)
        hidden = prompt.decode(inputs, prompt.length, attention)
        for (index, tokens), row, states in zip(asked, inputs, hidden, strict=True):
            with torch.inference_mode():
                found = prompt.model.log_probabilities(row[None, last], states[None, last]).cpu()
            likelihoods[index].append(found.gather(1, torch.tensor(tokens)[:, None]).sum().item())
            # Right answers come first, and only theirs are wanted.
            if len(before) < len(batch):
                before.append(found)
    return [Answered(*known) for known in zip(before, likelihoods, strict=True)]


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Without BOS."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def answer_of(tokenizer: Any, words: str) -> list[int]:
    """Tokens of an answer behind a space, as they stand within a text: some tokenizers begin one with a space."""
    before, whole = (tokens_of(tokenizer, text) for text in ("is", f"is {words}"))
    return whole[len(before) :] if whole[: len(before)] == before else tokens_of(tokenizer, f" {words}")


def hide_in(text: list[int], facts: Iterable[tuple[float, list[int]]], room: int) -> list[int]:
    """A prompt: the text's first ``room`` tokens with the facts at their depths, 0 to 1, ascending."""
    prompt, copied = [], 0
    for depth, fact in facts:
        # The first token may be BOS, which nothing precedes.
        at = 1 + round(depth * (room - 1))
        prompt += text[copied:at] + fact
        copied = at
    return prompt + text[copied:room]
