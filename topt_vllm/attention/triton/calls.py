"""From the operator's arguments to kernel launches: shapes and strides decide, never contents."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from topt_vllm.attention.common import DecodeBatch, PagedCache, Policy, Thetas
from topt_vllm.attention.triton.arguments import compute_dtype, stored
from topt_vllm.attention.triton.decode_kernel import _topt_decode_kernel
from topt_vllm.attention.triton.launch import Launch, Target, choose, power_of_two
from topt_vllm.attention.triton.merge_kernel import _topt_merge_kernel
from topt_vllm.attention.triton.sums_kernel import _topt_sums_kernel
from topt_vllm.attention.triton.workspace import Parts

# V rows that the merge kernel and the sums kernel add at a time.
_VALUE_ROWS = 16


@dataclass(frozen=True)
class Call:
    """One launch.

    Attributes:
        kernel: Of Triton.
        grid: Programs per axis.
        arguments: By name, constants and compiler options too.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    def launch(self) -> None:
        """Runs it on the current device and stream."""
        self.kernel[self.grid](**self.arguments)


@dataclass(frozen=True)
class Step:
    """One decode call of a layer; attributes as the arguments of :func:`topt_vllm.attention.api.decode`."""

    query: torch.Tensor
    cache: PagedCache
    batch: DecodeBatch
    thetas: Thetas | None
    policy: Policy
    scale: float
    softcap: float
    out: torch.Tensor
    statistics: torch.Tensor | None

    @property
    def sequences(self) -> int:
        """S."""
        return self.batch.seq_lens.shape[0]

    @property
    def max_query_rows(self) -> int:
        """No sequence has more query rows."""
        return self.batch.max_query_rows or self.query.shape[0]

    @property
    def vmean(self) -> bool:
        """Whether the V sums are read."""
        return self.thetas is not None and self.policy.compensation == "vmean"

    def choose(self, target: Target, splits: int | None) -> Launch:
        """Launch parameters, with the heuristic's number of splits if None is given."""
        num_heads, head_dim = self.query.shape[1:]
        num_kv_heads, block_size = self.cache.value.shape[1:3]
        capacity = self.batch.block_table.shape[1] * block_size
        item_bytes = self.cache.value.element_size()
        shape = (self.sequences, self.max_query_rows, num_heads, num_kv_heads, head_dim, capacity, item_bytes)
        return choose(*shape, target, splits)

    def parts(self, launch: Launch) -> Parts:
        """How the workspace is cut."""
        rows, num_heads, head_dim = self.query.shape
        return Parts.of(launch, rows, self.sequences, num_heads, self.cache.value.shape[1], head_dim)

    def calls(self, launch: Launch, memory: torch.Tensor, interpreted: bool) -> tuple[Call, Call]:
        """The decode and the merge kernel.

        Args:
            launch: From :meth:`choose`.
            memory: float32 [at least the words of :meth:`parts`].
            interpreted: Whether Triton's interpreter runs the kernels.
        """
        shared = self._shared(launch) | self.parts(launch).cut(memory)
        return self._decode(launch, shared, interpreted), self._merge(launch, shared)

    def _shared(self, launch: Launch) -> dict[str, Any]:
        _, num_kv_heads, block_size, head_dim = self.cache.value.shape
        value, form = stored(self.cache.value)
        return {
            "value": value,
            "value_stride_block": value.stride(0),
            "value_stride_head": value.stride(1),
            "value_stride_slot": value.stride(2),
            "query_start_loc": self.batch.query_start_loc,
            "seq_lens": self.batch.seq_lens,
            "block_table": self.batch.block_table,
            "table_stride": self.batch.block_table.stride(0),
            "CHUNKS": launch.chunks,
            "KV_HEADS": num_kv_heads,
            "GROUP": self.query.shape[1] // num_kv_heads,
            "ROWS": launch.rows,
            "HEAD_DIM": head_dim,
            "DIM_PAD": power_of_two(head_dim),
            "BLOCK_SIZE": block_size,
            "TILE": launch.tile,
            "MIN_TILES": launch.min_tiles,
            "VMEAN": self.vmean,
            "FORMAT": form,
        }

    def _decode(self, launch: Launch, shared: dict[str, Any], interpreted: bool) -> Call:
        cache, thetas, policy, batch = self.cache, self.thetas, self.policy, self.batch
        key, _ = stored(cache.key)
        compute = compute_dtype(self.query, cache.key, interpreted)
        unread = batch.seq_lens  # stands in for tensors that this configuration doesn't read
        num_lengths = 0 if thetas is None else thetas.lengths.shape[0]
        sums = cache.value_sums if self.vmean and cache.value_sums is not None else None
        arguments = shared | {
            "query": self.query,
            "query_stride_row": self.query.stride(0),
            "query_stride_head": self.query.stride(1),
            "key": key,
            "key_stride_block": key.stride(0),
            "key_stride_head": key.stride(1),
            "key_stride_slot": key.stride(2),
            "key_stride_dim": key.stride(3),
            "key_scale": unread if cache.key_scale is None else cache.key_scale,
            "value_sums": unread if sums is None else sums,
            "sums_stride_block": 0 if sums is None else sums.stride(0),
            "sums_stride_head": 0 if sums is None else sums.stride(1),
            "lengths": unread if thetas is None else thetas.lengths,
            "theta": unread if thetas is None else thetas.theta,
            "theta_stride": 0 if thetas is None else thetas.theta.stride(0),
            "law": unread if thetas is None else thetas.law,
            "scale": self.scale,
            "softcap": self.softcap,
            "min_seq_len": policy.min_seq_len,
            "sink_tokens": policy.sink_tokens,
            "recent_tokens": policy.recent_tokens,
            "GROUP_PAD": launch.group_pad,
            "SINGLE_ROW": self.max_query_rows == 1,
            "SUMS_PER_TILE": power_of_two(-(-launch.tile // shared["BLOCK_SIZE"])),
            "NUM_LENGTHS": num_lengths,
            "LENGTHS_PAD": power_of_two(num_lengths),
            "UNION": policy.group_keep == "union",
            "SOFTCAP": self.softcap > 0,
            "SCALED_KEY": cache.key_scale is not None,
            "COMPUTE": compute,
            "PRECISION": "ieee" if compute == tl.float32 else None,
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
        }
        if launch.max_registers is not None:
            arguments["maxnreg"] = launch.max_registers
        grid = (launch.splits * launch.chunks, shared["KV_HEADS"], self.sequences)
        return Call(_topt_decode_kernel, grid, arguments)

    def _merge(self, launch: Launch, shared: dict[str, Any]) -> Call:
        scale, statistics, unread = self.cache.value_scale, self.statistics, self.batch.seq_lens
        arguments = shared | {
            "value_scale": unread if scale is None else scale,
            "result": self.out,
            "result_stride_row": self.out.stride(0),
            "result_stride_head": self.out.stride(1),
            "statistics": unread if statistics is None else statistics,
            "statistics_slots": 1 if statistics is None or statistics.dim() == 1 else statistics.shape[0],
            "splits": launch.splits,
            "max_rows": self.max_query_rows,
            "SPLITS_PAD": power_of_two(launch.splits),
            "TAIL": _VALUE_ROWS,
            "SPARSE": self.thetas is not None,
            "COUNT": statistics is not None,
            "SCALED_VALUE": scale is not None,
            "num_warps": 4,
        }
        return Call(
            _topt_merge_kernel, (self.query.shape[1], self.sequences * self.max_query_rows), arguments
        )


def sums_call(cache: PagedCache, sums: torch.Tensor, slot_mapping: torch.Tensor) -> Call:
    """The kernel that writes V sums; arguments as :func:`topt_vllm.attention.triton.launcher.update_sums`."""
    value, form = stored(cache.value)
    _, num_kv_heads, block_size, head_dim = value.shape
    num_tokens = slot_mapping.shape[0]
    # A prefill has many tokens and few blocks to finish: fewer programs that look at more tokens each.
    tokens = 1 if num_tokens <= 1024 else 16
    arguments = {
        "value": value,
        "value_sums": sums,
        "slot_mapping": slot_mapping,
        "num_tokens": num_tokens,
        "value_stride_block": value.stride(0),
        "value_stride_head": value.stride(1),
        "value_stride_slot": value.stride(2),
        "sums_stride_block": sums.stride(0),
        "sums_stride_head": sums.stride(1),
        "TOKENS": tokens,
        "HEAD_DIM": head_dim,
        "DIM_PAD": power_of_two(head_dim),
        "BLOCK_SIZE": block_size,
        "TILE": _VALUE_ROWS,
        "FORMAT": form,
        "num_warps": 4,
    }
    return Call(_topt_sums_kernel, (triton.cdiv(num_tokens, tokens), num_kv_heads), arguments)
