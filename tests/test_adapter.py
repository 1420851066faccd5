"""What TOPTHETA does on every host: which rows are sparse, with which thresholds, and what stays vLLM's."""

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from adapter_cases import (
    BATCHES,
    BLOCK_SIZE,
    CLOSE,
    EVERY_HOST,
    FP8,
    HOSTS,
    MIXED,
    NUM_HEADS,
    NUM_KV_HEADS,
    BatchSpec,
    Host,
    Table,
    vllm_config,
)
from adapter_engine import make_rig
from adapter_rig import counting, layer_name
from vllm.platforms.interface import DeviceCapability
from vllm.v1.worker.gpu.attn_utils import init_attn_backend

from topt_vllm.attention.common import Stat
from topt_vllm.backend.builder import _refuse
from topt_vllm.backend.skipping import _warn

__all__ = ["make_rig", "vllm_config"]


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("host", HOSTS)
def test_every_row_kept_is_dense_attention(make_rig: Any, host: Host, batch: BatchSpec):
    """θ = −inf on any batch, prefill rows included."""
    torch.manual_seed(0)
    rig = make_rig(host, table=None)
    rig.write_contexts(batch)
    step = rig.step(batch)
    torch.testing.assert_close(step.output.float(), rig.dense(step), **CLOSE)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("compensation", ["none", "vmean"])
@pytest.mark.parametrize("host", HOSTS)
def test_decode_rows_are_sparse_and_prefill_rows_stay_with_the_platform(
    make_rig: Any, host: Host, batch: BatchSpec, compensation: str
):
    torch.manual_seed(1)
    rig = make_rig(host, settings={"compensation": compensation})
    rig.write_contexts(batch)
    step = rig.step(batch)
    decoded = batch.query_lens.count(1)
    assert step.metadata.num_decode_rows == decoded
    statistics = rig.statistics()
    assert statistics[Stat.ROWS] == decoded
    if host.on_gpus:
        prefilled = len(step.query) - decoded
        assert rig.platform_rows == ([prefilled] if prefilled else [])
    torch.testing.assert_close(step.output[decoded:].float(), rig.dense(step)[decoded:], **CLOSE)
    if decoded:
        expected = rig.sparse(step, rig.thetas(), rig.selection)
        torch.testing.assert_close(step.output[:decoded].float(), expected, **CLOSE)
        assert 0.1 < statistics[Stat.V_ROWS_READ] / statistics[Stat.V_ROWS] < 0.7


@pytest.mark.parametrize("host", HOSTS)
def test_speculative_rows_decode_together(make_rig: Any, host: Host):
    torch.manual_seed(3)
    rig = make_rig(host, drafts=4)
    batch = BatchSpec("verify", [258, 131, 400], [5, 3, 1])
    rig.write_contexts(batch)
    step = rig.step(batch)
    assert step.metadata.num_decode_rows == 9
    assert step.metadata.prefill is None
    lengths = [254, 255, 256, 257, 258, 129, 130, 131, 400]
    assert rig.statistics()[Stat.ELEMENTS] == sum(lengths) * NUM_HEADS
    torch.testing.assert_close(step.output.float(), rig.sparse(step, rig.thetas(), rig.selection), **CLOSE)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("host", HOSTS)
def test_heads_of_512(make_rig: Any, host: Host, sparse: bool):
    """Of prefill and decoding; Gemma 4's layers with full attention have such."""
    torch.manual_seed(8)
    rig = make_rig(host, Table(theta=3.0) if sparse else None, head_size=512)
    batch = BatchSpec("mixed", [200, 50], [1, 50])
    rig.write_contexts(batch)
    step = rig.step(batch)
    dense = rig.dense(step)
    expected = rig.sparse(step, rig.thetas(), rig.selection) if sparse else dense[:1]
    torch.testing.assert_close(step.output[:1].float(), expected, **CLOSE)
    torch.testing.assert_close(step.output[1:].float(), dense[1:], **CLOSE)
    read = rig.statistics()[Stat.V_ROWS_READ] / rig.statistics()[Stat.V_ROWS]
    assert 0.1 < read < 0.7 if sparse else read == 1


FP8_NAMES = ["fp8", "fp8_e4m3", "fp8_e5m2"]


@pytest.mark.parametrize("name", FP8_NAMES)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("host", [HOSTS[0], HOSTS[2]])
def test_fp8_caches_are_read_as_vllm_writes_them(make_rig: Any, host: Host, name: str, sparse: bool):
    """With scales that are no powers of two; on CPUs the prefill rows are vLLM's own reading of the same cache."""
    torch.manual_seed(7)
    rig = make_rig(host, table=Table() if sparse else None, kv_cache_dtype=name)
    (layer,) = rig.layers
    layer._k_scale_float, layer._v_scale_float = 0.043, 0.031
    layer._k_scale.fill_(0.043)
    layer._v_scale.fill_(0.031)
    batch = BatchSpec("mixed", [300, 411, 90], [1, 1, 90])
    rig.write_contexts(batch)
    step = rig.step(batch)
    cpu_dtype = torch.float8_e5m2 if name == "fp8_e5m2" else torch.float8_e4m3fn
    assert rig.bound().cache.key.dtype == (FP8 if host.on_gpus else cpu_dtype)
    dense, statistics = rig.dense(step), rig.statistics()
    expected = rig.sparse(step, rig.thetas(), rig.selection) if sparse else dense[:2]
    torch.testing.assert_close(step.output[:2].float(), expected, **CLOSE)
    torch.testing.assert_close(step.output[2:].float(), dense[2:], **CLOSE)
    read = statistics[Stat.V_ROWS_READ] / statistics[Stat.V_ROWS]
    assert read < 0.6 if sparse else read == 1


@pytest.mark.parametrize("host", [HOSTS[0], HOSTS[2]])
def test_scales_that_are_loaded_again_are_read(make_rig: Any, host: Host):
    rig = make_rig(host, table=None, kv_cache_dtype="fp8")
    (layer,) = rig.layers
    batch = BatchSpec("decode", [300, 90], [1, 1])
    rig.write_contexts(batch)
    for scale in (0.5, 2.0):
        layer._v_scale_float = scale
        layer._v_scale.fill_(scale)
        layer.impl.process_weights_after_loading(torch.bfloat16)
        step = rig.step(batch)
        torch.testing.assert_close(step.output.float(), rig.dense(step), **CLOSE)


@pytest.mark.parametrize("host", EVERY_HOST)
@pytest.mark.parametrize(
    ("name", "dtype", "allowed"),
    [
        ("float16", torch.bfloat16, False),
        ("bfloat16", torch.float32, False),
        ("bfloat16", torch.bfloat16, True),
        ("auto", torch.float16, True),
    ],
)
def test_caches_of_another_16_bit_dtype_are_refused(host: Host, name: str, dtype: torch.dtype, allowed: bool):
    others = BLOCK_SIZE, False, False, False, False, DeviceCapability(9, 0)
    reason = host.backend.supports_combination(64, dtype, name, *others)
    assert (reason is None) == allowed, reason


@pytest.mark.parametrize("host", HOSTS)
def test_sliding_window_layers_stay_with_vllm_and_are_counted(make_rig: Any, host: Host):
    torch.manual_seed(4)
    rig = make_rig(host, windows=(64,))
    batch = BatchSpec("decode", [300, 20], [1, 1])
    rig.write_contexts(batch)
    added = counting()
    step = rig.step(batch)
    found = added()
    assert step.output.isfinite().all()
    assert step.metadata.decode is None
    assert found["dense_rows:sliding_window"] == 2
    assert found["toptheta:v_rows_read_total"] == (64 + 20) * NUM_KV_HEADS


@pytest.mark.parametrize("host", HOSTS)
def test_a_window_that_no_context_outgrows_is_none(make_rig: Any, vllm_config: Any, host: Host):
    """As Phi-4-mini has one; vLLM caches such a layer with those that have full attention."""
    torch.manual_seed(5)
    longest = vllm_config.model_config.max_model_len
    rig = make_rig(host, layers=3, windows=(longest, None, longest - 1))
    assert rig.builders[0] is rig.builders[1]
    assert rig.layers[2].impl.platform_reason == "sliding_window"
    batch = BatchSpec("decode", [300, 20], [1, 1])
    rig.write_contexts(batch)
    step = rig.step(batch)
    torch.testing.assert_close(step.output.float(), rig.sparse(step, rig.thetas(), rig.selection), **CLOSE)
    assert rig.statistics()[Stat.V_ROWS_READ] < 0.7 * rig.statistics()[Stat.V_ROWS]


@pytest.mark.parametrize("host", EVERY_HOST)
def test_a_server_that_will_skip_nothing_warns_once(
    make_rig: Any, host: Host, caplog: pytest.LogCaptureFixture
):
    _warn.cache_clear()
    make_rig(host)
    assert "will skip no V rows" not in caplog.text
    for _ in range(2):
        make_rig(host, layers=2, windows=(64,), settings={"min_seq_len": 4096})
    assert caplog.text.count("TOPTHETA will skip no V rows: toptheta.min_seq_len is 4096") == 1


@pytest.mark.parametrize("host", EVERY_HOST)
def test_tensor_parallel_ranks_take_their_own_heads(make_rig: Any, host: Host):
    table = Table(theta=[0.0, 1.0, 2.0, 3.0])
    for rank, heads in enumerate(([0.0, 1.0], [2.0, 3.0])):
        rig = make_rig(host, table, rank=(rank, 2))
        assert rig.thetas().theta[:, 0].tolist() == heads
    with pytest.raises(ValueError, match="divides the heads"):
        make_rig(host, table, rank=(0, 3))


@pytest.mark.parametrize("runner", ["generate", "pooling"])
@pytest.mark.parametrize("host", EVERY_HOST)
def test_pooled_prompts_are_dense_to_their_last_token(
    make_rig: Any, vllm_config: Any, monkeypatch: pytest.MonkeyPatch, host: Host, runner: str
):
    """A prompt's last chunk may be a single token. Where tokens are generated, it decodes, as vLLM has it.

    On GPUs it always does: a graph that is replayed for it was captured with decode rows.
    """
    monkeypatch.setattr(vllm_config.model_config, "runner_type", runner)
    rig = make_rig(host)
    ends = torch.tensor([True, True, True])
    for batch in (BatchSpec("ends", [300, 200, 40], [1, 1, 40]), BatchSpec("only ends", [300, 200], [1, 1])):
        common = rig.common(batch)
        metadata = rig.builder.build(0, common.replace(is_prefilling=ends[: len(batch.seq_lens)]))
        decodes = runner == "generate" or host.on_gpus
        assert metadata.num_decode_rows == (2 if decodes else 0)
        if decodes:
            assert metadata.decode.seq_lens.tolist() == [300, 200]


@pytest.mark.parametrize(
    ("host", "option", "value"),
    [
        pytest.param(*host.values, option, value, marks=host.marks, id=f"{host.id}-{option}")
        for option, value, hosts in (
            ("alibi_slopes", [0.5] * NUM_HEADS, EVERY_HOST),
            ("kv_sharing_target_layer_name", layer_name(0), EVERY_HOST[1:]),
        )
        for host in hosts
    ],
)
def test_layers_that_would_be_wrong_are_refused_by_name(make_rig: Any, host: Host, option: str, value: Any):
    with pytest.raises((NotImplementedError, ValueError), match=option):
        make_rig(host, **{option: value})


@pytest.mark.parametrize("host", EVERY_HOST)
def test_heads_of_v_that_are_narrower_are_refused(make_rig: Any, host: Host):
    """Models with such heads name other backends of vLLM in their code, whose caches differ."""
    with pytest.raises(NotImplementedError, match="needs heads of K and V of one size, not 32 and 16"):
        make_rig(host, head_size_v=16)


def test_caches_of_attention_that_is_not_causal_are_refused():
    """Layers of vLLM 0.33 that see a prompt both ways ask for a decoder's backend, and say so in their spec."""
    with pytest.raises(NotImplementedError, match="attention that is not causal"):
        _refuse(SimpleNamespace(head_size=64, head_size_v=64, non_causal=True))


@pytest.mark.parametrize("host", EVERY_HOST)
def test_a_cache_group_of_windows_stays_with_the_platform(make_rig: Any, host: Host):
    """As vLLM groups layers of models such as Gemma 3; their rows are counted."""
    rig = make_rig(host, layers=2, windows=(24, 24))
    added = counting()
    metadata = rig.builder.build(0, rig.common(MIXED))
    assert metadata.decode is None
    assert metadata.prefill is None
    assert metadata.whole is not None
    if host.on_gpus:
        assert metadata.whole.num_actual_tokens == 92
    assert added()["dense_rows:sliding_window"] == 2 * 2


@pytest.mark.parametrize("host", EVERY_HOST)
def test_builders_of_the_same_layers_share_what_graphs_point_to(make_rig: Any, host: Host):
    """Microbatches have a builder each, and vLLM makes builders again after it measured memory."""
    rig = make_rig(host)
    bound = rig.bound()
    groups, _, _ = init_attn_backend(rig.plan, rig.config, host.device)
    (other,) = (group.get_metadata_builder() for group in groups[0] if layer_name(0) in group.layer_names)
    assert other is not rig.builder
    assert rig.bound() is bound
    assert other._bound.group is rig.builder._bound.group is bound.group


@pytest.mark.parametrize("host", EVERY_HOST)
def test_views_of_a_cache_go_with_it(make_rig: Any, host: Host):
    """vLLM measures memory with a small cache, and expects it back before it allocates the real one."""
    rig = make_rig(host)
    (layer,), bound = rig.layers, rig.bound()
    cache = bound.paged_cache(rig.caches[0], lambda kv_cache: layer.impl.views(layer, kv_cache))
    assert cache is bound.cache
    del cache
    storage = weakref.ref(rig.caches[0])
    rig.caches.clear()
    layer.kv_cache = None
    gc.collect()
    assert storage() is None
    assert bound.cache is None


@pytest.mark.parametrize("host", EVERY_HOST)
def test_a_cache_of_other_blocks_than_the_builder_was_told_is_a_bug(make_rig: Any, host: Host):
    rig = make_rig(host)
    with pytest.raises(RuntimeError, match=f"blocks have 32 slots, {BLOCK_SIZE} expected"):
        rig.bound().paged_cache(rig.caches[0][:, :, :32], lambda kv_cache: kv_cache)
