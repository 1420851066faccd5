"""A GPU builder and its layers without an engine: vLLM plans and allocates the cache, the Triton kernels decode.

Without a GPU all of it is on CPU tensors, where vLLM's own GPU kernels don't run. On either, torch stands in for
the two that the adapter hands work to: the cache write, and attention over the rows of the platform's metadata.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from device import DEVICE, captured
from gpu_cases import (
    BLOCK_SIZE,
    FP8,
    HEAD_DIM,
    MAX_SEQUENCES,
    NUM_BLOCKS,
    NUM_HEADS,
    NUM_KV_HEADS,
    SCALE,
    THETAS,
    BatchSpec,
)
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from topt_vllm.attention import reference
from topt_vllm.attention.common import DecodeBatch, PagedCache, Policy, Thetas


def layer_name(index: int) -> str:
    return f"model.layers.{index}.self_attn.attn"


@dataclass
class Rig:
    """Layers of one builder, their caches, and what the platform's kernels were called with.

    Attributes:
        builder: The metadata builder.
        layers: vLLM's layers.
        caches: Their caches [B, Hkv, P, 2D], as vLLM allocates them.
        block_table: int32 [8, 5], scattered; block 0 is vLLM's null block.
        platform_rows: Query rows of each call of the platform's attention.
    """

    builder: Any
    layers: list[Any]
    caches: list[torch.Tensor]
    block_table: torch.Tensor
    platform_rows: list[int] = field(default_factory=list)

    def common(self, batch: BatchSpec, rows: slice = slice(None)) -> CommonAttentionMetadata:
        """A batch over some rows of the block table, without padding."""
        table = self.block_table[rows][: len(batch.seq_lens)].clone()
        starts = torch.tensor([0, *torch.tensor(batch.query_lens).cumsum(0).tolist()], dtype=torch.int32)
        slots = []
        for request, (seq_len, query_len) in enumerate(zip(batch.seq_lens, batch.query_lens, strict=True)):
            positions = torch.arange(seq_len - query_len, seq_len, device=DEVICE)
            slots.append(table[request, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE)
        lengths = torch.tensor(batch.seq_lens, dtype=torch.int32)
        return CommonAttentionMetadata(
            query_start_loc=starts.to(DEVICE),
            query_start_loc_cpu=starts.clone(),
            seq_lens=lengths.to(DEVICE),
            seq_lens_cpu_upper_bound=lengths.clone(),
            num_reqs=len(batch.seq_lens),
            num_actual_tokens=int(starts[-1]),
            max_query_len=max(batch.query_lens),
            max_seq_len=max(batch.seq_lens),
            block_table_tensor=table,
            slot_mapping=torch.cat(slots),
        )

    def write_contexts(self, batch: BatchSpec) -> None:
        """Writes the tokens of earlier steps into every cache, as prefill would."""
        for request, (seq_len, query_len) in enumerate(zip(batch.seq_lens, batch.query_lens, strict=True)):
            if seq_len > query_len:
                earlier = BatchSpec("earlier", [seq_len - query_len], [seq_len - query_len])
                common = self.common(earlier, slice(request, None))
                for index in range(len(self.layers)):
                    self.write(index, common.slot_mapping)

    def write(self, index: int, slot_mapping: torch.Tensor) -> None:
        """Random K and V into the slots of a layer, through the implementation."""
        layer = self.layers[index]
        key, value = random(2, len(slot_mapping), NUM_KV_HEADS, HEAD_DIM)
        layer.impl.do_kv_cache_update(layer, key, value, self.caches[index], slot_mapping)

    def attend(self, index: int, metadata: Any, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random queries of a layer, and its output in a buffer full of NaN; each [rows, H, D]."""
        query = random(rows, NUM_HEADS, HEAD_DIM)
        output = torch.full_like(query, torch.nan)
        self._forward(index, query, metadata, output)
        return query, output

    def capture(
        self, index: int, metadata: Any, rows: int
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """A layer's part of a CUDA graph, and what replays it as :meth:`attend`; without a GPU, the call anew."""
        query = random(rows, NUM_HEADS, HEAD_DIM)
        output = torch.empty_like(query)
        replay = captured(lambda: self._forward(index, query, metadata, output))

        def attend() -> tuple[torch.Tensor, torch.Tensor]:
            query.copy_(random(rows, NUM_HEADS, HEAD_DIM))
            output.fill_(torch.nan)
            replay()
            return query, output

        return attend

    def _forward(self, index: int, query: torch.Tensor, metadata: Any, output: torch.Tensor) -> None:
        layer = self.layers[index]
        key, value = query.new_empty(2, len(query), NUM_KV_HEADS, HEAD_DIM)
        layer.impl.forward(layer, query, key, value, self.caches[index], metadata, output)

    def step(self, batch: BatchSpec, index: int = 0) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """One whole step of one layer: query rows, output, metadata."""
        common = self.common(batch)
        metadata = self.builder.build(0, common)
        self.write(index, common.slot_mapping)
        return *self.attend(index, metadata, common.num_actual_tokens), metadata

    def expected(
        self,
        index: int,
        query: torch.Tensor,
        common: CommonAttentionMetadata,
        thetas: Thetas | None,
        policy: Policy,
    ) -> torch.Tensor:
        """The reference operator over a layer's cache, float32 [rows, H, D]; V sums are worked out anew."""
        return reference_rows(self.layers[index], self.caches[index], query, common, thetas, policy)


def random(*shape: int) -> torch.Tensor:
    """Normal numbers in bfloat16, the same on every device."""
    return torch.randn(*shape).bfloat16().to(DEVICE)


def make_sparse(rig: Rig, policy: Policy | None = None, thetas: Thetas | None = THETAS) -> Policy:
    """Gives every layer of a rig the same thresholds."""
    policy = policy or Policy()
    for layer in rig.layers:
        layer.impl.bound.thetas, layer.impl.bound.policy = thetas, policy
    return policy


def reference_rows(
    layer: Any,
    kv_cache: torch.Tensor,
    query: torch.Tensor,
    common: Any,
    thetas: Thetas | None,
    policy: Policy,
) -> torch.Tensor:
    """The reference operator on vLLM's cache, with sums of its own; fp8 caches as float32."""
    key, value = readable(layer, kv_cache)
    block_table = common.block_table if hasattr(common, "block_table") else common.block_table_tensor
    out = torch.empty_like(query, dtype=torch.float32)
    reference.decode(
        query,
        PagedCache(key, value, value.float().sum(dim=2)),
        DecodeBatch(common.query_start_loc, common.seq_lens, block_table),
        thetas,
        policy,
        SCALE,
        0.0,
        out,
        None,
    )
    return out


def readable(layer: Any, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [B, Hkv, P, D] of vLLM's cache as numbers."""
    if kv_cache.dtype == torch.uint8:
        key, value = kv_cache.view(FP8).float().split(HEAD_DIM, dim=-1)
        return key * layer._k_scale, value * layer._v_scale
    key, value = kv_cache.split(HEAD_DIM, dim=-1)
    return key, value


def _write_cache(
    self: Any,
    layer: Any,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    used = slot_mapping >= 0
    blocks, slots = slot_mapping[used] // BLOCK_SIZE, slot_mapping[used] % BLOCK_SIZE
    if kv_cache.dtype == torch.uint8:
        key, value = (
            (x.float() / s).to(FP8).view(torch.uint8)
            for x, s in ((key, layer._k_scale), (value, layer._v_scale))
        )
    kv_cache[blocks, :, slots] = torch.cat([key, value], dim=-1)[: len(slot_mapping)][used]


@pytest.fixture
def make_rig(vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Builds a :class:`Rig` on a backend class; layers are those of the threshold table in the configuration."""

    def make(
        backend: type,
        layers: int = 1,
        layout: KVCacheLayout = KVCacheLayout.LBNHC,
        kv_cache_dtype: str = "auto",
        windows: tuple[int, ...] = (),
        **options: Any,
    ) -> Rig:
        context = vllm_config.compilation_config.static_forward_context
        context.clear()
        monkeypatch.setattr(vllm_config.cache_config, "cache_dtype", kv_cache_dtype)
        monkeypatch.setattr(vllm_config.cache_config, "kv_cache_layout", layout.name)
        names = [layer_name(index) for index in range(layers)]
        with set_default_torch_dtype(torch.bfloat16), DEVICE:
            made = [
                Attention(
                    NUM_HEADS,
                    HEAD_DIM,
                    SCALE,
                    NUM_KV_HEADS,
                    cache_config=vllm_config.cache_config,
                    prefix=name,
                    attn_backend=backend,
                    per_layer_sliding_window=windows[index] if index < len(windows) else None,
                    **options,
                )
                for index, name in enumerate(names)
            ]
        quantised = kv_cache_dtype.startswith("fp8")
        spec = backend.customize_spec(
            FullAttentionSpec(
                block_size=BLOCK_SIZE,
                num_kv_heads=NUM_KV_HEADS,
                head_size=HEAD_DIM,
                dtype=torch.uint8 if quantised else torch.bfloat16,
                kv_quant_mode=made[0].impl.kv_quant_mode,
            ),
        )
        memory = NUM_BLOCKS * layers * spec.page_size_bytes
        plan = get_kv_cache_config_from_groups(vllm_config, [KVCacheGroupSpec(names, spec)], memory)
        assert plan.num_blocks == NUM_BLOCKS
        allocated = allocate_kv_cache(plan, DEVICE, layout, [BLOCK_SIZE])
        for tensor in allocated.values():  # unused slots are poison
            tensor.copy_(torch.full_like(tensor, 127 if quantised else torch.nan))
        builder = backend.get_builder_cls()(spec, names, vllm_config, DEVICE)
        table = (torch.randperm(NUM_BLOCKS - 1)[: MAX_SEQUENCES * 4] + 1).int().view(MAX_SEQUENCES, 4)
        rig = Rig(builder, made, [allocated[name] for name in names], table.to(DEVICE))

        def attend(
            impl: Any, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, metadata: Any, output: Any
        ) -> Any:
            rig.platform_rows.append(metadata.num_actual_tokens)
            rows = metadata.num_actual_tokens
            output[:rows] = reference_rows(layer, kv_cache, query[:rows], metadata, None, Policy()).to(
                output.dtype
            )
            return output

        for implementation in (TritonAttentionImpl, FlashAttentionImpl):
            monkeypatch.setattr(implementation, "forward", attend)
            monkeypatch.setattr(implementation, "do_kv_cache_update", _write_cache)
        return rig

    return make
