"""The outcome of start-up."""

from dataclasses import dataclass, field

from topt_vllm.attention.api import Implementation
from topt_vllm.attention.common import Thetas
from topt_vllm.attention.screen import ScreenFormat, ScreenTransform
from topt_vllm.config import TopThetaConfig
from topt_vllm.table.identity import ModelIdentity


@dataclass(frozen=True)
class Resolved:
    """What is decided before anything is loaded.

    Attributes:
        config: The plugin's settings.
        identity: The served model.
        implementation: Module of the chosen kernel.
        kv_heads: KV heads of each layer with attention, over all tensor-parallel ranks.
        see_all: Layers whose rows attend to all keys of the contexts that are served.
        table_labels: The table in the metrics: name, digest and budget, and the model that is served.
        description: One line for the log.
        thetas: Thresholds of each sparse layer over all query heads; empty for θ = −inf everywhere.
        screen_format: Of the K screen; None for none.
        screens: What it knows of the K of each layer that has one, over all KV heads.
        promised_keys: Keys that each query head should keep, by sparse layer; {} unless thresholds adapt.
        dense_on_platform: Whether layers without thresholds stay with the platform's own kernels: on GPUs, unless
            the operator's is named.
        drafts: Whether thresholds are for drafts of the model, and every row of its own steps is kept.
    """

    config: TopThetaConfig
    identity: ModelIdentity
    implementation: Implementation
    kv_heads: dict[int, int]
    see_all: list[int]
    table_labels: dict[str, str]
    description: str = ""
    thetas: dict[int, Thetas] = field(default_factory=dict)
    screen_format: ScreenFormat | None = None
    screens: dict[int, ScreenTransform] = field(default_factory=dict)
    promised_keys: dict[int, list[int]] = field(default_factory=dict)
    dense_on_platform: bool = False
    drafts: bool = False

    @property
    def all_on_platform(self) -> bool:
        """Whether that is so for every layer of the model."""
        return self.dense_on_platform and not self.thetas and self.config.sift is None

    @property
    def calibrated_up_to(self) -> int | None:
        """Longest context with calibrated thresholds (tokens); None where there are none."""
        return max((int(thetas.lengths[-1]) for thetas in self.thetas.values()), default=None)

    @property
    def dense_up_to(self) -> int:
        """Longest context that is attended densely for being short (tokens)."""
        shortest = [int(thetas.lengths[0]) - 1 for thetas in self.thetas.values()]
        return max([self.config.selection.min_seq_len, *shortest])
