"""How many keys a K screen would let through, budget by budget and layer by layer."""

from topt_vllm.attention.margin import DEFAULT_MARGIN
from topt_vllm.attention.screen import ScreenTransform
from topt_vllm.calibration.collect import late_rows
from topt_vllm.calibration.statistics import DECIMALS
from topt_vllm.replay.model import Subject
from topt_vllm.replay.rule import rows_of
from topt_vllm.replay.scores import LayerCall, true_per_row
from topt_vllm.replay.screening import ScreenedKeys, candidates
from topt_vllm.table.schema import Budget


class CandidateShares:
    """Counts candidates in the layers of a dense pass, each of which it is shown."""

    def __init__(
        self,
        subject: Subject,
        length: int,
        transforms: dict[int, ScreenTransform],
        budgets: list[Budget],
        lengths: list[int],
    ) -> None:
        """Nothing is counted yet.

        Args:
            subject: What is known about the model.
            length: Tokens of the pass, over a text that neither thresholds nor statistics come from; its late rows
                are looked at.
            transforms: Of every layer with thresholds.
            budgets: Of the table.
            lengths: Of the table.
        """
        # Rows below the first length are dense.
        self._rows = late_rows(length, seed=0, least=lengths[0] - 1)
        self._transforms = transforms
        self._thetas = [budget.thetas(lengths) for budget in budgets]
        self._shares = [[1.0] * subject.identity.num_layers for _ in budgets]
        self._pairs = subject.identity.num_kv_heads * int((self._rows + 1).sum())

    def observe(self, call: LayerCall) -> None:
        """Counts those of one layer."""
        screened = ScreenedKeys.of(self._transforms[call.layer], call.key)
        found = [0] * len(self._thetas)
        for part in call.chunks(self._rows):
            chunk = rows_of(call, self._rows[part].to(call.key.device), None)
            _, upper = screened.scores(chunk, DEFAULT_MARGIN)
            for index, by_layer in enumerate(self._thetas):
                if call.layer in by_layer:
                    theta = by_layer[call.layer].to(upper.device).at_each(chunk.contexts)
                    found[index] += int(true_per_row(candidates(chunk, upper, theta)).sum())
        for shares, count, by_layer in zip(self._shares, found, self._thetas, strict=True):
            if call.layer in by_layer:
                shares[call.layer] = round(count / self._pairs, DECIMALS)

    def added_to(self, budgets: list[Budget]) -> list[Budget]:
        """The budgets with what was counted in their quality; as they are where nothing was measured."""
        return [_with_shares(budget, found) for budget, found in zip(budgets, self._shares, strict=True)]


def _with_shares(budget: Budget, shares: list[float]) -> Budget:
    if budget.quality is None:
        return budget
    quality = budget.quality.model_copy(update={"layer_candidates": shares})
    return budget.model_copy(update={"quality": quality})
