"""What the GPU adapter needs of an implementation of the operator."""

from typing import Protocol, cast

import torch

from topt_vllm.attention.api import Implementation
from topt_vllm.attention.common import PagedCache


class DeviceImplementation(Implementation, Protocol):
    """One that can run on preallocated buffers and reads nothing back, so that a CUDA graph can hold it."""

    def new_statistics(self, device: torch.device | str) -> torch.Tensor:
        """Zeroed accumulators of one layer, float64 [slots, 7]; their sum over slots counts."""
        ...

    def allocate_workspace(
        self,
        max_sequences: int,
        max_query_rows: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device,
    ) -> object:
        """Buffers for batches of up to these sizes, shared by layers that run one after another."""
        ...

    def bind(self, workspace: object) -> Implementation:
        """The operator on a workspace."""
        ...

    def update_sums(self, cache: PagedCache, slot_mapping: torch.Tensor) -> None:
        """Recomputes the V sums of the blocks whose last slot is among those written (int64, negative: padding)."""
        ...


def on_device(implementation: Implementation, name: str) -> DeviceImplementation:
    """The implementation as one that runs on preallocated buffers.

    Raises:
        ValueError: It doesn't.
    """
    if not hasattr(implementation, "allocate_workspace"):
        raise ValueError(
            f"toptheta.implementation is {name!r}, which can't run inside vLLM's CUDA graphs; "
            "allowed on GPUs: auto | triton"
        )
    return cast(DeviceImplementation, implementation)
