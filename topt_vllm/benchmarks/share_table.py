"""A threshold table whose budgets are shares of V rows, found for one benchmark."""

import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from topt_vllm.calibration.key_statistics import key_statistics
from topt_vllm.table.identity import ModelIdentity
from topt_vllm.table.schema import (
    SCHEMA_VERSION,
    Budget,
    LayerThresholds,
    Producer,
    Provenance,
    TextSource,
    ThresholdTable,
)
from topt_vllm.version import __version__


def budget_name(keep: float) -> str:
    """Name of the budget that reads a share of the V rows."""
    return f"rows-{100 * keep:g}%"


def share_table(
    identity: ModelIdentity,
    first_length: int,
    tokens: int,
    keeps: Sequence[float],
    thetas: Mapping[str, Sequence[Sequence[float]]],
    keys: Mapping[str, Any],
) -> ThresholdTable:
    """A table for one context length.

    Args:
        identity: The model.
        first_length: Context length from which θ holds (tokens); nothing is skipped below.
        tokens: Tokens decoded after it.
        keeps: Shares of V rows.
        thetas: By layer, for each share, θ of each query head.
        keys: By layer, sums as :func:`topt_vllm.calibration.key_statistics.key_sums`.
    """
    return ThresholdTable(
        schema_version=SCHEMA_VERSION,
        producer=Producer(name="topt-vllm bench engine", version=__version__),
        model=identity,
        calibration=Provenance(
            data=[TextSource(name="random tokens", sha256=None)],
            num_samples=1,
            tokens=first_length,
            max_seq_length=first_length,
            seed=0,
            options={},
            libraries={"torch": version("torch")},
            date=time.strftime("%Y-%m-%d", time.gmtime()),
        ),
        lengths=[first_length, first_length + tokens],
        budgets=[
            Budget(
                k=None,
                name=budget_name(keep),
                dense_layers=[],
                quality=None,
                layers=[
                    _constant(int(layer), shares[index])
                    for layer, shares in sorted(thetas.items(), key=lambda entry: int(entry[0]))
                ],
            )
            for index, keep in enumerate(keeps)
        ],
        key_statistics=key_statistics(
            {int(layer): torch.tensor(sums, dtype=torch.float64) for layer, sums in keys.items()}, seed=0
        ),
    )


def _constant(layer: int, theta: Sequence[float]) -> LayerThresholds:
    law: Any = [[value, 0.0] for value in theta]
    return LayerThresholds(layer=layer, law=law, theta=[[value, value] for value in theta])
