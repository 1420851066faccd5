"""Makes rigs as an engine makes its layers: vLLM plans and allocates the cache, states among it, and hosts attend.

On the CPU's host vLLM's own kernels run. Those of the GPUs' hosts don't run on CPU tensors, so torch stands in for
the two that the adapter hands work to, on GPUs too: the cache write, and attention over the rows of the platform's
metadata. tests/test_gpu_engine.py runs them.
"""

from collections.abc import Sequence
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
    Host,
    Table,
)
from adapter_rig import Rig, layer_name
from cpu_features import HAS_FP8_CACHES, NO_FP8_CACHES
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.kv_cache_interface import KVCacheLayout
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec, init_attn_backend
from vllm.v1.worker.utils import allocate_kv_cache, bind_kv_cache_to_layers

from topt_vllm.backend.metrics import recorder
from topt_vllm.backend.states import StatesLayer
from topt_vllm.table.identity import identify

try:
    from vllm.v1.core import kv_cache_planning as planner  # 0.33
except ImportError:
    from vllm.v1.core import kv_cache_utils as planner


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
    # The process's counters outlive a rig, and must not stay another rank's.
    monkeypatch.setattr(recorder(), "_rank", 0)
    monkeypatch.setattr(recorder(), "_ranks", 1)
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()  # in engines the matrix products have asked Linux for it before attention runs

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
        head_size: int = HEAD_DIM,
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
            head_size: D.
            settings: Of ``toptheta``; without a K screen unless they name one. On GPUs' hosts a kernel is named, so
                that it decodes dense layers too.
            options: Of vLLM's ``Attention``.
        """
        if kv_cache_dtype.startswith("fp8") and not host.on_gpus and not HAS_FP8_CACHES:
            pytest.skip(NO_FP8_CACHES)
        kernel = {"implementation": "triton"} if host.on_gpus else {}
        settings = {"k_screen": "off"} | kernel | (settings or {})
        if settings.get("policy") == "sift":
            kind = "gpu" if host.on_gpus else "cpu"
            worker = f"topt_vllm.backend.hosts.{kind}_worker.TopThetaWorker"
            monkeypatch.setattr(vllm_config.parallel_config, "worker_cls", worker)
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
        cache = {
            "cache_dtype": kv_cache_dtype,
            "kv_cache_layout": layout and layout.name,
            "block_size": BLOCK_SIZE,
            "num_gpu_blocks_override": NUM_BLOCKS,
        }
        for name, value in cache.items():
            monkeypatch.setattr(vllm_config.cache_config, name, value)
        names = [*prefixes, *map(layer_name, range(len(prefixes), layers))]
        options["head_size"] = head_size
        # What vLLM asks FlashAttention, where there is one; here torch takes its place.
        monkeypatch.setattr(flash_attn, "flash_attn_supports_sinks", lambda: True, raising=False)
        made = _layers(host, vllm_config, names, rank[1], windows, backend or host.backend, options)
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


def _layers(
    host: Host,
    config: VllmConfig,
    names: list[str],
    ranks: int,
    windows: Sequence[int | None],
    backend: Any,
    options: dict[str, Any],
) -> list[Any]:
    """Attention layers as a model makes them, and as they are once their weights are loaded."""
    config.compilation_config.static_forward_context.clear()
    with set_default_torch_dtype(torch.bfloat16), host.device:
        layers = [
            Attention(
                NUM_HEADS // ranks,
                scale=SCALE,
                num_kv_heads=max(1, NUM_KV_HEADS // ranks),
                cache_config=config.cache_config,
                prefix=name,
                attn_backend=backend,
                per_layer_sliding_window=windows[index] if index < len(windows) else None,
                **options,
            )
            for index, name in enumerate(names)
        ]
    for layer in layers:
        layer.process_weights_after_loading(torch.bfloat16)
    return layers


def _plan(host: Host, config: VllmConfig, layers: list[Any]) -> Rig:
    """Plans, allocates, poisons and binds the cache, and makes the builders, in the engine's order."""
    specs = get_kv_cache_spec(config)
    layouts = get_supported_kv_cache_layouts(get_current_attn_backends(config))
    layout = resolve_kv_cache_layout(config, [[each.name for each in layouts]], specs.values())
    plan = planner.get_kv_cache_config_from_groups(config, planner.get_kv_cache_groups(config, specs), 0)
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
