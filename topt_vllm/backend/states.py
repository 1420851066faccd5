"""What Top-Theta stores beside K and V, in cache layers of its own.

vLLM plans, allocates, prefix caches and moves such a layer as it does an attention layer's cache: it is in the same
KV cache group, under the same block ids, and counts in the cache budget. It has a backend and a builder, for vLLM
wants them of every cache layer, and nothing ever attends to it.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout, KVQuantMode, get_kv_quant_mode

from topt_vllm.attention.api import Implementation
from topt_vllm.attention.common import ScreenFormat, choose_rows_per_state
from topt_vllm.backend.layers import thresholds_of
from topt_vllm.backend.startup import Resolved, resolve

_VALUE_SUMS, _KEY_SCREEN = ".toptheta_value_sums", ".toptheta_key_screen"


class _StatesBuilder(AttentionMetadataBuilder[None]):
    """Builds nothing; declares nothing that others would have to do without."""

    _cudagraph_support = AttentionCGSupport.ALWAYS

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> None:
        """None: no layer asks for it."""


class StatesBackend(AttentionBackend):
    """Of cache layers beside attention layers which are all of one kind."""

    @staticmethod
    def get_name() -> str:
        return "TOPTHETA_STATES"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("nothing attends to TOPTHETA's states")

    @staticmethod
    def get_builder_cls() -> type[_StatesBuilder]:
        return _StatesBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1 if kv_cache_spec is None else kv_cache_spec.tokens_per_state)]


class PackedStatesBackend(StatesBackend):
    """Of cache layers beside layers of several kinds: windows, state-space models.

    Only where all layers of a block lie together does vLLM keep pages of different sizes in one group (0.31 to
    0.33); else it would make the pages one size, and blocks that have nothing to do with the attention layer's.
    """

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return KVCacheLayout.BLNHC, KVCacheLayout.BLHNC


class StatesLayer(AttentionLayerBase):
    """States of one attention layer, of one kind.

    Where caches are of several dtypes, vLLM fills each new block with zeros first (0.31 to 0.33): what other layers
    left in it may be no number in the new layer's dtype. In a model of one kind of layers a block's parts keep their
    meaning, so the states say that they are what the attention layer's cache is. Among layers of other kinds a block
    may be a window's after it held states, and vLLM's CPU kernel multiplies slots that nobody wrote by zero, which
    leaves a NaN: there they say what they are.

    Attributes:
        dtype: Of the numbers.
        kv_cache: [B, Hkv, states of a block, bytes of a state / itemsize]; empty until vLLM has allocated it.
    """

    dtype: ClassVar[torch.dtype]

    def __init__(self, attention: Any, packed: bool) -> None:
        """
        Args:
            attention: vLLM's Attention layer.
            packed: Whether the model has layers of other kinds.
        """
        self._num_kv_heads = attention.num_kv_heads
        self._packed = packed
        self._declared, self._quantised = self.dtype, KVQuantMode.NONE
        if not packed:
            self._declared = attention.kv_cache_torch_dtype
            self._quantised = get_kv_quant_mode(attention.kv_cache_dtype)
        self.kv_cache = torch.empty(0)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return PackedStatesBackend if self._packed else StatesBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> FullAttentionSpec:
        return self.spec(vllm_config.cache_config.block_size)

    def spec(self, block_size: int) -> FullAttentionSpec:
        """What blocks of that many tokens take."""
        rows, size = self.state(block_size)
        return FullAttentionSpec(
            block_size=block_size,
            num_kv_heads=self._num_kv_heads,
            head_size=size // self._declared.itemsize,
            head_size_v=0,
            dtype=self._declared,
            kv_quant_mode=self._quantised,
            tokens_per_state=rows,
        )

    @abstractmethod
    def state(self, block_size: int) -> tuple[int, int]:
        """Rows that a state stands for, and its bytes for one KV head."""

    def numbers(self) -> torch.Tensor:
        """A view of the cache as what is stored in it."""
        return self.kv_cache.detach().view(self.dtype)


class ValueSums(StatesLayer):
    """Running sums of V, float32 [B, Hkv, states of a block, Dv]."""

    dtype = torch.float32

    def __init__(self, attention: Any, packed: bool) -> None:
        super().__init__(attention, packed)
        self._value_dim = attention.head_size_v

    def state(self, block_size: int) -> tuple[int, int]:
        return choose_rows_per_state(block_size), self._value_dim * self.dtype.itemsize


class KeyScreens(StatesLayer):
    """Low-bit copies of K, uint8 [B, Hkv, bytes]."""

    dtype = torch.uint8

    def __init__(
        self, attention: Any, packed: bool, implementation: Implementation, screen: ScreenFormat
    ) -> None:
        super().__init__(attention, packed)
        self._head_dim = attention.head_size
        self._implementation = implementation
        self._screen = screen

    def state(self, block_size: int) -> tuple[int, int]:
        return block_size, self._implementation.screen_bytes(self._screen, self._head_dim, block_size)

    def numbers(self) -> torch.Tensor:
        return super().numbers().squeeze(2)


@dataclass(frozen=True)
class LayerStates:
    """What one attention layer has beside its cache.

    Attributes:
        value_sums: None without compensation.
        key_screen: None without a K screen.
    """

    value_sums: ValueSums | None = None
    key_screen: KeyScreens | None = None


def register(vllm_config: VllmConfig) -> None:
    """Gives each layer that may skip rows its states; call it with all layers made, before vLLM plans the cache.

    It does nothing for layers that were there at an earlier call: weights may be loaded again.
    """
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    new = {name: layer for name, layer in layers.items() if not getattr(layer.impl, "states_known", True)}
    if not new:
        return
    resolved = resolve(vllm_config)
    tensor_parallel_size = vllm_config.parallel_config.tensor_parallel_size
    context = vllm_config.compilation_config.static_forward_context
    for name, layer in new.items():
        layer.impl.states_known = True
        thetas, reason = thresholds_of(layer, name, resolved, tensor_parallel_size)
        if thetas is not None or reason is None:
            owner = layer.kv_sharing_target_layer_name or name
            context.update(states_for(owner, layer, resolved, vllm_config))


def states_for(name: str, layer: Any, resolved: Resolved, vllm_config: VllmConfig) -> dict[str, StatesLayer]:
    """The states of an attention layer that may skip rows, by their names in vLLM."""
    packed = _has_other_layers(vllm_config)
    config = resolved.config
    states: dict[str, StatesLayer] = {}
    if config.compensation == "vmean":
        states[name + _VALUE_SUMS] = ValueSums(layer, packed)
    if config.screen is not None:
        states[name + _KEY_SCREEN] = KeyScreens(layer, packed, resolved.implementation, config.screen)
    return states


def states_of(name: str, layer: Any, vllm_config: VllmConfig) -> LayerStates:
    """What was registered for an attention layer, or for the one whose cache it shares."""
    owner = layer.kv_sharing_target_layer_name or name
    context = vllm_config.compilation_config.static_forward_context
    return LayerStates(context.get(owner + _VALUE_SUMS), context.get(owner + _KEY_SCREEN))


def describe(spec: Any, states: Sequence[LayerStates]) -> str:
    """What states cost beside caches of a vLLM ``AttentionSpec``, for the log; empty where there are none."""
    kinds = {
        "V sums": [layer.value_sums for layer in states if layer.value_sums],
        "copies of K": [layer.key_screen for layer in states if layer.key_screen],
    }
    sizes = {
        kind: sum(one.spec(spec.block_size).page_size_bytes for one in layers)
        for kind, layers in kinds.items()
        if layers
    }
    whole = len(states) * spec.page_size_bytes + sum(sizes.values())
    shares = " and ".join(f"{size / whole:.1%} for {kind}" for kind, size in sizes.items())
    return f"of the cache of {len(states)} layers, {shares}" if shares else ""


def _has_other_layers(vllm_config: VllmConfig) -> bool:
    """Whether vLLM caches anything but full attention."""
    layers: dict[str, Any] = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    return any(
        (not isinstance(layer, Attention) or layer.sliding_window is not None)
        and not isinstance(layer, StatesLayer)
        for layer in layers.values()
    )
