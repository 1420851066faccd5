"""What a layer is told about one step."""

from dataclasses import dataclass

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

from topt_vllm.attention.common import DecodeBatch
from topt_vllm.sift import SiftStep


@dataclass
class TopThetaMetadata:
    """One step's batch, decode rows first.

    Attributes:
        num_actual_tokens: Query rows.
        num_decode_rows: Query rows that decode; the rest is prefill.
        decode: The decode rows; None without any.
        decode_lengths: int64 [decode rows], context length of each decode row (tokens).
        prefill: vLLM's metadata of the rows after the decode rows; None without any.
        whole: vLLM's metadata of the whole batch, for layers that stay dense; None when no layer does.
        short_rows: Decode rows whose context is too short for thresholds.
        warm_rows: Decode rows that are long enough, and dense because their request warms up.
        sift: The decode rows under ``policy: sift``; None under another or without any.
        finished_blocks: int64, physical blocks whose last slot is written in this step.
    """

    num_actual_tokens: int
    num_decode_rows: int
    decode: DecodeBatch | None
    decode_lengths: torch.Tensor
    prefill: CPUAttentionMetadata | None
    whole: CPUAttentionMetadata | None
    short_rows: int
    warm_rows: int
    sift: SiftStep | None
    finished_blocks: torch.Tensor
