"""What an attention layer is in the model: its rank's heads, its thresholds, its name in the metrics."""

from dataclasses import dataclass
from typing import Any

from vllm.model_executor.models.utils import extract_layer_index

from topt_vllm.attention.common import Thetas
from topt_vllm.attention.screen import ScreenTransform
from topt_vllm.backend.metrics import recorder
from topt_vllm.backend.resolved import Resolved


def describe_rank(resolved: Resolved, tensor_parallel_size: int) -> None:
    """Tells the metrics which table is served, and what part of the heads this rank has."""
    rank = _rank(tensor_parallel_size)
    per_layer = resolved.config.per_layer_metrics
    recorder().describe(
        resolved.table_labels, rank, tensor_parallel_size, per_layer, screened=bool(resolved.screens)
    )


@dataclass(frozen=True)
class ModelLayer:
    """One attention layer as the model knows it.

    Attributes:
        layer: vLLM's Attention layer.
        name: Its prefix, such as ``model.layers.3.self_attn.attn``.
        resolved: From :func:`topt_vllm.backend.startup.resolve`.
        tensor_parallel_size: Ranks that the query heads are spread over.
    """

    layer: Any
    name: str
    resolved: Resolved
    tensor_parallel_size: int

    @property
    def drafts(self) -> bool:
        """Whether it is a separate draft model's, whose layer numbers start again at 0 (0.32)."""
        return self.name.startswith("draft_model.")

    @property
    def of_drafter(self) -> bool:
        """Whether it is that, or of a head that drafts, whose numbers may start again at 0 too."""
        return self.drafts or getattr(self.layer.impl, "of_drafter", False)

    @property
    def label(self) -> str:
        """In the metrics: its number, after ``draft_model.`` where it is no layer of the model."""
        number = str(extract_layer_index(self.name))
        return f"draft_model.{number}" if self.of_drafter else number

    @property
    def kv_replicas(self) -> float:
        """Ranks that hold each KV head.

        vLLM repeats KV heads where there are more ranks than heads. A draft model's heads aren't known here; its
        rows are counted as if each rank had heads of its own.
        """
        known = self.resolved.kv_heads.get(extract_layer_index(self.name))
        if known is None or self.of_drafter:
            return 1.0
        return max(1.0, self.layer.num_kv_heads * self.tensor_parallel_size / known)

    def thresholds(self) -> tuple[Thetas | None, str | None]:
        """Of this rank's query heads, or None and why there are none.

        Under ``policy: sift`` neither: its thresholds belong to requests.

        Raises:
            ValueError: The layer's heads are not those of the model that was identified.
        """
        if self.layer.sliding_window is not None:  # a window is short already
            return None, "sliding_window"
        index, identity = extract_layer_index(self.name), self.resolved.identity
        if self.of_drafter or index >= identity.num_layers:
            return None, "draft_model"
        if self.resolved.config.sift is not None:
            return None, None
        if not self.resolved.thetas:
            return None, "no_thresholds"
        if index not in self.resolved.thetas:
            return None, "sliding_window" if index in identity.sliding_window_layers else "dense_layer"
        heads, thetas = self._heads(), self.resolved.thetas[index]
        return (thetas if self.tensor_parallel_size == 1 else thetas.heads(heads.start, len(heads))), None

    @property
    def reason(self) -> str | None:
        """Why there are no thresholds, as :meth:`thresholds` says; None where rows may be skipped."""
        return self.thresholds()[1]

    @property
    def on_platform(self) -> bool:
        """Whether the platform's kernel decodes in it."""
        on_platform = self.resolved.dense_on_platform or self.layer.sliding_window is not None
        return on_platform and self.reason is not None

    def promised_keys(self) -> list[int] | None:
        """Keys that each of this rank's query heads should keep, None unless thresholds adapt.

        Raises:
            ValueError: As for :meth:`thresholds`.
        """
        keys = self.resolved.promised_keys.get(extract_layer_index(self.name))
        if keys is None:
            return None
        heads = self._heads()
        return keys[heads.start : heads.stop]

    def screen(self) -> ScreenTransform | None:
        """What a K screen knows of this rank's KV heads of a sparse layer; None where the layer has no screen.

        A layer that shares another's cache has its screen, too.
        """
        index = extract_layer_index(self.layer.kv_sharing_target_layer_name or self.name)
        transform = self.resolved.screens.get(index)
        if transform is None or self.tensor_parallel_size == 1:
            return transform
        # Several ranks have the same head where there are more of them than KV heads.
        heads = self.resolved.identity.num_kv_heads
        first = _rank(self.tensor_parallel_size) * heads // self.tensor_parallel_size
        return transform.heads(first, self.layer.num_kv_heads)

    def _heads(self) -> range:
        """This rank's query heads among the model's."""
        total, ranks = self.resolved.identity.num_query_heads, self.tensor_parallel_size
        if self.layer.num_heads * ranks != total:
            raise ValueError(
                f"{self.name} has {self.layer.num_heads} query heads on each of {ranks} ranks, but the model's "
                f"configuration says {total} in all; TOPTHETA needs a tensor-parallel size that divides the heads"
            )
        first = _rank(ranks) * self.layer.num_heads
        return range(first, first + self.layer.num_heads)


def _rank(tensor_parallel_size: int) -> int:
    """This process's tensor-parallel rank; vLLM knows none before it has set ranks up."""
    if tensor_parallel_size == 1:
        return 0
    from vllm.distributed import get_tensor_model_parallel_rank

    return get_tensor_model_parallel_rank()
