"""How a step falls into decode rows and prefill rows, from what the host knows; nothing is read off a device."""

import logging

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

# Fields of CommonAttentionMetadata with one entry per request (0.32) that a part of a batch takes along where set.
_PER_REQUEST = ("seq_lens", "block_table_tensor", "seq_lens_cpu_upper_bound", "is_prefilling", "req_idx")

logger = logging.getLogger("vllm.topt_vllm")


class ExtrapolationNotice:
    """Says once in the log that contexts are longer than calibrated.

    Args:
        calibrated_up_to: Longest calibrated context (tokens); None without thresholds.
    """

    def __init__(self, calibrated_up_to: int | None) -> None:
        self._limit = calibrated_up_to

    def see(self, lengths: torch.Tensor) -> None:
        """Context lengths of decoded rows; on the host."""
        if self._limit is None or not len(lengths) or (longest := int(lengths.max())) <= self._limit:
            return
        logger.info(
            "TOPTHETA: a context of %d tokens is longer than the table's %d; from here on its thresholds are "
            "extrapolated by each head's fitted law",
            longest,
            self._limit,
        )
        self._limit = None


def split(
    common: CommonAttentionMetadata, threshold: int, *, ends_of_prompts_decode: bool
) -> tuple[int, int, bool]:
    """Where the decode rows of a batch end; vLLM puts them first. A batch that is not causal is prefill as a whole.

    Args:
        common: The step's batch.
        threshold: Most query rows of a request that decodes.
        ends_of_prompts_decode: Whether a piece of a prompt with no more rows than that counts as decoding too.

    Returns:
        Requests that decode, their query rows (padding included), and whether there is prefill after them.
    """
    if common.causal is not True:
        return 0, 0, True
    num_decodes, num_prefills, num_rows, _ = split_decodes_and_prefills(
        common, decode_threshold=threshold, treat_short_extends_as_decodes=ends_of_prompts_decode
    )
    return num_decodes, num_rows, num_prefills > 0


def rows_after(common: CommonAttentionMetadata, num_decodes: int, num_rows: int) -> CommonAttentionMetadata:
    """The batch without its first requests, which have ``num_rows`` query rows."""
    if num_decodes == 0:
        return common
    per_request = {
        name: value[num_decodes:] for name in _PER_REQUEST if (value := getattr(common, name)) is not None
    }
    for name in ("seq_lens", "block_table_tensor"):
        per_request[name] = _aligned(per_request[name])
    return common.replace(
        query_start_loc=common.query_start_loc[num_decodes:] - num_rows,
        query_start_loc_cpu=common.query_start_loc_cpu[num_decodes:] - num_rows,
        num_reqs=common.num_reqs - num_decodes,
        num_actual_tokens=common.num_actual_tokens - num_rows,
        slot_mapping=common.slot_mapping[num_rows:],
        # What vLLM worked out for the whole batch.
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
        **per_request,
    )


def _aligned(part: torch.Tensor) -> torch.Tensor:
    """The same numbers, at a multiple of 16 bytes.

    vLLM's Triton kernels are compiled anew for other pointers, and what it warms up with are whole batches.
    """
    return part.clone() if part.storage_offset() * part.element_size() % 16 else part


def few_rows(common: CommonAttentionMetadata, threshold: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The requests of a batch in any order that decode.

    Args:
        common: The step's batch.
        threshold: Most query rows of a request that decodes.

    Returns:
        On the host, int32 [S + 1], first query row of each request, counted among theirs alone; and int32 [S],
        its context length (tokens). None without any, where a batch is not causal, or its lengths aren't known.
    """
    if common.causal is not True or (lengths := common.seq_lens_cpu_upper_bound) is None:
        return None
    starts = common.query_start_loc_cpu[: common.num_reqs + 1]
    if common.max_query_len <= threshold:
        return starts, lengths[: common.num_reqs]
    rows = starts[1:] - starts[:-1]
    decoding = rows <= threshold
    starts = torch.nn.functional.pad(rows[decoding].cumsum(0), (1, 0))
    return (starts, lengths[: common.num_reqs][decoding]) if int(starts[-1]) else None


def without_context(query_start_loc: torch.Tensor, seq_lens: torch.Tensor) -> bool:
    """Whether no request has tokens before its rows; arguments as those of :func:`row_lengths`.

    On GPUs such rows are nobody's: vLLM warms up and captures pieces of graphs with such batches, and ranks of data
    parallelism that have no request take part in the others' steps with them (0.31 to 0.33). Or they are prompts of
    a token or two, in which there is nothing to skip.
    """
    return bool((np.diff(query_start_loc.numpy()) == seq_lens.numpy()).all())


def row_lengths(query_start_loc: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
    """Context length of every decode row.

    Args:
        query_start_loc: int32 [S + 1], first query row of each sequence; on the host.
        seq_lens: int32 [S], context length of each sequence's last query row (tokens); on the host.

    Returns:
        int64 [rows].
    """
    # NumPy, for this is done in every step: tensors so small cost several times as much.
    starts = query_start_loc.numpy().astype(np.int64)
    # Row r of a sequence that ends before row e sees seq_len - (e - 1 - r) tokens.
    base = seq_lens.numpy() - starts[1:] + 1
    return torch.from_numpy(base.repeat(starts[1:] - starts[:-1]) + np.arange(starts[-1]))
