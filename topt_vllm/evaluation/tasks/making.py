"""From names of tasks to their cases."""

import random
from collections.abc import Callable
from typing import Any

from topt_vllm.evaluation.cases import Case
from topt_vllm.evaluation.tasks.haystack import Haystack
from topt_vllm.evaluation.tasks.multikey import multikey
from topt_vllm.evaluation.tasks.questions import questions
from topt_vllm.evaluation.tasks.variables import variables
from topt_vllm.evaluation.tasks.words import common_words, frequent_words

# Each makes cases about one prompt, at least one and no more than asked for.
_MAKERS: dict[str, Callable[[Haystack, int], list[Case]]] = {
    "multikey": multikey,
    "variables": variables,
    "common-words": common_words,
    "frequent-words": frequent_words,
    "questions": questions,
}


def make_cases(task: str, tokenizer: Any, text: list[int], length: int, count: int) -> list[Case]:
    """Cases of a task, the same for the same text; those about one prompt are neighbours.

    Args:
        task: One of ``options.TASKS``.
        tokenizer: A transformers tokenizer.
        text: Tokens in which facts are hidden, with BOS if there is one; no fewer than ``length``.
        length: Of prompt and longest question (tokens).
        count: Of cases.

    Raises:
        EvaluationError: The task can't be set in so few tokens, or with this tokenizer and text.
    """
    too_short = (
        f"--task-lengths {length}: too short for {task}, whose facts, question and answer have {{needed}} tokens; "
        "name longer prompts"
    )
    haystack = Haystack(too_short, tokenizer, text, length, random.Random(f"{task} {length}"))
    cases: list[Case] = []
    while len(cases) < count:
        cases += _MAKERS[task](haystack, count - len(cases))
    return cases
