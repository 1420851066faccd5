"""Sparse V: skips keys of negligible probability (TurboQuant+ of llama.cpp; vLLM pull request 41422 by tile).

Rule: a query head drops a key whose softmax probability p_j is below τ. The denominator has been summed over all
keys, so what is left sums to less than one, and nothing compensates.
Parameter: τ, one constant for all layers, heads and lengths; 1e-6 where it was published.
"""

import math
from dataclasses import dataclass

import torch

from topt_vllm.replay.rule import Rows, Rule


@dataclass(frozen=True)
class SparseV(Rule):
    """Keys of at least a constant probability.

    Attributes:
        tau: The least probability kept.
    """

    tau: float

    def keep(self, rows: Rows) -> torch.Tensor:
        # p ≥ τ as a bound on the score spares a second softmax.
        least = rows.log_denominator() + math.log(self.tau)
        return (rows.scores >= least).logical_and_(rows.scores > -math.inf)
