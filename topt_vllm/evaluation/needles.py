"""A fact hidden in a long text: does the model still find it when decoding under a rule?

The prompt, text and fact, is prefilled densely, as the server does. The question and the answer are decoded under
the rule. The fact is retrieved when the right number is likelier than every wrong one, and exact when each of its
tokens is the model's first choice.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from topt_vllm.calibration.model import Subject
from topt_vllm.evaluation.attention import Counts, attending
from topt_vllm.evaluation.options import EvaluationError
from topt_vllm.evaluation.perplexity import Comparison, log_probabilities
from topt_vllm.evaluation.rules.base import Rule

_WRONG = 5
_PLACES = ("Lisbon", "Cairo", "Oslo", "Quito", "Delhi", "Lima", "Prague", "Dakar", "Perth", "Kyoto")
_FACT = "\n\nThe secret number of {place} is {number}.\n\n"
_QUESTION = "\n\nQuestion: What is the secret number of {place}?\nAnswer: The secret number of {place} is"


@dataclass(frozen=True)
class Needle:
    """One cell of the grid.

    Attributes:
        length: Tokens of prompt and question.
        depth: Where the fact stands in the text, 0 to 1.
        prompt: Tokens of text and fact.
        question: Tokens of the question.
        answers: Tokens of the answers, all of one length, the right one first.
    """

    length: int
    depth: float
    prompt: list[int]
    question: list[int]
    answers: list[list[int]]


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
    def retrieved(self) -> bool:
        """Whether the right answer is the likeliest."""
        return self.likelihoods[0] > max(self.likelihoods[1:])

    def exact(self, needle: Needle) -> bool:
        """Whether greedy decoding gives the right answer."""
        return self.log_probabilities.argmax(dim=-1).tolist() == needle.answers[0]


def hide(
    tokenizer: Any, text: list[int], lengths: tuple[int, ...], depths: tuple[float, ...]
) -> list[Needle]:
    """The grid, the same for the same text.

    Args:
        tokenizer: A transformers tokenizer.
        text: Tokens in which the facts are hidden, with BOS if there is one; no fewer than the longest prompt's.
        lengths: Of prompt and question (tokens).
        depths: Where the fact stands, 0 to 1.
    """
    source = random.Random(0)
    needles = []
    for length in lengths:
        for depth in depths:
            place, numbers = source.choice(_PLACES), _numbers(tokenizer, source)
            fact = _tokens(tokenizer, _FACT.format(place=place, number=numbers[0][0]))
            question = _tokens(tokenizer, _QUESTION.format(place=place))
            room = length - len(fact) - len(question)
            if room < 2:
                raise EvaluationError(f"--needles {length}: too short for a fact and a question")
            # The first token may be BOS, which nothing precedes.
            at = 1 + round(depth * (room - 1))
            prompt = text[:at] + fact + text[at:room]
            needles.append(Needle(length, depth, prompt, question, [tokens for _, tokens in numbers]))
    return needles


def answer(
    model: Any, subject: Subject, needle: Needle, rule_sets: list[Mapping[int, Rule]], first: int
) -> Iterator[tuple[Answered, Counts]]:
    """Answers a needle under each set of rules (by layer; {} for dense), over one dense prefill."""
    base = model.base_model

    def run(tokens: list[int]) -> torch.Tensor:
        given = torch.tensor([tokens], device=model.device)
        return base(given, past_key_values=cache, use_cache=True).last_hidden_state[0]

    # Without the configuration no layer forgets what is outside its window, so the cache can be cropped.
    cache = transformers.DynamicCache()
    with torch.inference_mode():
        with attending(base, subject.identity, {}, first, subject.window):
            run(needle.prompt)
        for rules in rule_sets:
            with attending(base, subject.identity, rules, first, subject.window) as counts:
                found = _answer(model, needle, run, cache)
            # Negative: so many tokens less. The positive form goes away in transformers 5.
            cache.crop(-len(needle.question))
            yield found, counts


def _answer(model: Any, needle: Needle, run: Callable[[list[int]], torch.Tensor], cache: Any) -> Answered:
    last = run(needle.question)[-1:]
    likelihoods, right = [], None
    for tokens in needle.answers:
        states = torch.cat([last, run(tokens[:-1])])
        cache.crop(1 - len(tokens))
        known = log_probabilities(model, states).cpu()
        likelihoods.append(known.gather(1, torch.tensor(tokens)[:, None]).sum().item())
        right = known if right is None else right
    assert right is not None
    return Answered(right, likelihoods)


def compared(needle: Needle, dense: Answered, ours: Answered) -> Comparison:
    """The tokens of the right answer, as perplexity compares a text's."""
    p, q = dense.log_probabilities, ours.log_probabilities
    target = torch.tensor(needle.answers[0])[:, None]
    asked = len(needle.prompt) + len(needle.question)
    return Comparison(
        contexts=torch.arange(asked, asked + len(target)),
        dense=-p.gather(1, target)[:, 0],
        loss=-q.gather(1, target)[:, 0],
        kl=torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(dim=-1),
        agree=p.argmax(dim=-1) == q.argmax(dim=-1),
    )


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _numbers(tokenizer: Any, source: random.Random) -> list[tuple[int, list[int]]]:
    """Different numbers with as many tokens as the first."""
    found: list[tuple[int, list[int]]] = []
    while len(found) < 1 + _WRONG:
        number = source.randrange(10000, 100000)
        tokens = _tokens(tokenizer, f" {number}")
        if all(len(tokens) == len(other) and tokens != other for _, other in found):
            found.append((number, tokens))
    return found
