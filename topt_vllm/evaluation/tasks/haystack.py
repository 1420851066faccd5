"""What the prompts of a task are made from, and how questions about them become cases."""

import random
from dataclasses import dataclass
from typing import Any

from topt_vllm.evaluation.cases import Case, answer_of, hide_in, numbers, tokens_of
from topt_vllm.evaluation.options import EvaluationError

# Wrong answers of a question.
WRONG = 5


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
        task: Its name.
        tokenizer: A transformers tokenizer.
        text: Tokens, with BOS if there is one; no fewer than the prompt's.
        length: Tokens of prompt, longest question and answer, whose last isn't decoded.
        source: Of what is left to chance.
    """

    task: str
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
        """Different numbers with equally many tokens."""
        return [str(number) for number, _ in numbers(self.tokenizer, self.source, count)]

    def cases(self, facts: list[str], questions: list[Question]) -> list[Case]:
        """Cases that share a prompt, in which the facts stand scattered and in their order.

        Raises:
            EvaluationError: The prompt is too short for them.
        """
        pieces = [self.tokens(f"\n\n{fact}\n\n") for fact in facts]
        asked = [self.tokens(f"\n\nQuestion: {question.text}") for question in questions]
        answers = [[answer_of(self.tokenizer, words) for words in question.answers] for question in questions]
        decoded = max(len(tokens) + len(known[0]) for tokens, known in zip(asked, answers, strict=True)) - 1
        needed = sum(map(len, pieces)) + decoded
        if needed + len(pieces) >= self.length:
            raise EvaluationError(
                f"--task-lengths {self.length}: too short for {self.task}, whose facts, question and answer have "
                f"{needed} tokens; name longer prompts"
            )
        depths = sorted(self.source.random() for _ in pieces)
        prompt = hide_in(self.text, zip(depths, pieces, strict=True), self.length - needed)
        return [
            Case(self.length, prompt, tokens, known) for tokens, known in zip(asked, answers, strict=True)
        ]
