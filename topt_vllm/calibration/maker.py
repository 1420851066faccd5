"""Budgets from statistics: the same k everywhere, a share of dropped probability, or a k for each head."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from topt_vllm.attention.common import Thetas
from topt_vllm.calibration.allocation import Head
from topt_vllm.calibration.head_errors import HeadErrors
from topt_vllm.calibration.plan import Plan
from topt_vllm.calibration.statistics import Fit, KthScoreMoments
from topt_vllm.table.schema import Budget, LayerThresholds, thetas_of


@dataclass(frozen=True)
class Maker:
    """Makes the budgets of a plan.

    Attributes:
        plan: The run.
        moments: Statistics by layer.
    """

    plan: Plan
    moments: dict[int, KthScoreMoments]

    def constant(self, k: int) -> Budget:
        """The same k in every layer that isn't dense."""
        column = self.plan.ks.index(k)
        layers = [self._layer(layer, fits[column]) for layer, fits in self._fits.items()]
        return Budget(k=k, dense_layers=self.plan.dense_layers, quality=None, layers=layers)

    def mass(self, percent: float, errors: dict[int, HeadErrors]) -> Budget:
        """Every head skips about this share of its probability, by its own rule, at long contexts."""
        layers = []
        for layer, fits in self._fits.items():
            places = [_place_of(dropped, percent / 100) for dropped in errors[layer].dropped.tolist()]
            layers.append(self._layer(layer, _between(fits, places)))
        name = f"mass-{percent:g}%"
        return Budget(k=None, dense_layers=self.plan.dense_layers, quality=None, layers=layers, name=name)

    def allocated(self, ks: dict[Head, int], name: str) -> Budget:
        """Each head with its own k; those with the most keys where a layer is dense, which are not used."""
        layers = []
        heads = range(self.plan.subject.identity.num_query_heads)
        for layer, fits in self._fits.items():
            mine = [ks.get((layer, head), self.plan.ks[-1]) for head in heads]
            fit = _between(fits, [float(self.plan.ks.index(k)) for k in mine])
            layers.append(self._layer(layer, fit).model_copy(update={"k": mine}))
        dense = sorted(set(self.plan.subject.full_layers) - set(self.plan.allocated_layers))
        return Budget(k=None, dense_layers=dense, quality=None, layers=layers, name=name)

    def thetas(self) -> dict[int, list[Thetas]]:
        """Thresholds by layer at every k of the plan."""
        lengths = self.plan.lengths
        return {
            layer: [thetas_of(self._layer(layer, fit), lengths) for fit in fits]
            for layer, fits in self._fits.items()
        }

    @cached_property
    def _fits(self) -> dict[int, list[Fit]]:
        """By layer, at every k of the plan; every run of a search asks for them."""
        columns, sigma = range(len(self.plan.ks)), self.plan.options.sigma
        return {
            layer: [self.moments[layer].fit(column, sigma) for column in columns]
            for layer in self.plan.subject.full_layers
        }

    def _layer(self, layer: int, fit: Fit) -> LayerThresholds:
        law, theta = fit.rounded()
        return LayerThresholds(layer=layer, law=law, theta=theta)


def _place_of(dropped: list[float], share: float) -> float:
    """Where among the budgets a head drops just this share: their index, with a fraction between two."""
    for index, (more, less) in enumerate(pairwise(dropped)):
        if less <= share:
            return index + (min(max((more - share) / (more - less), 0.0), 1.0) if more > less else 0.0)
    return float(len(dropped) - 1)


def _between(fits: list[Fit], places: list[float]) -> Fit:
    """Each head's law and θ at its own place among the fits."""
    laws, thetas = torch.stack([fit.law for fit in fits]), torch.stack([fit.theta for fit in fits])
    at = torch.tensor(places, dtype=torch.float64)
    left = at.floor().long().clamp(max=max(len(fits) - 2, 0))
    right = (left + 1).clamp(max=len(fits) - 1)
    heads, weight = torch.arange(len(places)), (at - left)[:, None]
    return Fit(
        laws[left, heads].lerp(laws[right, heads], weight),
        thetas[left, heads].lerp(thetas[right, heads], weight),
    )
