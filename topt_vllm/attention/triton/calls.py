"""From the arguments of a decode call to kernel launches: shapes and strides decide, never contents."""

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from topt_vllm.attention.common import DecodeArguments, DecodeBatch, KeyScreen, Thetas
from topt_vllm.attention.screen import NOISE, hadamard_block
from topt_vllm.attention.triton.arguments import compute_dtype, stored
from topt_vllm.attention.triton.decode_kernel import _topt_decode_kernel
from topt_vllm.attention.triton.launch import (
    MATRIX_ROWS,
    GpuLimits,
    Launch,
    LaunchShape,
    choose,
    power_of_two,
)
from topt_vllm.attention.triton.merge_kernel import _topt_merge_kernel
from topt_vllm.attention.triton.queries_kernel import _topt_queries_kernel
from topt_vllm.attention.triton.workspace import cut, words_of

# Elements of V that the merge and the finish kernel add at a time, in this many rows at least.
_VALUE_ELEMENTS, _VALUE_ROWS = 8192, 16
# Elements of the queries that one program of the queries kernel takes.
_QUERY_ELEMENTS = 1024
# int8 products take so many elements of a row at least.
_MATRIX_BYTES = 32


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


class DecodeStep(DecodeArguments):
    """One decode call of a layer."""

    @property
    def max_query_rows(self) -> int:
        """No sequence has more query rows."""
        return self.batch.max_query_rows or self.query.shape[0]

    @property
    def screen(self) -> KeyScreen | None:
        """What keys go through; nothing where there are no thresholds."""
        return None if self.thetas is None else self.cache.key_screen

    def choose(self, limits: GpuLimits, programs: int | None) -> Launch:
        """Launch parameters, with the heuristic's number of programs if None is given."""
        num_heads, key_dim = self.query.shape[1:]
        _, num_kv_heads, block_size, value_dim = self.cache.value.shape
        shape = LaunchShape(
            self.max_query_rows,
            num_heads,
            num_kv_heads,
            max(key_dim, value_dim),
            self.cache.value.element_size(),
            self.screen is not None,
            self.batch.seq_lens.shape[0],
            block_size,
        )
        return choose(shape, limits, programs)

    def items(self, launch: Launch) -> int:
        """Chunks of query rows of all sequences."""
        return self.batch.seq_lens.shape[0] * launch.chunks(self.max_query_rows)

    def words(self, launch: Launch) -> dict[str, int]:
        """How the workspace is cut."""
        num_heads, head_dim = self.query.shape[1:]
        _, num_kv_heads, _, value_dim = self.cache.value.shape
        return words_of(launch, self.items(launch), num_heads, num_kv_heads, head_dim, value_dim)

    def calls(self, launch: Launch, memory: torch.Tensor, interpreted: bool) -> list[Call]:
        """The queries kernel, if there is a screen, the decode and the merge kernel.

        Args:
            launch: From :meth:`choose`.
            memory: float32 [at least the words of :meth:`words`].
            interpreted: Whether Triton's interpreter runs the kernels.
        """
        parts = cut(memory, self.words(launch))
        lists = {name: parts.pop(name) for name in ("listed_scores", "listed_slots", "listed_positions")}
        queries = {name: parts.pop(name) for name in ("query_codes", "coefficients")}
        shared = self._shared(launch, parts["partial_reached"]) | parts
        calls = [self._decode(launch, shared | lists | queries, interpreted), self._merge(launch, shared)]
        return calls if self.screen is None else [self._queries(self.screen, queries), *calls]

    def _shared(self, launch: Launch, unread: torch.Tensor) -> dict[str, Any]:
        """What the decode and the merge kernel both take.

        Args:
            launch: From :meth:`choose`.
            unread: Stands in for pointers that aren't used, in every kernel. Not a part of the batch, which may
                begin anywhere (vLLM's microbatches): Triton would compile the kernels again for the alignment.
        """
        _, num_kv_heads, block_size, value_dim = self.cache.value.shape
        value, form = stored(self.cache.value)
        statistics, items = self.statistics, self.items(launch)
        return {
            "value": value,
            **strides("value", value, "block", "head", "slot"),
            **of_batch(self.batch),
            "statistics": unread if statistics is None else statistics,
            "statistics_slots": 1 if statistics is None else statistics.shape[0],
            "items": items,
            "chunks": launch.chunks(self.max_query_rows),
            "KV_HEADS": num_kv_heads,
            "GROUP": self.query.shape[1] // num_kv_heads,
            "ROWS": launch.rows,
            "VALUE_DIM": value_dim,
            "VALUE_PAD": power_of_two(value_dim),
            "BLOCK_SIZE": block_size,
            "STATE_ROWS": self.cache.rows_per_state or block_size,
            "ITEMS_PAD": items_pad(items),
            "TILE": launch.tile,
            "MIN_TILES": launch.min_tiles,
            "SPARSE": self.thetas is not None,
            "SCREEN": self.screen is not None,
            "VMEAN": self.vmean,
            "COUNT": statistics is not None,
            "REACHED": self.reached is not None and self.thetas is not None,
            "FORMAT": form,
        }

    def _decode(self, launch: Launch, shared: dict[str, Any], interpreted: bool) -> Call:
        cache, selection, unread = self.cache, self.selection, shared["partial_reached"]
        key, _ = stored(cache.key)
        compute = compute_dtype(self.query, cache.key, interpreted)
        head_dim = self.query.shape[2]
        arguments = shared | {
            "query": self.query,
            **strides("query", self.query, "row", "head"),
            "key": key,
            **strides("key", key, "block", "head", "slot", "dim"),
            "key_scale": unread if cache.key_scale is None else cache.key_scale,
            "scale": self.scale,
            "softcap": self.softcap,
            "min_seq_len": selection.min_seq_len,
            "sink_tokens": selection.sink_tokens,
            "recent_tokens": selection.recent_tokens,
            "SINGLE_ROW": self.max_query_rows == 1,
            "COLUMNS": launch.columns,
            "WIDE": max(MATRIX_ROWS, launch.columns),
            "HEAD_DIM": head_dim,
            "DIM_PAD": power_of_two(head_dim),
            "HALF_PAD": max(_MATRIX_BYTES, power_of_two(head_dim) // 2),
            "LIST": launch.list_keys,
            "CANDIDATES": launch.candidates,
            "GATHER": launch.gather,
            "KEY_STAGES": launch.key_stages,
            "CANDIDATE_STAGES": launch.candidate_stages,
            "VALUE_STAGES": launch.value_stages,
            "UNION": selection.group_keep == "union",
            "SOFTCAP": self.softcap > 0,
            "CONVERTED": launch.converts_fp8 and not interpreted,
            "SCALED_KEY": cache.key_scale is not None,
            "COMPUTE": compute,
            "PRECISION": "ieee" if compute == tl.float32 else None,
            "num_warps": launch.num_warps,
        }
        if launch.max_registers is not None:
            arguments["maxnreg"] = launch.max_registers
        grid = (launch.programs, shared["KV_HEADS"])
        arguments |= self._thresholds(unread) | self._codes(launch, interpreted, unread)
        return Call(_topt_decode_kernel, grid, arguments)

    def _codes(self, launch: Launch, interpreted: bool, unread: torch.Tensor) -> dict[str, Any]:
        """The decode kernel's K screen."""
        screen = self.screen
        codes = None if screen is None else screen.codes
        return {
            "codes": unread if codes is None else codes,
            "words": unread if codes is None else codes.view(torch.int32),
            **strides("codes", codes, "block", "head"),
            "HARD": screen is not None and screen.margin is None,
            "FOUR_AT_ONCE": launch.four_at_once and not interpreted,
        }

    def _queries(self, screen: KeyScreen, queries: dict[str, torch.Tensor]) -> Call:
        rows, num_heads, head_dim = self.query.shape
        dim_pad = power_of_two(head_dim)
        vectors = max(1, _QUERY_ELEMENTS // dim_pad)
        arguments = queries | {
            "query": self.query,
            "mean": screen.transform.mean,
            "channel_scale": screen.transform.scale,
            "signs": screen.transform.signs,
            **strides("query", self.query, "row", "head"),
            "scale": self.scale,
            "deviations": NOISE * (screen.margin or 0.0),
            "vectors": rows * num_heads,
            "HEADS": num_heads,
            "GROUP": num_heads // self.cache.key.shape[1],
            "HEAD_DIM": head_dim,
            "DIM_PAD": dim_pad,
            "ROTATED": hadamard_block(head_dim),
            "HARD": screen.margin is None,
            "VECTORS": vectors,
            "num_warps": 4,
        }
        return Call(_topt_queries_kernel, (-(-rows * num_heads // vectors),), arguments)

    def _thresholds(self, unread: torch.Tensor) -> dict[str, Any]:
        """θ of the decode kernel."""
        thetas = self.thetas
        by_length = isinstance(thetas, Thetas)
        num_lengths = thetas.lengths.shape[0] if isinstance(thetas, Thetas) else 0
        return {
            "lengths": thetas.lengths if isinstance(thetas, Thetas) else unread,
            "theta": unread if thetas is None else thetas.theta,
            "theta_stride": 0 if thetas is None else thetas.theta.stride(0),
            "law": thetas.law if isinstance(thetas, Thetas) else unread,
            "BY_ROW": not by_length,
            "NUM_LENGTHS": num_lengths,
            "LENGTHS_PAD": power_of_two(num_lengths),
        }

    def _merge(self, launch: Launch, shared: dict[str, Any]) -> Call:
        scale, unread = self.cache.value_scale, shared["partial_reached"]
        sums = self.cache.value_sums if self.vmean else None
        arguments = shared | {
            "value_sums": unread if sums is None else sums,
            **strides("sums", sums, "block", "head", "state"),
            "value_scale": unread if scale is None else scale,
            "sinks": unread if self.sinks is None else self.sinks,
            "result": self.out,
            **strides("result", self.out, "row", "head"),
            "reached": unread if self.reached is None else self.reached,
            "programs": launch.programs,
            "max_rows": self.max_query_rows,
            "SEGMENTS": 64 if shared["VALUE_PAD"] <= 128 else 32,
            "TAIL": value_rows(shared["VALUE_PAD"]),
            "SINKS": self.sinks is not None,
            "SCALED_VALUE": scale is not None,
            "num_warps": 4,
        }
        sequences = self.batch.seq_lens.shape[0]
        # The second and third dimension of a grid end at 65535.
        return Call(_topt_merge_kernel, (sequences * self.max_query_rows, self.query.shape[1]), arguments)


def strides(name: str, tensor: torch.Tensor | None, *dimensions: str) -> dict[str, int]:
    """Strides of the first dimensions by the kernels' names; 0 of a tensor that isn't there."""
    found = (0,) * len(dimensions) if tensor is None else tensor.stride()
    return {f"{name}_stride_{part}": stride for part, stride in zip(dimensions, found, strict=False)}


def of_batch(batch: DecodeBatch) -> dict[str, Any]:
    """A batch by the kernels' names."""
    return {
        "query_start_loc": batch.query_start_loc,
        "seq_lens": batch.seq_lens,
        "block_table": batch.block_table,
        "table_stride": batch.block_table.stride(0),
    }


def items_pad(items: int) -> int:
    """Items as a power of two, in steps so wide that a server compiles the kernels once or twice."""
    return next(size for size in (256 << 3 * step for step in range(8)) if items <= size)


def value_rows(value_pad: int) -> int:
    """V rows that the merge and the finish kernel add at a time."""
    return max(_VALUE_ROWS, _VALUE_ELEMENTS // value_pad)
