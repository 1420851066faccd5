"""Attention layers with their builders and caches, without an engine: vLLM plans and allocates, hosts attend.

On the CPU's host vLLM's own kernels run. Those of the GPUs' hosts don't run on CPU tensors, so torch stands in for
the two that the adapter hands work to, on GPUs too: the cache write, and attention over the rows of the platform's
metadata. tests/test_gpu_engine.py runs them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_cases import (
    BLOCK_SIZE,
    FP8,
    HEAD_DIM,
    MAX_BLOCKS,
    MAX_SEQUENCES,
    NUM_BLOCKS,
    NUM_HEADS,
    NUM_KV_HEADS,
    SCALE,
    BatchSpec,
    Host,
    Table,
)
from device import captured
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl
from vllm.v1.attention.backends.utils import (
    get_supported_kv_cache_layouts,
    resolve_kv_cache_layout,
)
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheLayout
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec, init_attn_backend
from vllm.v1.worker.utils import allocate_kv_cache, bind_kv_cache_to_layers

from topt_vllm.attention import reference
from topt_vllm.attention.common import DecodeBatch, PagedCache, Policy, Thetas, choose_rows_per_state
from topt_vllm.backend.startup import resolve
from topt_vllm.backend.states import LayerStates, StatesLayer, states_of
from topt_vllm.table.identity import identify


def layer_name(index: int) -> str:
    return f"model.layers.{index}.self_attn.attn"


@dataclass(frozen=True)
class Step:
    """One layer's part of a step.

    Attributes:
        query: [rows, H, D].
        output: [rows, H, D], NaN where nothing was written.
        metadata: What the layer's builder made.
        common: vLLM's batch.
    """

    query: torch.Tensor
    output: torch.Tensor
    metadata: Any
    common: CommonAttentionMetadata


@dataclass
class Rig:
    """Layers, their builders and caches, and what the platform's kernels were called with.

    Attributes:
        host: What the layers stand on.
        config: vLLM's.
        plan: vLLM's plan of the cache.
        layers: vLLM's layers.
        builders: The metadata builder of each layer; layers of a kind share one.
        caches: The cache of each layer [B, Hkv, P, 2D], as vLLM allocates it.
        tables: Block table of each layer's group, int32 [8, 5], scattered; block 0 is vLLM's null block.
        platform_rows: Query rows of each call of the platform's attention, where torch stands in for it.
    """

    host: Host
    config: VllmConfig
    plan: KVCacheConfig
    layers: list[Any]
    builders: list[Any]
    caches: list[torch.Tensor]
    tables: list[torch.Tensor]
    platform_rows: list[int] = field(default_factory=list)

    @property
    def builder(self) -> Any:
        """Of the first layer."""
        return self.builders[0]

    @property
    def policy(self) -> Policy:
        """Of the settings."""
        return resolve(self.config).config.operator_policy

    def bound(self, index: int = 0) -> Any:
        """What the builder has bound a layer to."""
        return self.layers[index].impl.bound

    def thetas(self, index: int = 0) -> Thetas | None:
        """Thresholds of a layer as they are now."""
        return self.bound(index).thresholds.thetas

    def states(self, index: int = 0) -> LayerStates:
        """What a layer has beside its cache."""
        layer = self.layers[index]
        return states_of(layer.layer_name, layer, self.config)

    def sums(self, row: int, length: int, index: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """V sums of a context that lies in a row of the block table: those in the cache, and worked out anew.

        Each float32 [Hkv, states of the context, D], of a cache without scales.
        """
        states, (_, value) = self.states(index).value_sums.numbers(), self.stored(index)
        per_state = value.shape[2] // states.shape[2]
        blocks = self.tables[index][row].long()
        found, rows = (part[blocks].transpose(0, 1).flatten(1, 2) for part in (states, value))
        whole = rows[:, : length // per_state * per_state].double().cumsum(dim=1)
        return found[:, : length // per_state], whole[:, per_state - 1 :: per_state].float()

    def statistics(self, index: int = 0) -> torch.Tensor:
        """What a layer's rows added up, float64 [7] on the CPU."""
        return self.bound(index).statistics.sum(dim=0).cpu()

    def forget(self) -> None:
        """Zeroes what the layers' rows added up, and forgets the platform's calls."""
        for layer in self.layers:
            if getattr(layer.impl, "bound", None) is not None:
                layer.impl.bound.statistics.zero_()
        self.platform_rows.clear()

    def common(
        self, batch: BatchSpec, index: int = 0, rows: slice | Sequence[int] = slice(None)
    ) -> CommonAttentionMetadata:
        """A batch over some rows of a layer's block table, without padding."""
        device, block_size = self.host.device, self.builders[index].kv_cache_spec.block_size
        rows = rows if isinstance(rows, slice) else list(rows)
        table = self.tables[index][rows][: len(batch.seq_lens)].clone()
        starts = torch.tensor([0, *accumulate(batch.query_lens)], dtype=torch.int32)
        slots = []
        for request, (first, end) in enumerate(zip(batch.earlier, batch.seq_lens, strict=True)):
            positions = torch.arange(first, end, device=device)
            slots.append(table[request, positions // block_size].long() * block_size + positions % block_size)
        lengths = torch.tensor(batch.seq_lens, dtype=torch.int32)
        return CommonAttentionMetadata(
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts.clone(),
            seq_lens=lengths.to(device),
            seq_lens_cpu_upper_bound=lengths.clone(),
            num_reqs=len(batch.seq_lens),
            num_actual_tokens=int(starts[-1]),
            max_query_len=max(batch.query_lens),
            max_seq_len=max(batch.seq_lens),
            block_table_tensor=table,
            slot_mapping=torch.cat(slots),
        )

    def prefill(self, lengths: Sequence[int], rows: Sequence[int] | None = None) -> None:
        """Steps that write the first tokens of requests into every layer, one request at a time."""
        for row, length in zip(rows or range(len(lengths)), lengths, strict=True):
            if length:
                for index in range(len(self.layers)):
                    self.step(BatchSpec("prefill", [length], [length]), index, [row])

    def write_contexts(self, batch: BatchSpec) -> None:
        """What the engine did before a batch; nothing of it is counted."""
        self.prefill(batch.earlier)
        self.forget()

    def write(self, index: int, slot_mapping: torch.Tensor) -> None:
        """Random K and V into the slots of a layer, through the implementation."""
        layer = self.layers[index]
        key, value = self.random(2, len(slot_mapping), layer.num_kv_heads, HEAD_DIM)
        layer.impl.do_kv_cache_update(layer, key, value, self.caches[index], slot_mapping)

    def attend(self, index: int, metadata: Any, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random queries of a layer, and its output in a buffer full of NaN; each [rows, H, D]."""
        query = self.random(rows, self.layers[index].num_heads, HEAD_DIM)
        output = torch.full_like(query, torch.nan)
        self._forward(index, query, metadata, output)
        return query, output

    def capture(
        self, index: int, metadata: Any, rows: int
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """A layer's part of a CUDA graph, and what replays it as :meth:`attend`; without a GPU, the call anew."""
        query = self.random(rows, self.layers[index].num_heads, HEAD_DIM)
        output = torch.empty_like(query)
        replay = captured(lambda: self._forward(index, query, metadata, output))

        def attend() -> tuple[torch.Tensor, torch.Tensor]:
            query.copy_(self.random(*query.shape))
            output.fill_(torch.nan)
            replay()
            return query, output

        return attend

    def step(self, batch: BatchSpec, index: int = 0, rows: slice | Sequence[int] = slice(None)) -> Step:
        """One whole step of one layer."""
        common = self.common(batch, index, rows)
        metadata = self.builders[index].build(0, common)
        self.write(index, common.slot_mapping)
        return Step(*self.attend(index, metadata, common.num_actual_tokens), metadata, common)

    def sparse(self, step: Step, thetas: Thetas, policy: Policy, index: int = 0) -> torch.Tensor:
        """The reference operator on a step's decode rows, float32 [rows, H, D]; it works V sums out anew."""
        key, value = self.stored(index)
        batch = step.metadata.decode
        states = key.shape[2] // choose_rows_per_state(key.shape[2])
        cache = PagedCache(key, value, torch.full_like(value[:, :, :states], torch.nan))
        whole = torch.nn.functional.pad(batch.seq_lens.cumsum(0), (1, 0)).int()
        reference.finish(cache, DecodeBatch(whole, batch.seq_lens, batch.block_table))
        query = step.query[: step.metadata.num_decode_rows]
        out = torch.empty_like(query, dtype=torch.float32)
        reference.decode(query, cache, batch, thetas, policy, SCALE, 0.0, out, None)
        return out

    def dense(self, step: Step, index: int = 0) -> torch.Tensor:
        """Attention of a step's rows to every key, float32 [rows, H, D]."""
        return self.attend_all(index, step.query, step.common)

    def attend_all(self, index: int, query: torch.Tensor, common: Any) -> torch.Tensor:
        """As :meth:`dense`, for the rows of vLLM's batch, or of its metadata on GPUs."""
        key, value = self.stored(index)
        block_table = common.block_table if hasattr(common, "block_table") else common.block_table_tensor
        starts = common.query_start_loc.tolist()
        out = torch.full_like(query, torch.nan, dtype=torch.float32)
        for sequence, (start, end) in enumerate(pairwise(starts)):
            n = int(common.seq_lens[sequence])
            blocks = block_table[sequence, : -(-n // key.shape[2])].long()
            keys, values = (part[blocks].transpose(0, 1).flatten(1, 2)[:, :n] for part in (key, value))
            later = torch.ones(end - start, n, dtype=torch.bool, device=query.device).triu(
                n - (end - start) + 1
            )
            rows = (
                query[start:end].float().transpose(0, 1).unflatten(0, (len(keys), -1))
            )  # [Hkv, group, rows, D]
            scores = (rows @ keys[:, None].transpose(2, 3) * SCALE).masked_fill(later, -torch.inf)
            out[start:end] = (scores.softmax(dim=-1) @ values[:, None]).flatten(0, 1).transpose(0, 1)
        return out

    def stored(self, index: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer's cache as numbers, float32 [B, Hkv, P, D]."""
        layer, kv_cache = self.layers[index], self.caches[index]
        if not self.host.on_gpus:
            cache = layer.impl.views(layer, kv_cache)
            scales = (1.0, 1.0) if cache.key_scale is None else (cache.key_scale, cache.value_scale)
            return cache.key.float() * scales[0], cache.value.float() * scales[1]
        if kv_cache.dtype == torch.uint8:
            key, value = kv_cache.view(FP8).float().split(HEAD_DIM, dim=-1)
            return key * layer._k_scale, value * layer._v_scale
        key, value = kv_cache.float().split(HEAD_DIM, dim=-1)
        return key, value

    def random(self, *shape: int) -> torch.Tensor:
        """Normal numbers in bfloat16, the same on every device."""
        return torch.randn(*shape).bfloat16().to(self.host.device)

    def _forward(self, index: int, query: torch.Tensor, metadata: Any, output: torch.Tensor) -> None:
        layer = self.layers[index]
        key, value = query.new_zeros(2, len(query), layer.num_kv_heads, HEAD_DIM)
        layer.impl.forward(layer, query, key, value, self.caches[index], metadata, output)


def _write_cache(
    self: Any,
    layer: Any,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Stands in for the cache write of vLLM's kernels for GPUs."""
    used = slot_mapping >= 0
    block_size = kv_cache.shape[2]
    blocks, slots = slot_mapping[used] // block_size, slot_mapping[used] % block_size
    if kv_cache.dtype == torch.uint8:
        key, value = (
            (x.float() / s).to(FP8).view(torch.uint8)
            for x, s in ((key, layer._k_scale), (value, layer._v_scale))
        )
    kv_cache[blocks, :, slots] = torch.cat([key, value], dim=-1)[: len(slot_mapping)][used]


def _poison(tensor: torch.Tensor, nan: bool) -> None:
    """Fills a tensor with NaN, or with numbers, of bfloat16 or of an fp8 format."""
    byte, number = (0x7F, torch.nan) if nan else (0x55, 1000.0)
    tensor.fill_(byte if tensor.dtype == torch.uint8 else number)


@pytest.fixture
def make_rig(vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Builds a :class:`Rig` on a host, as an engine does with a model."""

    def make(
        host: Host,
        table: Table | None = Table(),  # noqa: B008
        layers: int = 1,
        backend: Any = None,
        layout: KVCacheLayout | None = None,
        kv_cache_dtype: str = "auto",
        windows: Sequence[int | None] = (),
        prefixes: Sequence[str] = (),
        rank: tuple[int, int] = (0, 1),
        drafts: int = 0,
        settings: dict[str, Any] | None = None,
        **options: Any,
    ) -> Rig:
        """Makes one.

        Args:
            host: What the layers stand on.
            table: Thresholds; None for θ = −inf, unless the settings have others.
            layers: How many.
            backend: Another class than the host's.
            layout: Of the cache; vLLM's choice by default.
            kv_cache_dtype: As ``--kv-cache-dtype``.
            windows: Sliding windows of the first layers.
            prefixes: Names of the first layers, where they aren't those of the model.
            rank: This tensor-parallel rank and their number.
            drafts: Tokens that are drafted for each request.
            settings: Of ``toptheta``. On GPUs' hosts a kernel is named, so that it decodes dense layers too.
            options: Of vLLM's ``Attention``.
        """
        settings = ({"implementation": "triton"} if host.on_gpus else {}) | (settings or {})
        if settings.get("policy") == "sift":
            monkeypatch.setattr(vllm_config.parallel_config, "worker_cls", _worker(host))
        elif table is None:
            settings.setdefault("thresholds", "none")
        else:
            path = tmp_path / "table.yaml"
            table.write(identify(vllm_config.model_config.hf_config, "tiny"), path)
            settings["thresholds"] = str(path)
        monkeypatch.setitem(vllm_config.additional_config, "toptheta", settings)
        monkeypatch.setattr(vllm_config.device_config, "device_type", host.device_type)
        monkeypatch.setattr(vllm_config.parallel_config, "tensor_parallel_size", rank[1])
        monkeypatch.setattr("vllm.distributed.get_tensor_model_parallel_rank", lambda: rank[0])
        monkeypatch.setattr(vllm_config, "speculative_config", _speculation(drafts) if drafts else None)
        for name, value in {
            "cache_dtype": kv_cache_dtype,
            "kv_cache_layout": layout and layout.name,
            "block_size": BLOCK_SIZE,
            "num_gpu_blocks_override": NUM_BLOCKS,
        }.items():
            monkeypatch.setattr(vllm_config.cache_config, name, value)
        context = vllm_config.compilation_config.static_forward_context
        context.clear()
        names = [*prefixes, *map(layer_name, range(len(prefixes), layers))]
        with set_default_torch_dtype(torch.bfloat16), host.device:
            made = [
                Attention(
                    NUM_HEADS // rank[1],
                    HEAD_DIM,
                    SCALE,
                    max(1, NUM_KV_HEADS // rank[1]),
                    cache_config=vllm_config.cache_config,
                    prefix=name,
                    attn_backend=backend or host.backend,
                    per_layer_sliding_window=windows[index] if index < len(windows) else None,
                    **options,
                )
                for index, name in enumerate(names)
            ]
        for layer in made:
            layer.process_weights_after_loading(torch.bfloat16)
        rig = _plan(host, vllm_config, made)
        if host.on_gpus:
            for implementation in (TritonAttentionImpl, FlashAttentionImpl):
                monkeypatch.setattr(implementation, "forward", _attention_of(rig))
                monkeypatch.setattr(implementation, "do_kv_cache_update", _write_cache)
        return rig

    return make


def _speculation(drafts: int) -> Any:
    return SimpleNamespace(
        method="ngram",
        num_speculative_tokens=drafts,
        parallel_drafting=False,
        use_eagle=lambda: False,
        use_dflash=lambda: False,
    )


def _worker(host: Host) -> str:
    kind = "gpu" if host.on_gpus else "cpu"
    return f"topt_vllm.backend.hosts.{kind}_worker.TopThetaWorker"


def _plan(host: Host, config: VllmConfig, layers: list[Any]) -> Rig:
    """Plans, allocates, poisons and binds the cache, and makes the builders, in the engine's order."""
    specs = get_kv_cache_spec(config)
    layouts = get_supported_kv_cache_layouts(get_current_attn_backends(config))
    layout = resolve_kv_cache_layout(config, [[each.name for each in layouts]], specs.values())
    plan = get_kv_cache_config_from_groups(config, get_kv_cache_groups(config, specs), 0)
    assert plan.num_blocks == NUM_BLOCKS
    groups, _, kernel_block_sizes = init_attn_backend(plan, config, host.device)
    caches = allocate_kv_cache(plan, host.device, layout, kernel_block_sizes)
    context = config.compilation_config.static_forward_context
    # vLLM's CPU kernel multiplies slots beyond a context by zero, so NaN may not be there but where blocks change
    # hands between groups; the operator's own tests have it.
    nan = host.on_gpus or len(groups) > 1
    for poison_states in (False, True):
        for name, tensor in caches.items():
            if isinstance(context[name], StatesLayer) == poison_states:
                _poison(tensor, poison_states or nan)
    bind_kv_cache_to_layers(caches, context, 1, plan.kv_cache_groups)
    blocks = (torch.randperm(NUM_BLOCKS - 1) + 1).int().to(host.device)
    # Groups share the pool, so each has blocks of its own.
    tables = blocks[: len(groups) * MAX_SEQUENCES * MAX_BLOCKS].view(-1, MAX_SEQUENCES, MAX_BLOCKS)
    places = {
        name: (group.get_metadata_builder(), tables[number])
        for number, of_number in enumerate(groups)
        for group in of_number
        for name in group.layer_names
    }
    names = [layer.layer_name for layer in layers]
    return Rig(
        host,
        config,
        plan,
        layers,
        [places[name][0] for name in names],
        [context[name].kv_cache for name in names],
        [places[name][1] for name in names],
    )


def _attention_of(rig: Rig) -> Any:
    """Stands in for attention of vLLM's kernels for GPUs: every row of their metadata reads every key."""

    def attend(
        impl: Any, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, metadata: Any, output: Any
    ) -> Any:
        rows, index = metadata.num_actual_tokens, rig.layers.index(layer)
        rig.platform_rows.append(rows)
        output[:rows] = rig.attend_all(index, query[:rows], metadata).to(output.dtype)
        return output

    return attend
