"""What a layer is told about one step."""

from dataclasses import dataclass
from typing import Any

from topt_vllm.attention.common import DecodeBatch


@dataclass
class TopThetaMetadata:
    """One step's batch, decode rows first; on GPUs views of vLLM's static buffers, so graphs replay.

    Attributes:
        num_actual_tokens: Query rows, padding included.
        num_decode_rows: Query rows that decode, padding included; the rest is prefill.
        written: All rows, which are in the cache before a layer attends.
        decode: The decode rows; None without any.
        prefill: The platform's metadata of the rows after the decode rows; None without any.
        whole: The platform's metadata of the whole batch, for layers that stay on its kernel; None when none does.
        thresholds: What changes the layers' thresholds told of the step.
    """

    num_actual_tokens: int
    num_decode_rows: int
    written: DecodeBatch
    decode: DecodeBatch | None
    prefill: Any | None
    whole: Any | None
    thresholds: Any = None
