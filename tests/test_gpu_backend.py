"""The GPU adapter without an engine: builder, layers and vLLM's own cache planning."""

import gc
import weakref
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from device import DEVICE, synchronize
from gpu_cases import (
    BACKENDS,
    BATCHES,
    BLOCK_SIZE,
    CLOSE,
    DECODE,
    FP8,
    NUM_HEADS,
    NUM_KV_HEADS,
    THETAS,
    BatchSpec,
    as_on_gpu,
    vllm_config,
)
from gpu_rig import make_rig, make_sparse, readable
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder
from vllm.v1.kv_cache_interface import KVCacheLayout

from topt_vllm.attention.common import Policy, Stat
from topt_vllm.backend.gpu.flash_attn import FlashTopThetaBackend
from topt_vllm.backend.gpu.triton_attn import TritonTopThetaBackend
from topt_vllm.backend.metrics import recorder, summary

pytestmark = pytest.mark.gpu

__all__ = ["make_rig", "vllm_config"]


@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compensation", ["none", "vmean"])
def test_decode_rows_are_sparse_and_prefill_rows_stay_with_the_platform(
    make_rig: Any, backend: type, batch: BatchSpec, compensation: Any
):
    torch.manual_seed(0)
    rig = make_rig(backend)
    policy = make_sparse(rig, Policy(compensation=compensation))
    rig.write_contexts(batch)
    query, output, metadata = rig.step(batch)
    common = rig.common(batch)
    decoded = sum(length for length in batch.query_lens if length == 1)
    assert metadata.num_decode_rows == decoded
    assert rig.platform_rows == ([len(query) - decoded] if decoded < len(query) else [])
    sparse = rig.expected(0, query, common, THETAS, policy)
    dense = rig.expected(0, query, common, None, policy)
    torch.testing.assert_close(output[:decoded].float(), sparse[:decoded], **CLOSE)
    torch.testing.assert_close(output[decoded:].float(), dense[decoded:], **CLOSE)
    statistics = rig.layers[0].impl.bound.statistics.sum(dim=0)
    assert statistics[Stat.ROWS] == decoded
    if max(batch.seq_lens[: batch.query_lens.count(1)], default=0) > 2 * BLOCK_SIZE:
        assert 0.2 < statistics[Stat.V_ROWS_READ] / statistics[Stat.V_ROWS] < 0.98


@pytest.mark.slow
def test_every_row_kept_is_dense_attention(make_rig: Any):
    torch.manual_seed(1)
    rig = make_rig(TritonTopThetaBackend)
    make_sparse(rig, thetas=None)
    rig.write_contexts(DECODE)
    query, output, _ = rig.step(DECODE)
    torch.testing.assert_close(
        output.float(), rig.expected(0, query, rig.common(DECODE), None, Policy()), **CLOSE
    )


LAYOUTS = TritonTopThetaBackend.supported_kv_cache_layouts()


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_value_sums_live_in_the_padding_of_every_layout(make_rig: Any, layout: KVCacheLayout):
    """Two layers, of which one finishes and rewrites blocks; K, V and sums of neither are disturbed."""
    torch.manual_seed(2)
    rig = make_rig(TritonTopThetaBackend, layers=2, layout=layout)
    make_sparse(rig)
    whole = BatchSpec("prefill", [64, 40], [64, 40])
    for _ in range(2):
        slots = rig.common(whole).slot_mapping
        for index in range(2):
            rig.write(index, torch.cat([slots, slots.new_full((5,), -1)]))
    finished = torch.cat([rig.block_table[0, :4], rig.block_table[1, :2]]).long()
    for layer, kv_cache in zip(rig.layers, rig.caches, strict=True):
        sums = layer.impl.bound.paged_cache(layer, kv_cache).value_sums
        _, value = readable(layer, kv_cache)
        torch.testing.assert_close(sums[finished], value[finished].float().sum(dim=2), rtol=1e-5, atol=1e-4)
        assert sums[rig.block_table[1, 2]].isnan().all() or not sums[rig.block_table[1, 2]].any()


def test_layouts_without_room_for_padding_are_not_offered():
    """vLLM asserts that pages whose heads lie apart are not padded."""
    assert set(KVCacheLayout) - set(LAYOUTS) == {KVCacheLayout.LHBNC, KVCacheLayout.BHLNC}


@pytest.mark.slow
def test_fp8_caches_are_read_with_vllm_s_scales(make_rig: Any):
    torch.manual_seed(3)
    rig = make_rig(TritonTopThetaBackend, kv_cache_dtype="fp8")
    policy = make_sparse(rig)
    layer = rig.layers[0]
    layer._k_scale.fill_(0.5)
    layer._v_scale.fill_(0.25)
    rig.write_contexts(DECODE)
    query, output, _ = rig.step(DECODE)
    cache = layer.impl.bound.paged_cache(layer, rig.caches[0])
    assert cache.key.dtype == FP8
    expected = rig.expected(0, query, rig.common(DECODE), THETAS, policy)
    torch.testing.assert_close(output.float(), expected, **CLOSE)


@pytest.mark.slow
def test_speculative_rows_decode_together(make_rig: Any, vllm_config: Any, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(4)
    rig = make_rig(TritonTopThetaBackend)
    rig.builder._max_query_rows = 5
    policy = make_sparse(rig)
    batch = BatchSpec("verify", [58, 31, 60], [5, 3, 1])
    rig.write_contexts(batch)
    query, output, metadata = rig.step(batch)
    assert metadata.num_decode_rows == 9
    assert metadata.prefill is None
    torch.testing.assert_close(
        output.float(), rig.expected(0, query, rig.common(batch), THETAS, policy), **CLOSE
    )


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["auto", "triton"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_who_decodes_a_dense_layer_of_the_table(
    make_rig: Any, vllm_config: Any, monkeypatch: pytest.MonkeyPatch, backend: type, implementation: str
):
    """Under auto the platform, whole batches at a time and without V sums; the operator where it is named."""
    torch.manual_seed(7)
    as_on_gpu(vllm_config, monkeypatch, implementation=implementation)
    rig = make_rig(backend, layers=2)
    batch = BATCHES[2]
    rig.write_contexts(batch)
    updated: list[Any] = []
    rig.builder.build(0, rig.common(batch))
    rig.builder._group.warm_up.done = True
    kernel = rig.builder._group.implementation
    update_sums = kernel.update_sums
    monkeypatch.setattr(kernel, "update_sums", lambda *args: (updated.append(args), update_sums(*args)))
    query, output, metadata = rig.step(batch)
    on_platform = implementation == "auto"
    assert rig.platform_rows == [22 if on_platform else 20]
    assert rig.layers[0].impl.platform_reason == ("dense_layer" if on_platform else None)
    assert (rig.layers[0].impl.bound is None) == on_platform == (metadata.whole is not None)
    assert not updated
    torch.testing.assert_close(
        output.float(), rig.expected(0, query, rig.common(batch), None, Policy()), **CLOSE
    )
    _, _, metadata = rig.step(batch, index=1)
    assert rig.platform_rows[1:] == [20]
    assert rig.layers[1].impl.bound.statistics[:, Stat.ROWS].sum() == 2
    assert len(updated) == 1


def test_a_sparse_model_builds_nothing_of_the_platform_s_to_decode(
    make_rig: Any, monkeypatch: pytest.MonkeyPatch
):
    rig = make_rig(FlashTopThetaBackend)
    assert rig.builder._platform is None
    monkeypatch.setattr(FlashAttentionMetadataBuilder, "build", None)
    metadata = rig.builder.build(0, rig.common(DECODE))
    assert metadata.decode is not None
    assert metadata.prefill is metadata.whole is None


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["auto", "triton"])
def test_what_the_host_counts(
    make_rig: Any, vllm_config: Any, monkeypatch: pytest.MonkeyPatch, implementation: str
):
    """Layer 0 of the table is dense, layer 1 sparse from 32 tokens on, layer 2 has a window of 24."""
    torch.manual_seed(6)
    as_on_gpu(vllm_config, monkeypatch, implementation=implementation)
    rig = make_rig(TritonTopThetaBackend, layers=3, windows=(None, None, 24))
    rig.write_contexts(DECODE)
    before, amounts = recorder().totals(), recorder().amounts()
    common = rig.common(DECODE)
    metadata = rig.builder.build(0, common)
    for index in range(3):
        rig.write(index, common.slot_mapping)
        rig.attend(index, metadata, 4)
    rig.builder._group.statistics._next_copy = 0.0
    rig.builder.build(0, rig.common(BatchSpec("prefill", [9], [9])))
    synchronize()
    after = recorder().totals()
    added = {name: after[name] - before.get(name, 0) for name in after}
    assert rig.platform_rows == ([4, 4] if implementation == "auto" else [4])
    assert added["dense_rows:dense_layer"] == 4
    assert added["dense_rows:short_context"] == 3
    assert added["dense_rows:sliding_window"] == 4
    assert added["toptheta:decode_rows_total"] == 3 * 4
    windowed = sum(min(24, length) for length in DECODE.seq_lens)
    assert added["toptheta:v_rows_total"] == (2 * sum(DECODE.seq_lens) + windowed) * NUM_KV_HEADS
    sparse = rig.layers[1].impl.bound.statistics.sum(dim=0)
    read = sum(DECODE.seq_lens) + windowed
    assert added["toptheta:v_rows_read_total"] == read * NUM_KV_HEADS + sparse[Stat.V_ROWS_READ]
    logged = summary(recorder().amounts(), amounts)
    assert logged is not None
    assert "dense_layer 33.3%" in logged
    assert "sliding_window 33.3%" in logged


def test_a_cache_group_of_windows_stays_with_the_platform(make_rig: Any):
    """As vLLM groups layers of models such as Gemma 3; their rows are counted."""
    rig = make_rig(FlashTopThetaBackend, layers=2, windows=(24, 24))
    before = recorder().totals().get("dense_rows:sliding_window", 0)
    metadata = rig.builder.build(0, rig.common(BATCHES[2]))
    assert metadata.decode is None
    assert metadata.prefill is None
    assert metadata.whole.num_actual_tokens == 22
    assert recorder().totals()["dense_rows:sliding_window"] - before == 2 * 2


def test_builders_of_the_same_layers_share_what_graphs_point_to(make_rig: Any, vllm_config: Any):
    """Microbatches have a builder each, and vLLM makes builders again after it measured memory."""
    rig = make_rig(TritonTopThetaBackend)
    bound = rig.layers[0].impl.bound
    first = rig.builder
    other = type(first)(first.kv_cache_spec, first.layer_names, vllm_config, DEVICE)
    assert rig.layers[0].impl.bound is bound
    assert other._group is first._group


@pytest.mark.slow
def test_views_of_a_cache_go_with_it(make_rig: Any):
    """vLLM measures memory with a small cache, and expects it back before it allocates the real one."""
    rig = make_rig(TritonTopThetaBackend)
    make_sparse(rig)
    layer = rig.layers[0]
    bound = layer.impl.bound
    bound.paged_cache(layer, rig.caches[0])
    storage = weakref.ref(rig.caches[0])
    rig.caches.clear()
    gc.collect()
    assert storage() is None
    assert bound.cache is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("option", "value"),
    [("alibi_slopes", [0.5] * NUM_HEADS), ("kv_sharing_target_layer_name", "model.layers.0.self_attn.attn")],
)
def test_layers_that_would_be_wrong_are_refused_by_name(
    make_rig: Any, backend: type, option: str, value: Any
):
    with pytest.raises(NotImplementedError, match=option):
        make_rig(backend, **{option: value})


def test_outputs_are_not_quantised_behind_the_operator_s_back(make_rig: Any):
    impl = make_rig(TritonTopThetaBackend).layers[0].impl
    assert not impl.supports_quant_query_input
    assert not impl.fused_output_quant_supported(None)
    assert not impl.fused_rope_kvcache_supported()
    with pytest.raises(NotImplementedError, match="output_scale"):
        impl.forward(None, None, None, None, None, None, None, output_scale=torch.ones(1))


def test_blocks_are_large_enough_for_the_sums_to_be_cheap():
    """One float32 per channel and block: a sixty-fourth of a bf16 cache at 64 slots."""
    assert TritonTopThetaBackend.get_preferred_block_size(16) == 64
    assert TritonTopThetaBackend.get_preferred_block_size(128) == 128
