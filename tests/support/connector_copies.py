"""What vLLM's KV connectors would copy of a block, by their own registration of a rig's caches."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from adapter_rig import Rig
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker as nixl
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
from vllm.v1.simple_kv_offload import worker as simple

# Bytes of a block of a cache group, as views of the cache.
Copied = Callable[[int, int], list[torch.Tensor]]


def transfer(name: str, extra: dict[str, Any] | None = None, **options: Any) -> KVTransferConfig:
    """``--kv-transfer-config``."""
    return KVTransferConfig(
        kv_connector=name, kv_role="kv_both", kv_connector_extra_config=extra or {}, **options
    )


def caches_of(rig: Rig) -> dict[str, torch.Tensor]:
    """What vLLM hands to a connector: the view of every cache layer, by name."""
    context = rig.config.compilation_config.static_forward_context
    names = [name for group in rig.plan.kv_cache_groups for name in group.layer_names]
    return {name: context[name].kv_cache for name in names}


def by_offloading(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Copied:
    """OffloadingConnector: pages of the group's layers, or whole blocks where layers lie in them together."""
    registered: list[Any] = []
    spec: Any = SimpleNamespace(
        replicated_layout=False,
        get_worker=registered.append,
        config=SimpleNamespace(canonical_layout=False, parallel=SimpleNamespace(rank=0)),
    )
    OffloadingConnectorWorker(spec, rig.config, rig.plan).register_kv_caches(caches_of(rig))
    (caches,) = registered
    return lambda group, block: [
        caches.tensors[page.tensor_idx].tensor[block, : page.page_size_bytes]
        for page in caches.group_data_refs[group]
    ]


def by_simple_offloading(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Copied:
    """SimpleCPUOffloadConnector: all bytes of a block in every region, whatever its group."""
    stream = MagicMock()
    stream.priority_range.return_value = 0, 0
    monkeypatch.setattr(simple.torch.cuda, "Stream", stream)
    monkeypatch.setattr(simple, "PIN_MEMORY", False)
    monkeypatch.setattr(simple.DmaCopyBackend, "init", lambda *_: None)
    worker = simple.SimpleCPUOffloadWorker(rig.config, rig.plan, cpu_capacity_bytes=1 << 20)
    worker.register_kv_caches(caches_of(rig))
    regions = list((worker.gpu_kv_caches or {}).values())
    return lambda group, block: [region[block] for region in regions]


def by_nixl(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Copied:
    """NixlConnector: its descriptors of the block. The agent, which isn't installed, is a stand-in."""
    agent = MagicMock()
    agent.get_agent_metadata.return_value = b""
    monkeypatch.setattr(nixl, "NixlWrapper", lambda *_: agent)
    monkeypatch.setattr(nixl, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(nixl, "get_tensor_model_parallel_world_size", lambda: 1)
    # Else the worker binds this process to its last core.
    monkeypatch.setattr(nixl.current_platform, "discover_numa_topology", lambda: [], raising=False)
    monkeypatch.setattr(rig.config, "kv_transfer_config", transfer("NixlConnector"))
    worker = nixl.NixlBaseConnectorWorker(rig.config, "engine", rig.plan)
    caches = caches_of(rig)
    worker.register_kv_caches(caches)
    storage = next(iter(caches.values())).untyped_storage()
    memory = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

    def copied(group: int, block: int) -> list[torch.Tensor]:
        blocks: list[list[int]] = [[] for _ in rig.plan.kv_cache_groups]
        blocks[group] = [block]
        numbers = worker._compute_desc_ids(tuple(blocks), worker.num_blocks, None, 1)
        found = worker.src_blocks_data[numbers].tolist()
        starts = [(address - storage.data_ptr(), length) for address, length, _ in found]
        return [memory[start : start + length] for start, length in starts]

    return copied
