"""Chains of variables, each the one before it, scattered in the text; asked for is the value of a chain's last.

The values of the other chains are wrong.
"""

from itertools import pairwise

from topt_vllm.evaluation.cases import Case
from topt_vllm.evaluation.tasks.haystack import WRONG, Haystack, Question

_CHAINS = WRONG + 1
_HOPS = 4
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_NAMES = 400


def variables(haystack: Haystack, count: int) -> list[Case]:
    """Up to ``count`` cases about one prompt."""
    spelt = ["".join(haystack.source.sample(_LETTERS, 3)) for _ in range(_NAMES)]
    names = haystack.alike(spelt, _CHAINS * (_HOPS + 1))
    chains = [names[chain::_CHAINS] for chain in range(_CHAINS)]
    values = haystack.numbers(_CHAINS)
    lines = [
        iter([f"VAR {chain[0]} = {value}", *(f"VAR {new} = VAR {old}" for old, new in pairwise(chain))])
        for chain, value in zip(chains, values, strict=True)
    ]
    # Chains mix by chance; a variable is set before it is used.
    turns = [line for line in lines for _ in range(_HOPS + 1)]
    haystack.source.shuffle(turns)
    questions = []
    for chain in haystack.source.sample(range(_CHAINS), min(count, _CHAINS)):
        last, others = chains[chain][-1], [value for value in values if value != values[chain]]
        text = f"What is the value of the variable {last}?\nAnswer: VAR {last} ="
        questions.append(Question(text, [values[chain], *others]))
    return haystack.cases([next(line) for line in turns], questions)
