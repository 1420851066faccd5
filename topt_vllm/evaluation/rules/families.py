"""The rules by name, each with the one parameter that decides how many rows it reads."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from topt_vllm.evaluation.rules.blasst import Blasst
from topt_vllm.evaluation.rules.quest import PAGE, Quest
from topt_vllm.evaluation.rules.sift import Sift, SiftContext
from topt_vllm.evaluation.rules.sparsev import SparseV
from topt_vllm.evaluation.rules.topk import TopK
from topt_vllm.evaluation.rules.toptheta import TopThetaNoMean, maker, position_range
from topt_vllm.replay.rule import Rule
from topt_vllm.replay.top_theta import TopTheta
from topt_vllm.table.schema import ThresholdTable

_LEAST_TAU = 1e-12
_LEAST_LAMBDA = 1e-9


@dataclass(frozen=True)
class Family:
    """A rule with its parameter open.

    Attributes:
        name: As on the command line.
        make: From a number x, on which the rows read depend monotonically, to the rule.
        shown: From x to the parameter as the rule's source has it.
        few: x with the fewest rows.
        many: x with the most.
    """

    name: str
    make: Callable[[float], Rule]
    shown: Callable[[float], float]
    few: float
    many: float


def families(names: tuple[str, ...], table: ThresholdTable, longest: int) -> list[Family]:
    """The named rules.

    Args:
        names: Out of :data:`topt_vllm.evaluation.options.RULES`.
        table: Of the rules that need thresholds.
        longest: Longest context (tokens); bounds where parameters are looked for.
    """
    few, many = position_range(table)
    pages = -(-longest // PAGE)
    # Numbers of keys and pages, and λ and τ, are searched by their logarithm: their effect is.
    known = [
        Family("toptheta", maker(table, TopTheta), float, few, many),
        Family("toptheta-nomean", maker(table, TopThetaNoMean), float, few, many),
        Family("topk", lambda x: TopK(_whole(x)), _whole, 0.0, math.log(longest)),
        Family("blasst", lambda x: Blasst(math.exp(x)), math.exp, math.log(longest), math.log(_LEAST_LAMBDA)),
        Family("sparsev", lambda x: SparseV(math.exp(x)), math.exp, 0.0, math.log(_LEAST_TAU)),
        Family("quest", lambda x: Quest(_whole(x)), _whole, 0.0, math.log(pages)),
    ]
    # By the share that is kept, for it is that which spans orders of magnitude.
    for name, rule in (("sift", Sift), ("sift-context", SiftContext)):
        make = _by_kept_share(rule)
        known.append(Family(name, make, lambda x: 1 - math.exp(x), -math.log(longest), math.log(0.99)))
    return [family for family in known if family.name in names]


def _by_kept_share(rule: type[Sift]) -> Callable[[float], Rule]:
    return lambda x: rule(1 - math.exp(x))


def _whole(x: float) -> int:
    return max(1, round(math.exp(x)))
