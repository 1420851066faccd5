"""How many keys a K screen would let through, budget by budget and layer by layer."""

from collections.abc import Callable
from typing import Any

from topt_vllm.attention.margin import DEFAULT_MARGIN
from topt_vllm.attention.screen import ScreenTransform
from topt_vllm.calibration.collect import late_rows, observed
from topt_vllm.calibration.statistics import DECIMALS
from topt_vllm.replay.model import Subject
from topt_vllm.replay.rule import rows_of
from topt_vllm.replay.scores import LayerCall, true_per_row
from topt_vllm.replay.screening import ScreenedKeys, candidates
from topt_vllm.table.schema import Budget


def with_candidates(
    model: Any,
    subject: Subject,
    tokens: list[int],
    transforms: dict[int, ScreenTransform],
    budgets: list[Budget],
    lengths: list[int],
    progress: Callable[[], object],
) -> list[Budget]:
    """The budgets with the share of candidates in their quality; as they are where nothing was measured.

    Args:
        model: A transformers causal language model.
        subject: What is known about it.
        tokens: A text that neither thresholds nor statistics come from; its late rows are looked at.
        transforms: Of every layer with thresholds.
        budgets: Of the table.
        lengths: Of the table.
        progress: Called after each layer.
    """
    # Rows below the first length are dense.
    rows = late_rows(len(tokens), seed=0, least=lengths[0] - 1)
    thetas = [budget.thetas(lengths) for budget in budgets]
    shares = [[1.0] * subject.identity.num_layers for _ in budgets]
    pairs = subject.identity.num_kv_heads * int((rows + 1).sum())

    def observe(call: LayerCall) -> None:
        screened = ScreenedKeys.of(transforms[call.layer], call.key)
        found = [0] * len(budgets)
        for part in call.chunks(rows):
            chunk = rows_of(call, rows[part].to(call.key.device), None)
            _, upper = screened.scores(chunk, DEFAULT_MARGIN)
            for index, by_layer in enumerate(thetas):
                if call.layer in by_layer:
                    theta = by_layer[call.layer].to(upper.device).at_each(chunk.contexts)
                    found[index] += int(true_per_row(candidates(chunk, upper, theta)).sum())
        for index, by_layer in enumerate(thetas):
            if call.layer in by_layer:
                shares[index][call.layer] = round(found[index] / pairs, DECIMALS)
        progress()

    observed(model, subject, tokens, observe)
    return [_with_shares(budget, found) for budget, found in zip(budgets, shares, strict=True)]


def _with_shares(budget: Budget, shares: list[float]) -> Budget:
    if budget.quality is None:
        return budget
    quality = budget.quality.model_copy(update={"layer_candidates": shares})
    return budget.model_copy(update={"quality": quality})
