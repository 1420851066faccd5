"""TOPTHETA on vLLM's CPU attention."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
    _get_attn_isa,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from topt_vllm.attention.common import PagedCache
from topt_vllm.backend import compat
from topt_vllm.backend.backend import TopThetaBackend
from topt_vllm.backend.builder import TopThetaBuilder
from topt_vllm.backend.hosts import amx
from topt_vllm.backend.hosts.amx import Copies, CopyMetadata
from topt_vllm.backend.impl import TopThetaImpl
from topt_vllm.backend.states import has_other_layers

# ISAs of vLLM's kernels whose cache layout is K [D, P], V [P, D] (0.32). AMX and NEON lay K out differently.
_READABLE_ISAS = ("vec", "vec16")


class _Prefill(CPUAttentionBackendImpl):
    """vLLM's, which reads a copy of the cache where the metadata has one."""

    views: Callable[[Any, torch.Tensor], PagedCache]

    def forward(
        self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, attn_metadata: Any, *rest: Any
    ) -> torch.Tensor:
        """One step of one layer; arguments as the platform's ``forward`` has them."""
        if isinstance(attn_metadata, CopyMetadata):
            kv_cache = attn_metadata.copy.load(self.views(layer, kv_cache)).view(kv_cache.dtype)
        return super().forward(layer, query, key, value, kv_cache, attn_metadata, *rest)


class CpuTopThetaImpl(TopThetaImpl, _Prefill):
    """Prefill on CPU attention."""

    # Asked when the first rows are written, for then all layers are made.
    _fills_new_blocks: bool | None = None

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """As the platform does; where layers are of several kinds, blocks that are new are filled with zeros first.

        vLLM's kernel multiplies what lies behind a context by 0, and a block that held states, or was a state-space
        layer's, may hold NaN as 16-bit numbers. vLLM fills new blocks itself where a cache group is of attention
        layers alone and caches are of several dtypes or there are state-space layers (0.31 to 0.33), but not beside
        states.
        """
        if self._fills_new_blocks is None:
            self._fills_new_blocks = has_other_layers(self._vllm_config)
        if self._fills_new_blocks:
            block_size = kv_cache.shape[2]
            kv_cache[slot_mapping[slot_mapping % block_size == 0] // block_size] = 0
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)

    def views(self, layer: Any, kv_cache: torch.Tensor) -> PagedCache:
        """First all of a block's K as [D, P], then its V as [P, D]; bytes of the named format in an fp8 cache."""
        dtype = compat.CPU_FP8_DTYPES.get(self.kv_cache_dtype)
        stored = kv_cache if dtype is None else kv_cache.view(dtype)
        num_blocks, num_kv_heads, block_size, width = stored.shape
        head_dim = width // 2
        key, value = stored.view(num_blocks, num_kv_heads, 2 * block_size, head_dim).chunk(2, dim=2)
        key = key.view(num_blocks, num_kv_heads, head_dim, block_size).transpose(2, 3)
        if dtype is None:
            return PagedCache(key, value)
        scales = (torch.tensor([scale]) for scale in (layer._k_scale_float, layer._v_scale_float))
        return PagedCache(key, value, None, None, *scales)


class _VectorBuilder(CPUAttentionMetadataBuilder):
    """Metadata of vLLM's vector kernels, whose cache layout is the operator's; of AMX kernels where a copy pays."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.isa: str
        self._has_amx = self.isa == "amx"
        # Of what prompts read, for AMX kernels; None where they take vector kernels.
        self._copies: Copies | None = None
        if self._has_amx:
            self.isa = "vec"
            self._set_isa_to_layers(layer_names)
        if self.isa not in _READABLE_ISAS:
            raise NotImplementedError(
                f"TOPTHETA reads the cache layouts {_READABLE_ISAS}, but vLLM uses {self.isa!r} on this CPU. "
                "Use --attention-backend CPU_ATTN here."
            )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        """As the platform does, for the cache or for a copy of what the batch reads of it."""
        common = common_attn_metadata
        copy = self._copies.of(common) if self._copies is not None else None
        if copy is None:
            return super().build(common_prefix_len, common, fast_build)
        self.isa = "amx"
        try:
            common = common.replace(block_table_tensor=copy.block_table)
            return CopyMetadata(**vars(super().build(common_prefix_len, common, fast_build)), copy=copy)
        finally:
            self.isa = "vec"


def _platform_builder(
    kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
) -> CPUAttentionMetadataBuilder:
    """Of layers that stay with the platform: in its own layout, unless the operator may read the same cache."""
    layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names).values()
    shared = any(layer.kv_sharing_target_layer_name for layer in layers)
    kind = _VectorBuilder if shared else CPUAttentionMetadataBuilder
    return kind(kv_cache_spec, layer_names, vllm_config, device)


class CpuTopThetaBuilder(TopThetaBuilder, _VectorBuilder):
    """Prefill metadata of CPU attention."""

    platform_builder = staticmethod(_platform_builder)
    replays_graphs = False

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if not self._has_amx:
            return
        implementation = self._implementation
        if self._bound.group is not None and amx.reads(implementation, self.dtype, self.kv_cache_dtype):
            # The longest prompt, and what else may begin in the same step.
            most = (
                vllm_config.model_config.max_model_len + vllm_config.scheduler_config.max_num_batched_tokens
            )
            self._copies = Copies(implementation, self.block_size, self.num_heads // self.num_kv_heads, most)
        # The platform's builder has set its own for all.
        if self._platform is not None:
            for layer in get_layers_from_vllm_config(vllm_config, Attention, layer_names).values():
                stays = getattr(layer.impl, "platform_reason", None)
                layer.isa = self._platform.isa if stays else self.isa

    def _host_lengths(self, common: CommonAttentionMetadata) -> torch.Tensor:
        return common.seq_lens


class CpuTopThetaBackend(TopThetaBackend, CPUAttentionBackend):
    """For the layouts of K and V that vLLM's vector kernels have."""

    supported_kv_cache_dtypes: ClassVar[list] = ["auto", "bfloat16", "float16", *compat.CPU_FP8_DTYPES]

    @staticmethod
    def get_impl_cls() -> type[CpuTopThetaImpl]:
        return CpuTopThetaImpl

    @staticmethod
    def get_builder_cls() -> type[CpuTopThetaBuilder]:
        return CpuTopThetaBuilder

    @classmethod
    def supports_sink(cls) -> bool:
        """Yes: vLLM's implementation hands them to its kernel, though its backend doesn't say so (0.32)."""
        return True

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: str | None,
        block_size: int | None,
        *rest: Any,
    ) -> str | None:
        """As on every host, and no fp8 cache where vLLM has no kernel: it says so once the model is loaded."""
        reason: str | None = super().supports_combination(head_size, dtype, kv_cache_dtype, block_size, *rest)
        try:
            _get_attn_isa(dtype, block_size or 0, head_size, kv_cache_dtype)
        except NotImplementedError as error:
            return f"{str(error).rstrip('.')}; leave --kv-cache-dtype out"
        return reason

    @classmethod
    def explanations(cls, options: dict[str, Any]) -> dict[str, str]:
        sizes = ", ".join(map(str, cls.get_supported_head_sizes()))
        return super().explanations(options) | {
            "head_size not supported": f"{options['head_size']}; allowed: {sizes}",
        }

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """vLLM's own, and the one that packs a block's layers: its kernels take any distance between blocks."""
        return KVCacheLayout.LBHNC, KVCacheLayout.BLHNC
