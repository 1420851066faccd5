"""Comparing greedy tokens of two engines whose logits differ by rounding."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Bits behind the leading one.
_MANTISSA_BITS = {"bfloat16": 7, "float16": 10, "float32": 23}


@dataclass(frozen=True)
class Comparison:
    """Outcome of a comparison.

    Attributes:
        equal: Prompts whose tokens are all equal.
        ties: Prompts whose tokens are equal up to a near tie of the other engine.
        wrong: What differs without one, in words.
    """

    equal: int
    ties: int
    wrong: list[str]


def compare(
    ours: Sequence[Sequence[int]],
    stock: Sequence[Sequence[int]],
    stock_logits: Sequence[Sequence[tuple[float, float]]],
    dtype: str,
) -> Comparison:
    """Compares tokens; a near tie is two highest logits within two steps of the dtype, the rounding of either.

    Behind the first difference the engines have different contexts, so nothing is compared there.

    Args:
        ours: Tokens by prompt and step.
        stock: Those of the engine to agree with.
        stock_logits: Its two highest logits, by prompt and step.
        dtype: That the logits were computed in.
    """
    equal = ties = 0
    wrong = []
    for prompt, (mine, theirs, logits) in enumerate(zip(ours, stock, stock_logits, strict=True)):
        step = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), None)
        if step is None:
            equal += 1
            continue
        first, second = logits[step]
        if is_near_tie(first, second, dtype):
            ties += 1
        else:
            wrong.append(
                f"prompt {prompt}, step {step}: token {mine[step]} instead of {theirs[step]}, "
                f"whose logits {first} against {second} are no near tie"
            )
    return Comparison(equal, ties, wrong)


def is_near_tie(first: float, second: float, dtype: str) -> bool:
    """Whether two logits, the larger one first, are within two steps of the dtype."""
    size = abs(first) or abs(second)
    spacing = 2.0 ** (math.floor(math.log2(size)) - _MANTISSA_BITS[dtype]) if size else 0.0
    return first - second <= 2 * spacing
