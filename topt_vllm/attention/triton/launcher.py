"""The Triton implementation: launches the kernels without reading anything back. README.md has the derivation."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from topt_vllm.attention.common import DecodeBatch, PagedCache, Policy, Stat, Thetas
from topt_vllm.attention.triton import launch
from topt_vllm.attention.triton.arguments import check, compute_dtype, interpreted, stored
from topt_vllm.attention.triton.decode_kernel import _topt_decode_kernel
from topt_vllm.attention.triton.merge_kernel import _topt_merge_kernel
from topt_vllm.attention.triton.sums_kernel import _topt_sums_kernel
from topt_vllm.attention.triton.workspace import Workspace, allocate_workspace, parts

__all__ = [
    "Bound",
    "Workspace",
    "allocate_workspace",
    "bind",
    "decode",
    "new_statistics",
    "prepare",
    "update_sums",
]

_STATISTICS_SLOTS = 32


def prepare(device_type: str) -> None:
    """Checks that the kernels can run on a device; they are compiled when they are first launched.

    Raises:
        RuntimeError: CPU tensors without Triton's interpreter.
    """
    if device_type == "cpu" and not interpreted():
        raise RuntimeError(
            "the triton kernel runs on GPUs, and the tensors are on the CPU. Use implementation cpu or auto here; "
            "to check the kernel without a GPU, set TRITON_INTERPRET=1 before Triton is imported (very slow)."
        )


def new_statistics(device: torch.device | str) -> torch.Tensor:
    """Zeroed accumulators float64 [slots, 7]: their sum over slots counts, and rows spread over the slots."""
    return torch.zeros(_STATISTICS_SLOTS, len(Stat), dtype=torch.float64, device=device)


@dataclass(frozen=True)
class Bound:
    """The implementation on a workspace: allocates nothing, so that a CUDA graph can capture it."""

    workspace: Workspace

    def decode(
        self,
        query: torch.Tensor,
        cache: PagedCache,
        batch: DecodeBatch,
        thetas: Thetas | None,
        policy: Policy,
        scale: float,
        softcap: float,
        out: torch.Tensor,
        statistics: torch.Tensor | None,
    ) -> None:
        """Every row of a batch over the paged cache; arguments as :func:`topt_vllm.attention.api.decode`.

        Args:
            query: [R, H, D].
            cache: Blocks in any layout whose V rows are contiguous.
            batch: Rows, context lengths and block table, int32.
            thetas: Thresholds, or None for θ = −inf.
            policy: Selection and compensation.
            scale: Factor of q·k.
            softcap: Logits softcap, 0 for none.
            out: [R, H, D], written.
            statistics: float64 [7] or [slots, 7] to add to, or None.

        Raises:
            RuntimeError: A tensor that the kernel can't read, or a workspace that is too small.
        """
        check(query, cache, batch, out)
        _launch(self.workspace, query, cache, batch, thetas, policy, scale, softcap, out, statistics)

    def update_sums(self, cache: PagedCache, slot_mapping: torch.Tensor) -> None:
        """As :func:`update_sums`."""
        update_sums(cache, slot_mapping)


def bind(workspace: Workspace) -> Bound:
    """The implementation on a workspace of :func:`allocate_workspace`."""
    return Bound(workspace)


def decode(
    query: torch.Tensor,
    cache: PagedCache,
    batch: DecodeBatch,
    thetas: Thetas | None,
    policy: Policy,
    scale: float,
    softcap: float,
    out: torch.Tensor,
    statistics: torch.Tensor | None,
    splits: int | None = None,
) -> None:
    """As :meth:`Bound.decode`, with a workspace of its own; ``splits`` fixes their number."""
    check(query, cache, batch, out)
    rows, num_heads, head_dim = query.shape
    sequences, num_kv_heads = batch.seq_lens.shape[0], cache.value.shape[1]
    parameters = _choose(query, cache, batch, splits)
    words = sum(parts(parameters, rows, sequences, num_heads, num_kv_heads, head_dim))
    memory = torch.empty(words, dtype=torch.float32, device=query.device)
    _launch(Workspace(memory, splits), query, cache, batch, thetas, policy, scale, softcap, out, statistics)


def update_sums(cache: PagedCache, slot_mapping: torch.Tensor) -> None:
    """Recomputes the V sum of every block whose last slot is among those just written; nothing is read back.

    Args:
        cache: The layer's cache; ``value_sums`` is written.
        slot_mapping: int64 [tokens], slots written by the step; negative for padding.
    """
    if cache.value_sums is None or not slot_mapping.numel():
        return
    value, form = stored(cache.value)
    _, num_kv_heads, block_size, head_dim = value.shape
    # A prefill has many tokens and few blocks to finish: fewer programs that look at more tokens each.
    tokens = 1 if slot_mapping.numel() <= 1024 else 16
    _topt_sums_kernel[(triton.cdiv(slot_mapping.numel(), tokens), num_kv_heads)](
        value,
        cache.value_sums,
        slot_mapping,
        slot_mapping.numel(),
        *value.stride()[:3],
        *cache.value_sums.stride()[:2],
        TOKENS=tokens,
        HEAD_DIM=head_dim,
        DIM_PAD=launch.power_of_two(head_dim),
        BLOCK_SIZE=block_size,
        TILE=16,
        FORMAT=form,
    )


def _choose(query: torch.Tensor, cache: PagedCache, batch: DecodeBatch, splits: int | None) -> launch.Launch:
    capacity = batch.block_table.shape[1] * cache.value.shape[2]
    max_query_rows = batch.max_query_rows or query.shape[0]
    return launch.choose(
        batch.seq_lens.shape[0],
        max_query_rows,
        query.shape[1],
        cache.value.shape[1],
        query.shape[2],
        capacity,
        cache.value.element_size(),
        query.device,
        splits,
    )


def _launch(
    workspace: Workspace,
    query: torch.Tensor,
    cache: PagedCache,
    batch: DecodeBatch,
    thetas: Thetas | None,
    policy: Policy,
    scale: float,
    softcap: float,
    out: torch.Tensor,
    statistics: torch.Tensor | None,
) -> None:
    rows, num_heads, head_dim = query.shape
    sequences = batch.seq_lens.shape[0]
    num_kv_heads, block_size = cache.value.shape[1:3]
    parameters = _choose(query, cache, batch, workspace.splits)
    max_query_rows = batch.max_query_rows or rows
    sizes = parts(parameters, rows, sequences, num_heads, num_kv_heads, head_dim)
    if sum(sizes) > workspace.memory.numel():
        raise RuntimeError(
            f"workspace has {workspace.memory.numel()} words, {sum(sizes)} needed for {rows} rows of {sequences} "
            "sequences; allocate_workspace must be given the largest batch"
        )
    outputs, softmax, sums, counts = workspace.memory[: sum(sizes)].split(sizes)
    counts = counts.view(torch.int32)
    key, form = stored(cache.key)
    value, _ = stored(cache.value)
    vmean = thetas is not None and policy.compensation == "vmean"
    unused = batch.seq_lens  # stands in for tensors that a configuration doesn't read
    common = {
        "CHUNKS": parameters.chunks,
        "KV_HEADS": num_kv_heads,
        "GROUP": num_heads // num_kv_heads,
        "ROWS": parameters.rows,
        "HEAD_DIM": head_dim,
        "DIM_PAD": launch.power_of_two(head_dim),
        "BLOCK_SIZE": block_size,
        "TILE": parameters.tile,
        "MIN_TILES": parameters.min_tiles,
        "VMEAN": vmean,
        "FORMAT": form,
    }
    num_lengths = 0 if thetas is None else thetas.lengths.shape[0]
    compute = compute_dtype(query, cache.key)
    _topt_decode_kernel[(parameters.splits, num_kv_heads, sequences * parameters.chunks)](
        query,
        key,
        value,
        cache.value_sums if vmean else unused,
        batch.query_start_loc,
        batch.seq_lens,
        batch.block_table,
        unused if thetas is None else thetas.lengths,
        unused if thetas is None else thetas.theta,
        unused if thetas is None else thetas.law,
        unused if cache.key_scale is None else cache.key_scale,
        outputs,
        softmax,
        sums,
        counts,
        *query.stride()[:2],
        *key.stride(),
        *value.stride()[:3],
        *(cache.value_sums.stride()[:2] if vmean and cache.value_sums is not None else (0, 0)),
        batch.block_table.stride(0),
        0 if thetas is None else thetas.theta.stride(0),
        scale,
        softcap,
        policy.min_seq_len,
        policy.sink_tokens,
        policy.recent_tokens,
        GROUP_PAD=parameters.group_pad,
        SINGLE_ROW=max_query_rows == 1,
        SUMS_PER_TILE=launch.power_of_two(-(-parameters.tile // block_size)),
        NUM_LENGTHS=num_lengths,
        LENGTHS_PAD=launch.power_of_two(num_lengths),
        UNION=policy.group_keep == "union",
        SOFTCAP=softcap > 0,
        SCALED_KEY=cache.key_scale is not None,
        COMPUTE=compute,
        PRECISION="ieee" if compute == tl.float32 else "tf32",
        num_warps=parameters.num_warps,
        num_stages=parameters.num_stages,
        **common,
    )
    _topt_merge_kernel[(num_heads, sequences * max_query_rows)](
        value,
        batch.query_start_loc,
        batch.seq_lens,
        batch.block_table,
        unused if cache.value_scale is None else cache.value_scale,
        outputs,
        softmax,
        sums,
        counts,
        out,
        unused if statistics is None else statistics,
        *value.stride()[:3],
        batch.block_table.stride(0),
        *out.stride()[:2],
        parameters.splits,
        max_query_rows,
        1 if statistics is None or statistics.dim() == 1 else statistics.shape[0],
        SPLITS_PAD=launch.power_of_two(parameters.splits),
        TAIL=16,
        SPARSE=thetas is not None,
        COUNT=statistics is not None,
        SCALED_VALUE=cache.value_scale is not None,
        num_warps=4,
        **common,
    )
