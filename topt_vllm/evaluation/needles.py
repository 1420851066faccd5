"""A fact hidden in a long text: does the model still find it when decoding under a rule?"""

import random
from dataclasses import dataclass
from typing import Any

from topt_vllm.evaluation.cases import Case
from topt_vllm.evaluation.tasks.haystack import WRONG, Haystack, Question

_PLACES = ("Lisbon", "Cairo", "Oslo", "Quito", "Delhi", "Lima", "Prague", "Dakar", "Perth", "Kyoto")
_FACT = "The secret number of {place} is {number}."
_QUESTION = "What is the secret number of {place}?\nAnswer: The secret number of {place} is"


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
        too_short = (
            f"--needles {length}: too short for {{facts}} facts and a question; name a longer prompt or "
            "fewer --depths"
        )
        haystack = Haystack(too_short, tokenizer, text, length, source)
        for first in range(0, len(depths), len(_PLACES)):
            needles += _hide_in_one_prompt(haystack, depths[first : first + len(_PLACES)])
    return needles


def _hide_in_one_prompt(haystack: Haystack, depths: tuple[float, ...]) -> list[Needle]:
    places = haystack.source.sample(_PLACES, len(depths))
    known = haystack.numbers(max(len(depths), 1 + WRONG))
    right, spare = known[: len(depths)], known[len(depths) :]
    facts = [_FACT.format(place=place, number=number) for place, number in zip(places, right, strict=True)]
    questions = []
    for i, place in enumerate(places):
        # What other places have is wrong, so that a number isn't right for standing in the prompt.
        others = right[i + 1 :] + right[:i] + spare
        questions.append(Question(_QUESTION.format(place=place), [right[i], *others[:WRONG]]))
    cases = haystack.cases(facts, questions, depths)
    return [Needle(**vars(case), depth=depth) for case, depth in zip(cases, depths, strict=True)]
