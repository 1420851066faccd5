"""Long lists of words, asked for those that stand in them most often; what stands there less often is wrong.

``common-words``: five words of the text thirty times each, others of its words three times. ``frequent-words``:
invented words, the k-th in proportion to 1/k². A list takes most of the prompt, and no part of it has the answer.
"""

import re
from collections.abc import Iterable
from math import pi

from topt_vllm.evaluation.cases import Case
from topt_vllm.evaluation.tasks.haystack import WRONG, Haystack, Question

# Of the prompt's tokens; the text has the rest.
_SHARE = 0.85
_COMMON, _OFTEN, _RARELY = 5, 30, 3
_RANKS, _CANDIDATES = 3, 400
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def common_words(haystack: Haystack, count: int) -> list[Case]:
    """Up to ``count`` cases about one prompt: each of the common words, where the others are named."""
    text = haystack.tokenizer.decode(haystack.text, skip_special_tokens=True)
    words = list(dict.fromkeys(re.findall(r"\b[a-z]{4,9}\b", text)))
    asked = haystack.alike(words, _COMMON + WRONG)
    common, wrong = asked[:_COMMON], asked[_COMMON:]
    listed = common * _OFTEN + wrong * _RARELY
    room = _SHARE * haystack.length - _size(haystack, listed)
    for word in words:
        if word not in asked:
            room -= _RARELY * _size(haystack, [word])
            if room < 0:
                break
            listed += [word] * _RARELY
    questions = []
    for right in common[:count]:
        named = "".join(f" {word}," for word in common if word != right)
        questions.append(Question(_question("common", _COMMON, named), [right, *wrong]))
    return haystack.cases([_list(haystack, listed)], questions)


def frequent_words(haystack: Haystack, count: int) -> list[Case]:
    """Up to ``count`` cases about one prompt: each of the most frequent words, where those before it are named."""
    choose = haystack.source.choice
    spelt = ["".join(choose(_CONSONANTS) + choose(_VOWELS) for _ in range(3)) for _ in range(_CANDIDATES)]
    # The sum of all 1/k² is π²/6.
    most = _SHARE * haystack.length / _size(haystack, spelt) * len(spelt) * 6 / pi**2
    ranked = haystack.alike(spelt, max(_RANKS + WRONG, int(most**0.5)))
    listed = [word for rank, word in enumerate(ranked, 1) for _ in range(round(most / rank**2))]
    questions = []
    for rank in range(min(count, _RANKS)):
        named = "".join(f" {word}," for word in ranked[:rank])
        questions.append(Question(_question("frequent", _RANKS, named), ranked[rank : rank + 1 + WRONG]))
    return haystack.cases([_list(haystack, listed)], questions)


def _list(haystack: Haystack, words: list[str]) -> str:
    haystack.source.shuffle(words)
    return f"List of words: {', '.join(words)}."


def _question(kind: str, count: int, named: str) -> str:
    return (
        f"Which {count} words are the most {kind} in the list of words?\n"
        f"Answer: The {count} most {kind} words in the list, the most {kind} first, are{named}"
    )


def _size(haystack: Haystack, words: Iterable[str]) -> int:
    """Tokens in a list."""
    return len(haystack.tokens("".join(f" {word}," for word in words)))
