"""What the prompts of a task are made from, and how questions about them become cases."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from topt_vllm.evaluation.cases import Case, answer_of, hide_in, tokens_of
from topt_vllm.evaluation.options import EvaluationError

# Wrong answers of a question.
WRONG = 5
# Numbers drawn for one that is wanted.
_DRAWS = 100


@dataclass(frozen=True)
class Question:
    """A question about a prompt.

    Attributes:
        text: Up to where the answer begins.
        answers: The right one first, each with equally many tokens behind a space.
    """

    text: str
    answers: list[str]


@dataclass(frozen=True)
class Haystack:
    """A text to hide a task's facts in.

    Attributes:
        too_short: What is said of a prompt with too little room, given ``facts`` and ``needed`` tokens.
        tokenizer: A transformers tokenizer.
        text: Tokens, with BOS if there is one; no fewer than the prompt's.
        length: Tokens of prompt, longest question and answer, whose last isn't decoded.
        source: Of what is left to chance.
    """

    too_short: str
    tokenizer: Any
    text: list[int]
    length: int
    source: random.Random

    def tokens(self, text: str) -> list[int]:
        """Without BOS."""
        return tokens_of(self.tokenizer, text)

    def alike(self, words: list[str], count: int) -> list[str]:
        """``count`` of the words, by chance, which behind a space have different tokens and equally many.

        Raises:
            EvaluationError: The tokenizer has no such.
        """
        by_tokens = {tuple(answer_of(self.tokenizer, word)): word for word in words}
        groups: dict[int, list[str]] = {}
        for tokens, word in by_tokens.items():
            groups.setdefault(len(tokens), []).append(word)
        largest = max(groups.values(), key=len, default=[])
        if len(largest) < count:
            raise EvaluationError(
                f"of {len(by_tokens)} words no more than {len(largest)} have equally many tokens, and --tasks "
                f"needs {count}; leave out the task, or take another text"
            )
        return self.source.sample(largest, count)

    def numbers(self, count: int) -> list[str]:
        """Different numbers with as many tokens as the first.

        Raises:
            EvaluationError: The tokenizer doesn't tell so many apart.
        """
        found: dict[str, list[int]] = {}
        for _ in range(_DRAWS * count):
            number = str(self.source.randrange(10000, 100000))
            tokens = answer_of(self.tokenizer, number)
            if all(len(tokens) == len(other) and tokens != other for other in found.values()):
                found[number] = tokens
            if len(found) == count:
                return list(found)
        raise EvaluationError(
            f"the tokenizer tells {len(found)} numbers of five digits apart, and {count} are needed; leave out "
            "--needles and --tasks"
        )

    def cases(self, facts: list[str], questions: list[Question], depths: Sequence[float] = ()) -> list[Case]:
        """Cases that share a prompt, where the facts stand at ``depths``, 0 to 1; without any, scattered in order.

        Raises:
            EvaluationError: The prompt is too short for them.
        """
        pieces = [self.tokens(f"\n\n{fact}\n\n") for fact in facts]
        asked = [self.tokens(f"\n\nQuestion: {question.text}") for question in questions]
        answers = [[answer_of(self.tokenizer, words) for words in question.answers] for question in questions]
        decoded = max(len(tokens) + len(known[0]) for tokens, known in zip(asked, answers, strict=True)) - 1
        needed = sum(map(len, pieces)) + decoded
        if needed + len(pieces) >= self.length:
            raise EvaluationError(self.too_short.format(facts=len(pieces), needed=needed))
        depths = depths or sorted(self.source.random() for _ in pieces)
        prompt = hide_in(self.text, sorted(zip(depths, pieces, strict=True)), self.length - needed)
        return [
            Case(self.length, prompt, tokens, known) for tokens, known in zip(asked, answers, strict=True)
        ]
