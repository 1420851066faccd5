"""A fact hidden in a long text: does the model still find it when decoding under a rule?"""

import random
from dataclasses import dataclass
from typing import Any

from topt_vllm.evaluation.cases import Case, hide_in, numbers, tokens_of
from topt_vllm.evaluation.options import EvaluationError

_WRONG = 5
_PLACES = ("Lisbon", "Cairo", "Oslo", "Quito", "Delhi", "Lima", "Prague", "Dakar", "Perth", "Kyoto")
_FACT = "\n\nThe secret number of {place} is {number}.\n\n"
_QUESTION = "\n\nQuestion: What is the secret number of {place}?\nAnswer: The secret number of {place} is"


@dataclass(frozen=True)
class Needle(Case):
    """One cell of the grid.

    Attributes:
        depth: Where the fact stands in the text, 0 to 1.
    """

    depth: float


def hide(
    tokenizer: Any, text: list[int], lengths: tuple[int, ...], depths: tuple[float, ...]
) -> list[Needle]:
    """The grid, the same for the same text; facts of one length share prompts, as many as there are places.

    Args:
        tokenizer: A transformers tokenizer.
        text: Tokens in which the facts are hidden, with BOS if there is one; no fewer than the longest prompt's.
        lengths: Of prompt, longest question and answer, whose last token isn't decoded.
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
    known = numbers(tokenizer, source, max(len(depths), 1 + _WRONG))
    right, spare = known[: len(depths)], known[len(depths) :]
    facts = [
        tokens_of(tokenizer, _FACT.format(place=place, number=number))
        for place, (number, _) in zip(places, right, strict=True)
    ]
    questions = [tokens_of(tokenizer, _QUESTION.format(place=place)) for place in places]
    room = length - sum(map(len, facts)) - max(map(len, questions)) - len(known[0][1]) + 1
    if room < 1 + len(facts):
        raise EvaluationError(
            f"--needles {length}: too short for {len(facts)} facts and a question; name a longer prompt or "
            "fewer --depths"
        )
    prompt = hide_in(text, sorted(zip(depths, facts, strict=True)), room)
    needles = []
    for i, (depth, question) in enumerate(zip(depths, questions, strict=True)):
        # What other places have is wrong, so that a number isn't right for standing in the prompt.
        others = right[i + 1 :] + right[:i] + spare
        answers = [tokens for _, tokens in (right[i], *others[:_WRONG])]
        needles.append(Needle(length, prompt, question, answers, depth))
    return needles
