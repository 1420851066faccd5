"""What Top-Theta stores beside K and V, in cache layers of its own.

vLLM plans, allocates, prefix caches and moves such a layer as it does an attention layer's cache: it is in the same
KV cache group, under the same block ids, and counts in the cache budget. It has a backend and a builder, for vLLM
wants them of every cache layer, and nothing ever attends to it.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config_or_none, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout, KVQuantMode

from topt_vllm.attention.api import Implementation
from topt_vllm.attention.common import choose_rows_per_state
from topt_vllm.attention.screen import ScreenFormat
from topt_vllm.backend import compat, connectors
from topt_vllm.backend.layers import ModelLayer
from topt_vllm.backend.resolved import Resolved
from topt_vllm.backend.startup import resolve

# Of one state; what vLLM chooses where nobody sets a size. At 16 slots V sums would be a sixteenth of a bf16 cache.
PREFERRED_BLOCK_SIZE = 64

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
        """Any; and while vLLM chooses one, such as holds whole states: smaller blocks have more V sums."""
        return [MultipleOf(PREFERRED_BLOCK_SIZE if kv_cache_spec is None and _is_choosing() else 1)]


def _is_choosing() -> bool:
    """Whether vLLM has yet to choose a block size; 0.31 asks backends without a spec after that too."""
    config = get_current_vllm_config_or_none()
    if config is None:
        return False
    cache = config.cache_config
    return not cache.user_specified_block_size and cache.block_size == cache.DEFAULT_BLOCK_SIZE


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

    To vLLM it has some numbers for each token, as K and V are: what moves tokens moves states, and 0.32's NIXL and
    Mooncake refuse a cache with fewer states than tokens. In truth the page of a block is one piece of memory for
    its states. They are of the attention cache's dtype to vLLM, for where caches are of several, it fills each new
    block with zeros.

    Attributes:
        name: In vLLM.
        kv_cache: [B, Hkv, P, numbers of a token]; empty until vLLM has allocated it.
    """

    def __init__(self, name: str, attention: Any, vllm_config: VllmConfig) -> None:
        """
        Args:
            name: In vLLM.
            attention: vLLM's Attention layer.
            vllm_config: Of the engine.
        """
        self.name = name
        self._attention = attention
        self._vllm_config = vllm_config
        self.kv_cache = torch.empty(0)

    def get_attn_backend(self) -> type[AttentionBackend]:
        # Asked when all models are loaded: a draft model may have windows where the model has none.
        if not has_other_layers(self._vllm_config):
            return StatesBackend
        connectors.refuse_beside_other_layers(self._vllm_config)
        return PackedStatesBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> FullAttentionSpec:
        return self.beside(self._attention.get_kv_cache_spec(vllm_config))

    def beside(self, spec: FullAttentionSpec) -> FullAttentionSpec:
        """What blocks of states take beside those of the attention layer."""
        if has_other_layers(self._vllm_config):
            spec = replace(spec, dtype=torch.float32, kv_quant_mode=KVQuantMode.NONE)
        rows, size = self.state(spec.block_size)
        return replace(spec, head_size=-(-size // (rows * spec.dtype.itemsize)), head_size_v=0)

    @abstractmethod
    def state(self, block_size: int) -> tuple[int, int]:
        """Rows that a state stands for, and its bytes for one KV head."""

    def states(self) -> torch.Tensor:
        """uint8 [B, Hkv, states of a block, bytes of a state], a view of the cache."""
        num_blocks, num_heads, block_size, width = self.kv_cache.shape
        rows, size = self.state(block_size)
        # A page is in one piece whatever the layout, so heads can be apart in it where vLLM has tokens apart.
        pages = self.kv_cache.detach().as_strided(
            (num_blocks, num_heads * block_size * width), (self.kv_cache.stride(0), 1)
        )
        return pages.view(torch.uint8).unflatten(1, (num_heads, block_size // rows, -1))[..., :size]


class ValueSums(StatesLayer):
    """Running sums of V."""

    def state(self, block_size: int) -> tuple[int, int]:
        return choose_rows_per_state(block_size), self._attention.head_size_v * torch.float32.itemsize

    def numbers(self) -> torch.Tensor:
        """float32 [B, Hkv, states of a block, Dv], a view of the cache."""
        return self.states().view(torch.float32)


class KeyScreens(StatesLayer):
    """Low-bit copies of K.

    Args:
        name: In vLLM.
        attention: vLLM's Attention layer.
        vllm_config: Of the engine.
        implementation: The operator.
        format: Of the copies.
    """

    def __init__(
        self,
        name: str,
        attention: Any,
        vllm_config: VllmConfig,
        implementation: Implementation,
        format: ScreenFormat,
    ) -> None:
        super().__init__(name, attention, vllm_config)
        self._implementation = implementation
        self._format = format

    def state(self, block_size: int) -> tuple[int, int]:
        head_dim = self._attention.head_size
        return block_size, self._implementation.screen_bytes(self._format, head_dim, block_size)

    def codes(self) -> torch.Tensor:
        """uint8 [B, Hkv, bytes], a view of the cache."""
        return self.states().squeeze(2)


@dataclass(frozen=True)
class LayerStates:
    """What one attention layer has beside its cache.

    Attributes:
        value_sums: None without compensation.
        key_screen: None without a K screen, or where an implementation stores none.
    """

    value_sums: ValueSums | None = None
    key_screen: KeyScreens | None = None

    @cached_property
    def by_name(self) -> dict[str, StatesLayer]:
        """Those that are there, by their names in vLLM; asked in every layer of every step."""
        return {each.name: each for each in (self.value_sums, self.key_screen) if each is not None}


def register(vllm_config: VllmConfig) -> None:
    """Gives each layer that may skip rows its states; call it with all layers made, before vLLM plans the cache.

    Layers whose windows no context outgrows lose them first, so that vLLM caches them as what they are, full
    attention. It does nothing for layers that were there at an earlier call: weights may be loaded again.
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
        if layer.impl.sees_all:
            layer.sliding_window = None
        known = ModelLayer(layer, name, resolved, tensor_parallel_size)
        if not known.on_platform:
            layer.impl.operator = resolved.implementation
        if known.reason is None:
            screened = known.screen() is not None
            owner = layer.kv_sharing_target_layer_name or name
            context.update(states_for(owner, layer, resolved, vllm_config, screened))
    if any(isinstance(layer, StatesLayer) for layer in context.values()):
        compat.let_caches_be_shared_beside_states()
        compat.start_state_space_layers(vllm_config)


def states_for(
    name: str, layer: Any, resolved: Resolved, vllm_config: VllmConfig, screened: bool
) -> dict[str, StatesLayer]:
    """The states of an attention layer that may skip rows, by their names in vLLM."""
    format = resolved.screen_format
    states: list[StatesLayer] = []
    if resolved.config.compensation == "vmean":
        states.append(ValueSums(name + _VALUE_SUMS, layer, vllm_config))
    if screened and format is not None:
        screens = KeyScreens(name + _KEY_SCREEN, layer, vllm_config, resolved.implementation, format)
        if screens.state(PREFERRED_BLOCK_SIZE)[1]:
            states.append(screens)
    return {each.name: each for each in states}


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
        kind: sum(one.beside(spec).page_size_bytes for one in layers)
        for kind, layers in kinds.items()
        if layers
    }
    whole = len(states) * spec.page_size_bytes + sum(sizes.values())
    shares = ", ".join(f"{kind} {size / whole:.1%}" for kind, size in sizes.items())
    return f"of the layers' cache: {shares}" if shares else ""


def has_other_layers(vllm_config: VllmConfig) -> bool:
    """Whether vLLM caches anything but full attention."""
    layers: dict[str, Any] = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    return any(
        (not isinstance(layer, Attention) or layer.sliding_window is not None)
        and not isinstance(layer, StatesLayer)
        for layer in layers.values()
    )
