"""What a threshold table holds: its parts as strict models."""

from typing import Annotated, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field

from topt_vllm.attention.common import Thetas
from topt_vllm.attention.screen import ScreenTransform, rotation_signs
from topt_vllm.errors import UserError
from topt_vllm.table.identity import ModelIdentity

SCHEMA_VERSION = 1

_Item = TypeVar("_Item")
# The first wrong item is enough: pydantic would keep a record of each, and a stranger's list may have millions.
Items = Annotated[list[_Item], Field(fail_fast=True)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1)]


class ThresholdTableError(UserError):
    """A table that can't be used; the message names the file, the key path and both values."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Producer(_Strict):
    """Which program wrote the table."""

    name: str
    version: str


class TextSource(_Strict):
    """One calibration text.

    Attributes:
        name: File name or hub id.
        sha256: Digest of the file; None for hub datasets, pipes, and files that are too large for one.
    """

    name: str
    sha256: str | None


class Provenance(_Strict):
    """How the thresholds came about.

    Attributes:
        data: The texts.
        num_samples: Token sequences that were run.
        tokens: Tokens that were run.
        max_seq_length: Tokens of the longest sequence.
        seed: Of every random choice.
        options: Calibrator options that shape θ.
        libraries: Versions.
        date: ISO date.
    """

    data: Items[TextSource] = Field(min_length=1)
    num_samples: int = Field(gt=0)
    tokens: int = Field(gt=0)
    max_seq_length: int = Field(gt=0)
    seed: int
    options: dict[str, str | int | float | bool | None]
    libraries: dict[str, str]
    date: str


class Spread(_Strict):
    """Percentiles of a quantity over layers, heads and rows."""

    p5: _Finite
    p50: _Finite
    p95: _Finite


class Quality(_Strict):
    """What a budget did on text held back from calibration.

    Attributes:
        kept_over_k: Keys that a head keeps by its own rule, over k, in the sparse layers; None where the budget
            doesn't ask for a number of keys.
        v_rows_read: Share of V rows read, union over the GQA group, all layers counted.
        dropped_mass: Mean probability dropped per query head, sparse layers.
        tokens: Held-back tokens.
        rows: Of them, those decoded with the budget after a dense prefill of the rest: the longest contexts.
        loss_pct: By how much perplexity rose against dense attention, percent.
        kl: Mean divergence of the next token's distribution from dense attention's, nats.
        agreement: Share of rows whose most likely next token is dense attention's.
        layer_rows_read: Share of V rows read, layer by layer, windowed ones included; 1 where a layer has none.
        layer_candidates: Share of keys that a K screen of 4 bits would let through at its default margin, layer by
            layer; 1 where there is none. None where that wasn't measured.
    """

    kept_over_k: Spread | None
    v_rows_read: _Share
    dropped_mass: _Share
    tokens: int
    rows: int
    loss_pct: _Finite
    kl: _Finite
    agreement: _Share
    layer_rows_read: Items[_Share]
    layer_candidates: Items[_Share] | None = None

    def sentence(self) -> str:
        """What was measured, for a log line."""
        return (
            f"on {self.tokens} held-back tokens: perplexity {self.loss_pct:+.2f} %, "
            f"{self.v_rows_read:.1%} of V rows read, {self.dropped_mass:.1%} of probability dropped, "
            f"{self.agreement:.1%} of next tokens as with dense attention"
        )


class LayerThresholds(_Strict):
    """Thresholds of one layer.

    Attributes:
        layer: Index in the model.
        law: Per query head [c0, c1] of θ(n) = c0 + c1 ln n.
        theta: Per query head, θ at each of the table's lengths.
        k: Keys that each query head of this layer should keep, where the budget doesn't say it for all layers.
    """

    layer: int
    law: Items[Items[float]]
    theta: Items[Items[float]]
    k: Items[int] | None = None


class Budget(_Strict):
    """Thresholds for one budget: the same number of keys in every layer, or a target with a name.

    Attributes:
        k: Keys that a query head should keep; None where that differs between layers or follows from a target.
        dense_layers: Layers to attend densely.
        quality: Measured on held-back text; None when no text was held back.
        layers: One entry for every layer with full attention, in order.
        name: What it aims at, such as ``loss-1%``; a budget has a name or a k.
    """

    k: int | None = Field(gt=0)
    dense_layers: Items[int]
    quality: Quality | None
    layers: Items[LayerThresholds]
    name: str | None = None

    @property
    def key(self) -> int | str:
        """What chooses it: its k or its name."""
        return self.k if self.k is not None else str(self.name)

    @property
    def candidates(self) -> dict[int, float]:
        """Share of keys that a K screen would let through, by layer; {} where that wasn't measured."""
        return dict(enumerate((self.quality.layer_candidates if self.quality else None) or ()))

    def ks(self) -> dict[int, list[int]]:
        """Keys that each query head should keep, by layer, for the sparse layers where that is said."""
        known = {}
        for entry in self.layers:
            ks = [self.k] * len(entry.theta) if self.k is not None else entry.k
            if ks is not None and entry.layer not in self.dense_layers:
                known[entry.layer] = ks
        return known

    def thetas(self, lengths: list[int]) -> dict[int, Thetas]:
        """Thresholds of the sparse layers, by layer index, at a table's lengths; float32 over all query heads."""
        return {
            entry.layer: thetas_of(entry, lengths)
            for entry in self.layers
            if entry.layer not in self.dense_layers
        }


class LayerKeys(_Strict):
    """Of the keys of one layer, behind the position embedding.

    Attributes:
        layer: Index in the model.
        mean: Per KV head, of each channel.
        scale: Per KV head, what each channel is divided by before it is rotated; above 0.
    """

    layer: int
    mean: Items[Items[float]]
    scale: Items[Items[float]]


class KeyStatistics(_Strict):
    """What a K screen needs to know of the keys (:mod:`topt_vllm.attention.screen`).

    Attributes:
        seed: Of the rotation's signs.
        layers: One entry for every layer with full attention, in order.
    """

    seed: int
    layers: Items[LayerKeys]

    def transforms(self) -> dict[int, ScreenTransform]:
        """By layer index, over all KV heads."""
        found = {}
        for entry in self.layers:
            mean, scale = (torch.tensor(part, dtype=torch.float32) for part in (entry.mean, entry.scale))
            found[entry.layer] = ScreenTransform(mean, scale, rotation_signs(self.seed, mean.shape[1]))
        return found


class ThresholdTable(_Strict):
    """A whole table; docs/table.md has the format.

    Attributes:
        schema_version: Of this format.
        producer: Which program wrote it.
        model: The model it belongs to.
        calibration: How it came about.
        lengths: Context lengths at which θ is given, ascending.
        budgets: Those with a k, in ascending order, then those with a name.
        key_statistics: For K screens; tables written before lack them.
    """

    schema_version: int
    producer: Producer
    model: ModelIdentity
    calibration: Provenance
    lengths: Items[int] = Field(min_length=1)
    budgets: Items[Budget] = Field(min_length=1)
    key_statistics: KeyStatistics | None = None

    def budget(self, key: int | str | None) -> Budget:
        """The budget with this k or name; without one, the last: the calibrator's choice, or the largest k.

        Raises:
            ThresholdTableError: No such budget.
        """
        if key is None:
            return self.budgets[-1]
        for budget in self.budgets:
            if budget.key == key:
                return budget
        offered = ", ".join(str(budget.key) for budget in self.budgets)
        raise ThresholdTableError(
            f"budget is {key}, but the table has budgets {offered}; choose one of them or recalibrate"
        )


def keys_asked(ks: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
    """What budgets ask of rows: k keys, and never more than half of the context.

    Args:
        ks: int64, keys.
        contexts: int64, context lengths; broadcast against ``ks``.
    """
    return torch.minimum(ks, contexts // 2).clamp(min=1)


def thetas_of(entry: LayerThresholds, lengths: list[int]) -> Thetas:
    """Thresholds of one layer as the operator takes them."""
    return Thetas(
        torch.tensor(lengths, dtype=torch.int32),
        torch.tensor(entry.theta, dtype=torch.float32),
        torch.tensor(entry.law, dtype=torch.float32),
    )
