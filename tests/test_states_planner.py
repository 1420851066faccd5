"""vLLM's own cache planner, given states beside attention layers: groups, layouts, capacity and zeroing."""

from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms.interface import Platform
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheLayout,
    KVCacheSpec,
    KVQuantMode,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.worker.utils import allocate_kv_cache

from topt_vllm.attention.screen import ScreenFormat
from topt_vllm.backend.hosts.flash import FlashTopThetaBackend
from topt_vllm.backend.hosts.triton import TritonTopThetaBackend
from topt_vllm.backend.states import KeyScreens, PackedStatesBackend, StatesBackend, StatesLayer, ValueSums

try:
    from vllm.v1.core import kv_cache_planning as planner  # 0.33
except ImportError:
    from vllm.v1.core import kv_cache_utils as planner

SUMS, SCREENS = ".sums", ".screens"
MEMORY = 64 << 30  # bytes
MAX_MODEL_LEN = 32768

Specs = dict[str, KVCacheSpec]


class FullLayer(Attention):
    """What states ask of vLLM's attention layer."""

    def __init__(self, spec: FullAttentionSpec, window: int | None = None) -> None:
        nn.Module.__init__(self)
        self.spec, self.sliding_window = spec, window
        self.head_size = self.head_size_v = spec.head_size

    def get_kv_cache_spec(self, vllm_config: Any) -> KVCacheSpec:
        return self.spec


class OtherLayer(AttentionLayerBase):
    """A state-space layer, or whatever else has a cache."""

    def get_attn_backend(self) -> Any:
        raise NotImplementedError

    def get_kv_cache_spec(self, vllm_config: Any) -> KVCacheSpec:
        raise NotImplementedError


def attention(layers: Iterable[int], block_size: int, num_kv_heads: int, head_size: int) -> Specs:
    spec = FullAttentionSpec(
        block_size=block_size, num_kv_heads=num_kv_heads, head_size=head_size, dtype=torch.bfloat16
    )
    return {f"model.layers.{layer}.self_attn.attn": spec for layer in layers}


def llama_8b(block_size: int = 64) -> Specs:
    return attention(range(32), block_size, 8, 128)


def llama_8b_fp8() -> Specs:
    fp8 = {"dtype": torch.uint8, "kv_quant_mode": KVQuantMode.FP8_PER_TENSOR}
    return {name: replace(spec, **fp8) for name, spec in llama_8b().items()}


def gemma3_1b(block_size: int = 64) -> Specs:
    """26 layers, every sixth of them global."""
    window = SlidingWindowSpec(
        block_size=block_size, num_kv_heads=1, head_size=256, dtype=torch.bfloat16, sliding_window=512
    )
    specs: Specs = {f"model.layers.{layer}.self_attn.attn": window for layer in range(26)}
    return specs | attention(range(5, 26, 6), block_size, 1, 256)


def qwen3_next(block_size: int = 576) -> Specs:
    """48 layers, every fourth of them full attention; the pages of the others are padded to its pages."""
    page = block_size * 2 * 2 * 256 * 2
    state = MambaSpec(
        block_size=MAX_MODEL_LEN,
        shapes=((3, 8192), (32, 128, 128)),
        dtypes=(torch.bfloat16, torch.bfloat16),
        page_size_padded=page,
    )
    full = attention(range(3, 48, 4), block_size, 2, 256)
    others: Specs = {f"model.layers.{layer}.linear_attn": state for layer in range(48) if layer % 4 != 3}
    return others | full


MODELS = {"llama-8b": llama_8b, "gemma3-1b": gemma3_1b, "qwen3-next": qwen3_next}
PACKED = ["gemma3-1b", "qwen3-next"]


def layers_of(specs: Specs) -> dict[str, AttentionLayerBase]:
    """Stand-ins for a model's layers."""
    return {
        name: FullLayer(spec, getattr(spec, "sliding_window", None))
        if isinstance(spec, FullAttentionSpec | SlidingWindowSpec)
        else OtherLayer()
        for name, spec in specs.items()
    }


def screen_bytes(format: ScreenFormat, head_dim: int, block_size: int) -> int:
    """What kernels store of each row: a plane of half a byte per channel, or two, and a step and an error."""
    planes = 1 if format == "int4" else 2
    return block_size * (planes * head_dim // 2 + 4)


def states_beside(specs: Specs, every: int = 1, screen: ScreenFormat | None = None) -> dict[str, StatesLayer]:
    """Those of every n-th full-attention layer of a model, as TOPTHETA registers them."""
    context = layers_of(specs)
    compilation = SimpleNamespace(static_forward_context=context)
    config: Any = SimpleNamespace(compilation_config=compilation, kv_transfer_config=None)
    full = [name for name, spec in specs.items() if isinstance(spec, FullAttentionSpec)][::every]
    states: dict[str, StatesLayer] = {
        name + SUMS: ValueSums(name + SUMS, context[name], config) for name in full
    }
    if screen is not None:
        operator: Any = SimpleNamespace(screen_bytes=screen_bytes)
        for name in full:
            of = name + SCREENS, context[name]
            states[name + SCREENS] = KeyScreens(*of, config, operator, screen)
    context.update(states)
    return states


def with_states(specs: Specs, states: dict[str, StatesLayer]) -> Specs:
    """The layers of a model and their states, registered last."""
    config: Any = None  # no layer asks
    return specs | {name: layer.get_kv_cache_spec(config) for name, layer in states.items()}


def with_sums(specs: Specs) -> Specs:
    return with_states(specs, states_beside(specs))


def vllm_config(layout: KVCacheLayout, hybrid_manager: bool) -> Any:
    """What the planner reads of an engine's configuration."""
    return SimpleNamespace(
        attention_config=SimpleNamespace(hisparse_config=None),
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: layout,
            mamba_cache_mode="none",
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=None,
        ),
        kv_transfer_config=None,
        max_in_flight_tokens=8192,
        model_config=SimpleNamespace(
            architecture="", hf_config=SimpleNamespace(model_type=""), max_model_len=MAX_MODEL_LEN
        ),
        num_prefill_lookahead_tokens=0,
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1,
            pipeline_parallel_size=1,
            prefill_context_parallel_size=1,
            tensor_parallel_size=1,
        ),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=not hybrid_manager),
        speculative_config=None,
    )


def plan(
    specs: Specs, layout: KVCacheLayout, hybrid_manager: bool = True, memory: int = MEMORY
) -> tuple[KVCacheConfig, int]:
    """The plan of vLLM for these layers, and its capacity in tokens."""
    config = vllm_config(layout, hybrid_manager)
    groups = planner.get_kv_cache_groups(config, dict(specs))
    if hasattr(planner, "DefaultKVCacheConfigBuilder"):
        per_block = planner._get_kv_cache_bytes_per_block(groups, layout)
        builder = planner.DefaultKVCacheConfigBuilder()
        planned = builder.get_kv_cache_config_from_groups(config, groups, memory // per_block)
    else:
        planned = planner.get_kv_cache_config_from_groups(config, groups, memory)
    return planned, get_kv_cache_capacity(config, planned)[0]


def share_blocks(planned: KVCacheConfig, specs: Specs) -> bool:
    """Whether all states are in the group of their attention layer, and so have its block ids."""
    groups = {name: i for i, group in enumerate(planned.kv_cache_groups) for name in group.layer_names}
    return all(
        groups[name] == groups[name.removesuffix(SUMS).removesuffix(SCREENS)]
        for name in specs
        if name.endswith((SUMS, SCREENS))
    )


BLOCK_COMPACT = [layout for layout in KVCacheLayout if layout.is_block_compact]
LAYER_OUTERMOST = [layout for layout in BLOCK_COMPACT if not layout.is_block_outermost]


def by_name(layout: KVCacheLayout) -> str:
    return layout.name


def layouts_asked_for(states: dict[str, StatesLayer]) -> Iterable[KVCacheLayout]:
    """Those that the states' backend takes; vLLM itself needs a block's page in one piece."""
    (backend,) = {layer.get_attn_backend() for layer in states.values()}
    return backend.supported_kv_cache_layouts() or BLOCK_COMPACT


@pytest.mark.parametrize(
    ("model", "block_size", "share"),
    [
        ("llama-8b", 64, 1 / 64),
        ("gemma3-1b", 64, 1 / 64),
        ("qwen3-next", 576, 1 / 64),
        # With --block-size 16 or 32.
        ("qwen3-next", 544, 1 / 32),
    ],
)
@pytest.mark.parametrize("every", [1, 2])
def test_sums_cost_their_own_share(model: str, block_size: int, share: float, every: int):
    """Sums of 64 rows of 16 bits add 1/64 to K and V; whole blocks are rounded once more."""
    stock = MODELS[model](block_size)
    states = states_beside(stock, every)
    specs = with_states(stock, states)
    for layout in layouts_asked_for(states):
        (before, capacity), (after, with_them) = plan(stock, layout), plan(specs, layout)
        assert share_blocks(after, specs)
        assert with_them >= capacity * (1 - share) * (1 - 1 / before.num_blocks), layout.name


def llama_1b() -> Specs:
    """As Llama 3.2 1B, with heads of 64."""
    return attention(range(16), 64, 8, 64)


# Of a 16-bit cache; (D / 2 + 4) / 4 D, and (D + 4) / 4 D.
SCREEN_SHARES = {
    "64, int4": (llama_1b, "int4", 0.141),
    "64, int4+4": (llama_1b, "int4+4", 0.266),
    "128, int4": (llama_8b, "int4", 0.133),
    "128, int4+4": (llama_8b, "int4+4", 0.258),
    "sliding and global, int4": (gemma3_1b, "int4", 0.13),
    "hybrid, int4": (qwen3_next, "int4", 0.13),
    "hybrid, blocks of 544, int4": (lambda: qwen3_next(544), "int4", 0.13),
}


@pytest.mark.parametrize(("make", "screen", "share"), SCREEN_SHARES.values(), ids=SCREEN_SHARES)
@pytest.mark.parametrize("every", [1, 2])
def test_screens_cost_their_own_share(make: Any, screen: ScreenFormat, share: float, every: int):
    """Beside the sums; whole blocks are rounded once more."""
    stock = make()
    sums, screened = states_beside(stock, every), states_beside(stock, every, screen)
    for layout in layouts_asked_for(screened):
        before, capacity = plan(with_states(stock, sums), layout)
        after, with_them = plan(with_states(stock, screened), layout)
        assert share_blocks(after, with_states(stock, screened))
        assert with_them >= capacity / (1 + share) * (1 - 1 / before.num_blocks), layout.name


def test_screens_of_an_fp8_cache_cost_twice_the_share():
    stock = llama_8b_fp8()
    (_, capacity), (_, with_them) = (
        plan(with_states(stock, states), KVCacheLayout.LBNHC)
        for states in (states_beside(stock), states_beside(stock, screen="int4"))
    )
    assert capacity / 1.27 < with_them < capacity / 1.25


@pytest.mark.parametrize("model", MODELS)
def test_other_kinds_of_layers_have_states_ask_for_packed_layouts(model: str):
    backends = {layer.get_attn_backend() for layer in states_beside(MODELS[model]()).values()}
    assert backends == {PackedStatesBackend if model in PACKED else StatesBackend}
    assert StatesBackend.supported_kv_cache_layouts() is None
    assert all(each.is_block_outermost for each in PackedStatesBackend.supported_kv_cache_layouts())


def test_a_drafter_s_windows_have_states_ask_for_packed_layouts():
    """It is loaded after the model, whose states are registered then."""
    states = states_beside(llama_8b())
    one = next(iter(states.values()))
    assert one.get_attn_backend() is StatesBackend
    draft = FullLayer(next(iter(llama_8b().values())), window=512)
    context = one._vllm_config.compilation_config.static_forward_context
    context["draft_model.layers.0.self_attn.attn"] = draft
    assert one.get_attn_backend() is PackedStatesBackend


@pytest.mark.parametrize("layout", LAYER_OUTERMOST, ids=by_name)
@pytest.mark.parametrize("model", PACKED)
def test_several_kinds_of_layer_need_a_block_outermost_layout(model: str, layout: KVCacheLayout):
    """Elsewhere vLLM evens out the pages by longer blocks, and the sums get block ids of their own."""
    specs = with_sums(MODELS[model]())
    assert not share_blocks(plan(specs, layout)[0], specs)


@pytest.mark.parametrize("layout", BLOCK_COMPACT, ids=by_name)
def test_without_the_hybrid_manager_every_block_compact_layout_works(layout: KVCacheLayout):
    """As with KV connectors that can't have several groups."""
    specs = with_sums(gemma3_1b())
    planned, _ = plan(specs, layout, hybrid_manager=False)
    assert len(planned.kv_cache_groups) == 1
    assert share_blocks(planned, specs)


@pytest.mark.parametrize("layout", [KVCacheLayout.LHBNC, KVCacheLayout.BHLNC], ids=by_name)
def test_layouts_with_heads_apart_are_refused(layout: KVCacheLayout):
    with pytest.raises(ValueError, match="mixed page sizes"):
        plan(with_sums(llama_8b()), layout)


@pytest.mark.parametrize("model", MODELS)
def test_scheduler_sees_the_attention_layer(model: str):
    """It is given the first layer's spec for a group of several."""
    for group in plan(with_sums(MODELS[model]()), KVCacheLayout.BLHNC)[0].kv_cache_groups:
        assert not group.layer_names[0].endswith(SUMS)


@pytest.mark.parametrize("model", PACKED)
def test_new_blocks_are_filled_with_zeros_beside_other_kinds(model: str):
    """Kernels multiply what lies behind a context by 0, and what states left there may be NaN to K and V."""
    assert plan(with_sums(MODELS[model]()), KVCacheLayout.BLNHC)[0].needs_kv_cache_zeroing


@pytest.mark.parametrize("host", [FlashTopThetaBackend, TritonTopThetaBackend])
@pytest.mark.parametrize("states", [StatesBackend, PackedStatesBackend])
def test_blocks_are_as_large_beside_states_as_without(host: Any, states: Any):
    """vLLM takes its own default, 16, as soon as there are several backends that can do with it."""

    config = VllmConfig()
    config.cache_config.block_size = default = 16  # as platforms of GPUs leave it until then

    def preferred(*backends: Any) -> int:
        return Platform._preferred_block_size_for_backends(list(backends), default, config)

    assert preferred(host) == preferred(host, states) == 64


@pytest.mark.parametrize("states", [StatesBackend, PackedStatesBackend])
def test_any_block_size_will_do_once_it_is_chosen(states: Any):
    """A user's, or that of a hybrid model; the worker of 0.31 asks without a spec."""
    config = VllmConfig()
    for size, by_user in ((544, False), (16, True)):
        config.cache_config.block_size, config.cache_config.user_specified_block_size = size, by_user
        with set_current_vllm_config(config):
            assert states.supports_block_size(size)


@pytest.mark.parametrize("layout", BLOCK_COMPACT, ids=by_name)
@pytest.mark.parametrize("make", [lambda: attention([0, 1], 128, 2, 64), gemma3_1b], ids=["plain", "windows"])
def test_states_lie_apart_from_k_and_v_and_from_each_other(make: Any, layout: KVCacheLayout):
    """What vLLM binds can be seen as [B, Hkv, states, bytes], each state in one piece."""
    stock = make()
    states = states_beside(stock, screen="int4+4")
    if layout not in layouts_asked_for(states):
        pytest.skip("such states aren't asked for in this layout")
    planned, _ = plan(with_states(stock, states), layout, memory=64 << 20)
    caches = allocate_kv_cache(planned, torch.device("cpu"), layout)
    group = {name: i for i, each in enumerate(planned.kv_cache_groups) for name in each.layer_names}
    (own,) = {group[name] for name in states}
    full = {name: cache for name, cache in caches.items() if group[name] == own and name not in states}
    for number, (name, layer) in enumerate(states.items(), 1):
        layer.kv_cache = caches[name]
        spec = stock[name.removesuffix(SUMS).removesuffix(SCREENS)]
        rows, size = layer.state(spec.block_size)
        found = layer.states()
        assert found.shape == (planned.num_blocks, spec.num_kv_heads, spec.block_size // rows, size)
        assert found.stride(-1) == 1
        found.fill_(number)
    assert full
    assert not any(cache.any() for cache in full.values())
    for number, layer in enumerate(states.values(), 1):
        assert (layer.states() == number).all()
    sums = next(layer for layer in states.values() if isinstance(layer, ValueSums)).numbers()
    assert sums.dtype == torch.float32
