"""Budgets from statistics: the same k everywhere, or a k for each head."""

from dataclasses import dataclass
from functools import cached_property

import torch

from topt_vllm.attention.common import Thetas
from topt_vllm.calibration.allocation import Head
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

    def allocated(self, ks: dict[Head, int], name: str) -> Budget:
        """Each head with its own k; those with the most keys where a layer is dense, which are not used."""
        layers = []
        heads = range(self.plan.subject.identity.num_query_heads)
        for layer, fits in self._fits.items():
            mine = [ks.get((layer, head), self.plan.ks[-1]) for head in heads]
            fit = _of_heads(fits, [self.plan.ks.index(k) for k in mine])
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
        return {
            layer: [self.moments[layer].fit(column) for column in range(len(self.plan.ks))]
            for layer in self.plan.subject.full_layers
        }

    def _layer(self, layer: int, fit: Fit) -> LayerThresholds:
        law, theta = fit.rounded()
        return LayerThresholds(layer=layer, law=law, theta=theta)


def _of_heads(fits: list[Fit], columns: list[int]) -> Fit:
    """Each head's law and θ from its own one of the fits."""
    heads = torch.arange(len(columns))
    laws, thetas = torch.stack([fit.law for fit in fits]), torch.stack([fit.theta for fit in fits])
    return Fit(laws[columns, heads], thetas[columns, heads])
