"""K screens of an evaluation: which layers have one, and the rules that follow."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from topt_vllm.attention.common import SCREEN_LIMITS
from topt_vllm.attention.margin import HARD
from topt_vllm.attention.screen import ScreenFormat, ScreenTransform
from topt_vllm.evaluation.options import NO_SCREEN
from topt_vllm.evaluation.rules.screened import ScreenedTopTheta
from topt_vllm.evaluation.tuning import Sample
from topt_vllm.replay.rule import Rule
from topt_vllm.replay.screening import ScreenedKeys, candidates
from topt_vllm.replay.top_theta import TopTheta
from topt_vllm.table.schema import ThresholdTable


@dataclass(frozen=True)
class Screen:
    """A K screen as it is asked for.

    Attributes:
        format: Of the copy; None for no screen.
        margin: Standard deviations of plane one's error; None for a hard bound.
        transforms: What is calibrated of each layer's K.
    """

    format: ScreenFormat | None
    margin: float | None
    transforms: Mapping[int, ScreenTransform]

    @property
    def facts(self) -> dict[str, Any]:
        """What records say about it."""
        margin = HARD if self.margin is None else self.margin
        return {
            "k_screen": self.format or NO_SCREEN,
            "k_screen_margin": margin if self.format else None,
        }

    def rules(self, rule: TopTheta, layers: list[int], shares: Mapping[int, float]) -> dict[int, Rule]:
        """The rule of each layer: behind the screen where that pays.

        Args:
            rule: Without a screen.
            layers: Those that aren't dense.
            shares: Share of candidates by layer, as far as it is known.
        """
        largest = SCREEN_LIMITS[self.format].largest_share if self.format else 1.0
        return {
            layer: self._screened(rule, layer) if shares.get(layer, 0.0) <= largest else rule
            for layer in layers
        }

    def _screened(self, rule: TopTheta, layer: int) -> TopTheta:
        if self.format is None:
            return rule
        shortest = SCREEN_LIMITS[self.format].min_seq_len
        return ScreenedTopTheta(rule.thetas, self.transforms[layer], self.format, self.margin, shortest)


def screens_of(formats: tuple[str, ...], margin: float | None, table: ThresholdTable) -> list[Screen]:
    """What ``--k-screen`` asks for; the table has statistics unless that is nothing."""
    transforms = table.key_statistics.transforms() if table.key_statistics is not None else {}
    found = (cast(ScreenFormat, format) if format != NO_SCREEN else None for format in formats)
    return [Screen(format, margin, transforms) for format in found]


def sampled_shares(found: Sample, rule: TopTheta, screen: Screen) -> dict[int, float]:
    """Share of candidates by layer, of a sample: for thresholds that no budget of the table has."""
    shares = {}
    for layer, rows in found.rows.items() if screen.format else ():
        keys = ScreenedKeys.of(screen.transforms[layer], rows.shared)
        _, upper = keys.scores(rows, screen.margin)
        shares[layer] = int(candidates(rows, upper, rule.theta(rows)).sum()) / rows.pairs
    return shares
