"""What runs inside a benchmarked engine's worker: counters, backends, and thresholds from what it attends to."""

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from topt_vllm.benchmarks.cases import union_theta
from topt_vllm.calibration.key_statistics import key_sums
from topt_vllm.engines.counters import WorkerCounters


@dataclass
class _Seen:
    """What one layer was called with for one sequence, on the device.

    Attributes:
        keys: [tokens, Hkv, D] of each call.
        queries: [1, H, D] of each call with one token.
    """

    keys: list[torch.Tensor] = field(default_factory=list)
    queries: list[torch.Tensor] = field(default_factory=list)


class BenchmarkedWorker(WorkerCounters):
    """Mixed into vLLM's worker (``worker_extension_cls``)."""

    def attention_backends(self) -> list[str]:
        """Names of the backends that serve the layers."""
        return sorted({layer.get_attn_backend().get_name() for layer in self._attention_layers().values()})

    def watch_attention(self) -> None:
        """Records the queries and keys of every layer without a window from now on; needs an eager engine."""
        self._seen = {
            index: _Seen()
            for index, layer in self._attention_layers().items()
            if layer.sliding_window is None
        }
        for index, seen in self._seen.items():
            layer = self._attention_layers()[index]
            layer.register_forward_pre_hook(_recording(seen, layer.num_heads, layer.num_kv_heads))

    def thetas_found(self, context: int, steps: int, keeps: list[float], forced: int) -> dict[int, Any]:
        """θ that read shares of the V rows in what was recorded.

        Args:
            context: Tokens of the sequence's prompt.
            steps: Decode steps after it.
            keeps: Shares.
            forced: Last tokens that are read whatever their score.

        Returns:
            By layer, for each share, θ of each query head.

        Raises:
            RuntimeError: Not all was recorded.
        """
        layers = self._attention_layers()
        found = {}
        for index, seen in self._seen.items():
            keys = torch.cat(seen.keys)
            if len(keys) != context + steps or len(seen.queries) < steps:
                raise RuntimeError(
                    f"layer {index} was seen with {len(keys)} keys and {len(seen.queries)} calls of one token, "
                    f"where {context + steps} and {steps} are expected"
                )
            # A prompt's last chunk may be one token too.
            scores = _scores(layers[index], torch.cat(seen.queries[-steps:]), keys[:context])
            kv_heads = layers[index].num_kv_heads
            found[index] = [union_theta(scores, kv_heads, keep, forced).tolist() for keep in keeps]
        return found

    def keys_seen(self) -> dict[int, Any]:
        """Sums over the recorded keys and queries by layer, as key statistics are made of."""
        found = {}
        for index, seen in self._seen.items():
            # Only so many queries are known: those of decode steps.
            key, query = (torch.cat(part).transpose(0, 1) for part in (seen.keys, seen.queries))
            found[index] = key_sums(query, key).tolist()
        return found

    def _attention_layers(self) -> dict[int, Any]:
        modules: Any = self.get_model().modules()  # type: ignore[attr-defined]
        layers = [module for module in modules if isinstance(module, Attention)]
        return {extract_layer_index(layer.layer_name): layer for layer in layers}


def _recording(seen: _Seen, heads: int, kv_heads: int) -> Any:
    def hook(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        query, key = arguments[:2]
        rows = query.shape[0]
        seen.keys.append(key.view(rows, kv_heads, -1).clone())
        if rows == 1:
            seen.queries.append(query.view(rows, heads, -1).clone())

    return hook


def _scores(layer: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Scaled, softcapped scores, float32 [R, H, n]."""
    grouped = query.float().unflatten(1, (key.shape[1], -1))
    scores = torch.einsum("rhgd,nhd->rhgn", grouped, key.float()).flatten(1, 2) * layer.impl.scale
    softcap = getattr(layer.impl, "logits_soft_cap", None)
    return softcap * torch.tanh(scores / softcap) if softcap else scores
