"""A fact hidden in a long text: does the model still find it when decoding under a rule?

The prompt, text and facts, is prefilled densely, as the server does. One question and its answer are decoded under
the rule. The fact is retrieved when the right number is likelier than every wrong one, and exact when each of its
tokens is the model's first choice.
"""

import random
from dataclasses import dataclass
from typing import Any

import torch

from topt_vllm.evaluation.options import EvaluationError
from topt_vllm.replay.attention import RuleAttention
from topt_vllm.replay.dense_pass import DensePass

_WRONG = 5
_PLACES = ("Lisbon", "Cairo", "Oslo", "Quito", "Delhi", "Lima", "Prague", "Dakar", "Perth", "Kyoto")
_FACT = "\n\nThe secret number of {place} is {number}.\n\n"
_QUESTION = "\n\nQuestion: What is the secret number of {place}?\nAnswer: The secret number of {place} is"


@dataclass(frozen=True)
class Needle:
    """One cell of the grid.

    Attributes:
        length: Tokens of prompt and the longest question.
        depth: Where the fact stands in the text, 0 to 1.
        prompt: Tokens of text and facts; others of the grid may share it.
        question: Tokens of the question.
        answers: Tokens of the answers, all of one length, the right one first.
    """

    length: int
    depth: float
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
    """A needle under one rule.

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

    def exact(self, needle: Needle) -> bool:
        """Whether greedy decoding gives the right answer."""
        return self.log_probabilities.argmax(dim=-1).tolist() == needle.answers[0]


def hide(
    tokenizer: Any, text: list[int], lengths: tuple[int, ...], depths: tuple[float, ...]
) -> list[Needle]:
    """The grid, the same for the same text; facts of one length share prompts, as many as there are places.

    Args:
        tokenizer: A transformers tokenizer.
        text: Tokens in which the facts are hidden, with BOS if there is one; no fewer than the longest prompt's.
        lengths: Of prompt and longest question (tokens).
        depths: Where a fact stands, 0 to 1.
    """
    source = random.Random(0)
    needles = []
    for length in lengths:
        for first in range(0, len(depths), len(_PLACES)):
            sharing = depths[first : first + len(_PLACES)]
            needles += _hide_in_one_prompt(tokenizer, text, length, sharing, source)
    return needles


def _hide_in_one_prompt(
    tokenizer: Any, text: list[int], length: int, depths: tuple[float, ...], source: random.Random
) -> list[Needle]:
    places = source.sample(_PLACES, len(depths))
    numbers = _numbers(tokenizer, source, len(depths) * (1 + _WRONG))
    right, wrong = numbers[: len(depths)], numbers[len(depths) :]
    facts = [
        _tokens(tokenizer, _FACT.format(place=place, number=number))
        for place, (number, _) in zip(places, right, strict=True)
    ]
    questions = [_tokens(tokenizer, _QUESTION.format(place=place)) for place in places]
    room = length - sum(map(len, facts)) - max(map(len, questions))
    if room < 1 + len(facts):
        raise EvaluationError(
            f"--needles {length}: too short for {len(facts)} facts and a question; name a longer prompt or "
            "fewer --depths"
        )
    prompt, copied = [], 0
    for depth, fact in sorted(zip(depths, facts, strict=True)):
        # The first token may be BOS, which nothing precedes.
        at = 1 + round(depth * (room - 1))
        prompt += text[copied:at] + fact
        copied = at
    prompt += text[copied:room]
    return [
        Needle(
            length, depth, prompt, question, [tokens for _, tokens in (right[i], *wrong[i :: len(depths)])]
        )
        for i, (depth, question) in enumerate(zip(depths, questions, strict=True))
    ]


def answer(
    prompt: DensePass,
    needle: Needle,
    right: RuleAttention | None,
    wrong: RuleAttention | None,
) -> Answered:
    """Answers a needle.

    Args:
        prompt: The dense pass over its prompt.
        needle: The needle.
        right: Attention while question and right answer are decoded; None for dense.
        wrong: The same, while the wrong answers are; apart, so that ``right`` counts each row once.
    """
    device = prompt.model.device
    likelihoods, known = [], []
    for answers, attention in ((needle.answers[:1], right), (needle.answers[1:], wrong)):
        inputs = torch.tensor([needle.question + tokens[:-1] for tokens in answers], device=device)
        hidden = prompt.decode(inputs, prompt.length, attention)
        last = slice(len(needle.question) - 1, None)
        for tokens, row, states in zip(answers, inputs, hidden, strict=True):
            with torch.inference_mode():
                found = prompt.model.log_probabilities(row[None, last], states[None, last]).cpu()
            likelihoods.append(found.gather(1, torch.tensor(tokens)[:, None]).sum().item())
            known.append(found)
    return Answered(known[0], likelihoods)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _numbers(tokenizer: Any, source: random.Random, count: int) -> list[tuple[int, list[int]]]:
    """Different numbers with as many tokens as the first."""
    found: list[tuple[int, list[int]]] = []
    while len(found) < count:
        number = source.randrange(10000, 100000)
        tokens = _tokens(tokenizer, f" {number}")
        if all(len(tokens) == len(other) and tokens != other for _, other in found):
            found.append((number, tokens))
    return found
