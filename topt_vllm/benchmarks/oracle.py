"""The float64 oracle that gates every timing, with an allowed error that follows from rounding alone."""

from dataclasses import dataclass

import torch

from topt_vllm.attention.common import Selection, Thetas
from topt_vllm.benchmarks.cases import Inputs


@dataclass(frozen=True)
class Expectation:
    """What one layer's output must be.

    Attributes:
        exact: float64 [S, H, D].
        allowed: Largest error of an element.
        ties: Keys so close to θ that rounding may decide about them, over all query heads.
        kept: Keys that query heads keep by their own rule.
    """

    exact: torch.Tensor
    allowed: float
    ties: int
    kept: int

    def error(self, out: torch.Tensor) -> float:
        """Largest error of ``out`` [S, H, D]."""
        return float((out.double() - self.exact).abs().max())


def expect(inputs: Inputs, thetas: Thetas | None, selection: Selection) -> Expectation:
    """The oracle's output, and twice what eager attention in the cache's dtype errs by, plus the output's rounding.

    A key whose score lies within the rounding of a float32 dot product around θ may be kept or not. Each such key
    can move the output by its probability times the distance of its V row to the mean of V (or to 0 without
    compensation), which is allowed on top.
    """
    scores = inputs.scores(torch.float64)
    exact = attend(inputs, scores, thetas, selection, torch.float64)
    eager = attend(inputs, scores, thetas, selection, inputs.shape.dtype)
    band = torch.finfo(inputs.shape.dtype).eps * float(exact.abs().max()) + 1e-6
    allowed = 2 * float((eager.double() - exact).abs().max()) + band
    if thetas is None:
        return Expectation(exact, allowed, 0, sum(row.numel() for row in scores))
    ties, effect = _ties(inputs, scores, thetas, selection)
    kept = sum(
        int((row >= thetas.at(n).double()[:, None]).sum())
        for row, n in zip(scores, inputs.shape.lengths, strict=True)
    )
    return Expectation(exact, allowed + effect, ties, kept)


def attend(
    inputs: Inputs,
    scores: list[torch.Tensor],
    thetas: Thetas | None,
    selection: Selection,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The operator with every operation in ``dtype``, [S, H, D].

    Args:
        inputs: The case.
        scores: float64 [H, n] of each sequence; they decide what is kept, whatever ``dtype`` is.
        thetas: Thresholds, None for dense.
        selection: Selection and compensation.
        dtype: float64 for the truth; the cache's own for what eager attention makes of it.
    """
    raw = inputs.scores(dtype)
    out = torch.empty_like(inputs.query, dtype=dtype)
    for sequence, n, head, heads in inputs.groups():
        _, value = inputs.gather(sequence, head, dtype)
        probabilities = raw[sequence][heads].softmax(dim=-1)
        used = torch.ones_like(probabilities, dtype=torch.bool)
        if thetas is not None:
            used = scores[sequence][heads] >= thetas.at(n)[heads, None]
            used[:, n - selection.recent_tokens :] = True
            if selection.compensation == "vmean":
                used[:, n - inputs.shape.rows_behind_sums(n) :] = True
            if selection.group_keep == "union":
                used = used.any(dim=0).expand_as(used)
        result = torch.where(used, probabilities, 0.0) @ value
        if selection.compensation == "vmean":
            dropped = torch.where(used, 0.0, probabilities).sum(dim=1, keepdim=True)
            result += dropped * value.mean(dim=0)
        out[sequence, heads] = result
    return out


def _ties(
    inputs: Inputs, scores: list[torch.Tensor], thetas: Thetas, selection: Selection
) -> tuple[int, float]:
    """How many keys rounding may decide about, and what that may do to an element of the output.

    A float32 score is off by D + 2 roundings of scale·Σ|q_i k_i| at most, those of the softcap and of θ added.
    """
    unit = torch.finfo(torch.float32).eps / 2
    count, effect = 0, 0.0
    for sequence, n, head, heads in inputs.groups():
        theta, score = thetas.at(n).double()[heads, None], scores[sequence][heads]
        key, value = inputs.gather(sequence, head, torch.float64)
        magnitude = inputs.scale * (inputs.query[sequence, heads].double().abs() @ key.abs().T)
        rounding = (inputs.shape.head_dim + 2) * magnitude + 4 * inputs.softcap + theta.abs()
        tied = (score - theta).abs() <= unit * rounding
        count += int(tied.sum())
        effect = max(effect, moved_by(tied, score, value, selection))
    return count, effect


def moved_by(tied: torch.Tensor, score: torch.Tensor, value: torch.Tensor, selection: Selection) -> float:
    """What keys that rounding decides about may do to an element of a group's outputs.

    Args:
        tied: bool [G, n], these keys.
        score: [G, n].
        value: [n, D].
        selection: Selection and compensation.
    """
    if selection.group_keep == "union":
        tied = tied.any(dim=0).expand_as(tied)
    replaced = value.mean(dim=0) if selection.compensation == "vmean" else 0.0
    distance = (value - replaced).abs().amax(dim=1)
    return float(torch.where(tied, score.softmax(dim=-1) * distance, 0.0).sum(dim=1).max())
