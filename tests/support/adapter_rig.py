"""A rig: attention layers with their builders and caches, stepped without an engine, and what they should give."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from adapter_cases import FP8, SCALE, BatchSpec, Host
from device import captured
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig

from topt_vllm.attention import reference
from topt_vllm.attention.common import (
    DecodeArguments,
    DecodeBatch,
    PagedCache,
    Selection,
    Thetas,
    choose_rows_per_state,
)
from topt_vllm.backend.metrics import recorder
from topt_vllm.backend.startup import resolve
from topt_vllm.backend.states import LayerStates, states_of


def layer_name(index: int) -> str:
    return f"model.layers.{index}.self_attn.attn"


def counting() -> Callable[[], dict[str, float]]:
    """What has been added to the counters since the call; zeros left out."""
    recorder().settle()
    before = recorder().totals()

    def added() -> dict[str, float]:
        recorder().settle()
        now = recorder().totals()
        return {name: new for name in now if (new := now[name] - before.get(name, 0))}

    return added


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
    def selection(self) -> Selection:
        """Of the settings."""
        return resolve(self.config).config.selection

    def bound(self, index: int = 0) -> Any:
        """What the builder has bound a layer to."""
        return self.layers[index].impl.bound

    def thetas(self, index: int = 0) -> Thetas | None:
        """Thresholds of a layer as they are now."""
        bound = self.bound(index)
        return bound.group.thresholds.thetas[bound.index]

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
        """What a layer's rows added up, float64 [8] on the CPU."""
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

    def prefill(self, lengths: Sequence[int]) -> None:
        """Steps that write the first tokens of requests into every layer, one request at a time."""
        for row, length in enumerate(lengths):
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
        key, value = self.random(2, len(slot_mapping), layer.num_kv_heads, layer.head_size)
        layer.impl.do_kv_cache_update(layer, key, value, self.caches[index], slot_mapping)

    def attend(self, index: int, metadata: Any, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random queries of a layer, and its output in a buffer full of NaN; each [rows, H, D]."""
        query = self._queries(index, rows)
        output = torch.full_like(query, torch.nan)
        self._forward(index, query, metadata, output)
        return query, output

    def capture(
        self, index: int, metadata: Any, rows: int
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """A layer's part of a CUDA graph, and what replays it as :meth:`attend`; without a GPU, the call anew."""
        query = self._queries(index, rows)
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

    def sparse(self, step: Step, thetas: Thetas, selection: Selection, index: int = 0) -> torch.Tensor:
        """The reference operator on a step's decode rows, float32 [rows, H, D].

        It works V sums and codes of K out anew.
        """
        key, value = self.stored(index)
        batch = step.metadata.decode
        states = key.shape[2] // choose_rows_per_state(key.shape[2])
        sums = torch.full_like(value[:, :, :states], torch.nan)
        cache = PagedCache(key, value, sums, self.bound(index).key_screen)
        whole = torch.nn.functional.pad(batch.seq_lens.cumsum(0), (1, 0)).int()
        reference.finish(cache, DecodeBatch(whole, batch.seq_lens, batch.block_table))
        query = step.query[: step.metadata.num_decode_rows]
        out = torch.empty_like(query, dtype=torch.float32)
        given = DecodeArguments(
            query, cache, batch, thetas, selection, SCALE, 0.0, out, sinks=self._sinks(index)
        )
        reference.decode(given)
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
            if (sinks := self._sinks(index)) is not None:
                columns = sinks.view(*scores.shape[:2], 1, 1).expand(-1, -1, end - start, 1)
                scores = torch.cat([scores, columns], dim=-1)
            weights = scores.softmax(dim=-1)[..., :n]
            out[start:end] = (weights @ values[:, None]).flatten(0, 1).transpose(0, 1)
        return out

    def stored(self, index: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer's cache as numbers, float32 [B, Hkv, P, D]."""
        layer, kv_cache = self.layers[index], self.caches[index]
        if not self.host.on_gpus:
            cache = layer.impl.views(layer, kv_cache)
            scales = (1.0, 1.0) if cache.key_scale is None else (cache.key_scale, cache.value_scale)
            return cache.key.float() * scales[0], cache.value.float() * scales[1]
        if kv_cache.dtype == torch.uint8:
            key, value = kv_cache.view(FP8).float().chunk(2, dim=-1)
            return key * layer._k_scale, value * layer._v_scale
        key, value = kv_cache.float().chunk(2, dim=-1)
        return key, value

    def random(self, *shape: int) -> torch.Tensor:
        """Normal numbers in bfloat16, the same on every device."""
        return torch.randn(*shape).bfloat16().to(self.host.device)

    def _queries(self, index: int, rows: int) -> torch.Tensor:
        layer = self.layers[index]
        return self.random(rows, layer.num_heads, layer.head_size)

    def _sinks(self, index: int) -> torch.Tensor | None:
        """Of a layer as its model has them, float32 [H]."""
        sinks = self.layers[index].impl.sinks
        return None if sinks is None else sinks.float()

    def _forward(self, index: int, query: torch.Tensor, metadata: Any, output: torch.Tensor) -> None:
        layer = self.layers[index]
        key, value = query.new_zeros(2, len(query), layer.num_kv_heads, layer.head_size)
        layer.impl.forward(layer, query, key, value, self.caches[index], metadata, output)
