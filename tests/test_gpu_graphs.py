"""What CUDA graphs ask of the GPU adapter: static buffers, honest declarations, no look at the device's data."""

from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from device import interpreter_only, synchronize
from gpu_cases import (
    BACKENDS,
    BATCHES,
    CLOSE,
    DECODE,
    HEAD_DIM,
    MAX_SEQUENCES,
    NUM_HEADS,
    NUM_KV_HEADS,
    THETAS,
    BatchSpec,
    as_on_gpu,
    vllm_config,
)
from gpu_rig import make_rig, make_sparse
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from topt_vllm.attention.common import Policy, Stat
from topt_vllm.attention.triton.calls import Call
from topt_vllm.backend.gpu.flash_attn import FlashTopThetaBackend
from topt_vllm.backend.gpu.triton_attn import TritonTopThetaBackend
from topt_vllm.backend.metrics import recorder

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

__all__ = ["make_rig", "vllm_config"]


def refilled(static: Any, real: Any) -> Any:
    """The batch of a graph after vLLM has changed its static buffers to four real sequences and padding."""
    static.query_start_loc.fill_(4)[:5] = real.query_start_loc
    static.seq_lens.fill_(0)[:4] = real.seq_lens
    static.block_table_tensor.fill_(0)[:4] = real.block_table_tensor
    return static.replace(query_start_loc_cpu=static.query_start_loc.to("cpu", copy=True))


def test_a_captured_batch_replays_on_other_lengths_and_with_padding(make_rig: Any):
    """vLLM captures with dummy sequences and replays after changing the contents of its static buffers."""
    torch.manual_seed(5)
    rig = make_rig(TritonTopThetaBackend)
    policy = make_sparse(rig)
    rig.write_contexts(DECODE)
    static = rig.common(BatchSpec("capture", [1] * MAX_SEQUENCES, [1] * MAX_SEQUENCES))
    captured = rig.builder.build_for_cudagraph_capture(static)
    replay = rig.capture(0, captured, MAX_SEQUENCES)
    before = recorder().totals()

    real = rig.common(DECODE)
    rig.write(0, real.slot_mapping)
    rig.builder.build(0, refilled(static, real))
    query, output = replay()
    expected = rig.expected(0, query[:4], real, THETAS, policy)
    torch.testing.assert_close(output[:4].float(), expected, **CLOSE)
    assert output[4:].isnan().all()

    statistics = rig.layers[0].impl.bound.statistics.sum(dim=0)
    assert statistics[Stat.ROWS] == 4
    assert statistics[Stat.ELEMENTS] == sum(DECODE.seq_lens) * NUM_HEADS
    rig.builder._group.statistics._next_copy = 0.0
    rig.builder.build(0, real)
    synchronize()
    assert recorder().totals()["toptheta:decode_rows_total"] - before["toptheta:decode_rows_total"] == 4


def test_settling_fetches_what_the_device_counted_since_the_last_copy(make_rig: Any):
    """A step's metadata is built before the step is decoded, so the last step is never in its copy."""
    rig = make_rig(TritonTopThetaBackend)
    make_sparse(rig)
    rig.write_contexts(DECODE)
    recorder().settle()  # what earlier rigs counted
    before = recorder().totals()
    rig.step(DECODE)
    assert recorder().totals()["toptheta:v_rows_total"] == before["toptheta:v_rows_total"]
    recorder().settle()
    after = recorder().totals()
    assert after["toptheta:decode_rows_total"] - before["toptheta:decode_rows_total"] == 4
    added = after["toptheta:v_rows_total"] - before["toptheta:v_rows_total"]
    assert added == sum(DECODE.seq_lens) * NUM_KV_HEADS


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_holds_layers_of_both_kinds(
    make_rig: Any, vllm_config: Any, monkeypatch: pytest.MonkeyPatch, backend: type
):
    """A dense layer's part is what the platform's builder makes for a graph, and it is made anew for each step."""
    torch.manual_seed(8)
    as_on_gpu(vllm_config, monkeypatch)
    rig = make_rig(backend, layers=2)
    platform = rig.builder._platform
    assert type(platform) is rig.builder.platform_builder
    calls: list[str] = []

    def spied(method: str) -> Any:
        stock = getattr(platform, method)
        return lambda *args, **options: (calls.append(method), stock(*args, **options))[1]

    for method in ("build_for_cudagraph_capture", "build"):
        monkeypatch.setattr(platform, method, spied(method))
    rig.write_contexts(DECODE)
    static = rig.common(BatchSpec("capture", [1] * MAX_SEQUENCES, [1] * MAX_SEQUENCES))
    captured = rig.builder.build_for_cudagraph_capture(static)
    assert calls[0] == "build_for_cudagraph_capture"
    assert (static.seq_lens == 1).all()
    replay = rig.capture(1, captured, MAX_SEQUENCES)

    calls.clear()
    real = rig.common(DECODE)
    rig.builder.build(0, refilled(static, real))
    assert calls == ["build"]
    thetas = rig.layers[1].impl.bound.thetas
    for index in range(2):
        rig.write(index, real.slot_mapping)
        # Torch reads what it stands in with off the device, which no graph can hold.
        query, output = replay() if index else rig.attend(index, captured, MAX_SEQUENCES)
        expected = rig.expected(index, query[:4], real, thetas if index else None, Policy())
        torch.testing.assert_close(output[:4].float(), expected, **CLOSE)
    assert rig.platform_rows == [MAX_SEQUENCES]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("platform", AttentionCGSupport)
def test_no_more_is_declared_than_the_platform_s_builder_can_do(
    make_rig: Any,
    vllm_config: Any,
    monkeypatch: pytest.MonkeyPatch,
    backend: Any,
    platform: AttentionCGSupport,
):
    builder = backend.get_builder_cls()
    monkeypatch.setattr(
        builder.platform_builder, "get_cudagraph_support", classmethod(lambda cls, *args: platform)
    )
    declared = builder.get_cudagraph_support(vllm_config, None)
    assert declared.value == min(platform.value, AttentionCGSupport.UNIFORM_BATCH.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_graphs_are_declared_for_uniform_decode_batches(make_rig: Any, vllm_config: Any, backend: type):
    builder = make_rig(backend).builder
    support = builder.get_cudagraph_support(vllm_config, builder.kv_cache_spec)
    assert support == AttentionCGSupport.UNIFORM_BATCH
    assert builder.reorder_batch_threshold == 1
    assert not builder.supports_update_block_table
    assert not builder.supports_draft_decode_metadata_update


def on_meta(common: Any) -> Any:
    """A batch whose device part has no data."""
    names = ("query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping")
    return common.replace(**{name: getattr(common, name).to("meta") for name in names})


@interpreter_only
@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("implementation", ["auto", "triton"])
def test_building_metadata_reads_nothing_off_the_device(
    make_rig: Any,
    vllm_config: Any,
    monkeypatch: pytest.MonkeyPatch,
    backend: type,
    batch: BatchSpec,
    implementation: str,
):
    """Tensors of the device ``meta`` have no data: any read of them raises."""
    as_on_gpu(vllm_config, monkeypatch, implementation=implementation)
    rig = make_rig(backend, layers=3, windows=(None, None, 24))
    common = on_meta(rig.common(batch))
    with pytest.raises(RuntimeError, match="meta"):
        common.seq_lens.max().item()
    metadata = rig.builder.build(0, common)
    assert metadata.num_decode_rows == batch.query_lens.count(1)
    rig.builder.build_for_cudagraph_capture(common)


@interpreter_only
@pytest.mark.parametrize("batch", [DECODE, BATCHES[2]], ids=str)
def test_a_whole_step_reads_nothing_off_the_device(
    make_rig: Any, monkeypatch: pytest.MonkeyPatch, batch: BatchSpec
):
    """Everything on the device ``meta``, up to the launches, which are recorded instead."""
    rig = make_rig(FlashTopThetaBackend)
    make_sparse(rig, thetas=THETAS.to(torch.device("meta")))
    layer = rig.layers[0]
    layer.impl.bound.statistics = layer.impl.bound.statistics.to("meta")
    launched: list[str] = []
    monkeypatch.setattr(Call, "launch", lambda call: launched.append(call.kernel.fn.__name__))
    monkeypatch.setattr(FlashAttentionImpl, "do_kv_cache_update", lambda *args: None)
    monkeypatch.setattr(FlashAttentionImpl, "forward", lambda *args: launched.append("prefill"))
    common = on_meta(rig.common(batch))
    metadata = rig.builder.build(0, common)
    layer.impl.bound.group.warm_up.done = True
    rows = common.num_actual_tokens
    query = torch.empty(rows, NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="meta")
    pages = torch.empty(rig.caches[0].untyped_storage().nbytes() // 2, dtype=torch.bfloat16, device="meta")
    kv_cache = pages.as_strided(rig.caches[0].shape, rig.caches[0].stride())
    layer.impl.do_kv_cache_update(layer, query, query, kv_cache, common.slot_mapping)
    layer.impl.forward(layer, query, query, query, kv_cache, metadata, torch.empty_like(query))
    prefill = ["prefill"] * (metadata.prefill is not None)
    assert launched == ["_topt_sums_kernel", *prefill, "_topt_decode_kernel", "_topt_merge_kernel"]


def test_the_first_step_compiles_what_later_ones_need(make_rig: Any, monkeypatch: pytest.MonkeyPatch):
    """Single rows and several, small batches and the largest, written prompts and written tokens: by constants."""
    rig = make_rig(TritonTopThetaBackend)
    rig.builder._max_query_rows = 5
    make_sparse(rig)
    rig.write_contexts(DECODE)
    launched: list[Call] = []
    launch = Call.launch
    monkeypatch.setattr(Call, "launch", lambda call: (launched.append(call), launch(call)))
    query, output, _ = rig.step(DECODE)
    assert output.isfinite().all()
    kinds = {
        (call.kernel.fn.__name__, call.arguments.get("SINGLE_ROW"), call.arguments.get("TOKENS"))
        for call in launched[1:-2]  # without the step's own
    }
    assert kinds == {
        ("_topt_decode_kernel", True, None),
        ("_topt_decode_kernel", False, None),
        ("_topt_merge_kernel", None, None),
        ("_topt_sums_kernel", None, 1),
        ("_topt_sums_kernel", None, 16),
    }
    count = len(launched)
    rig.step(DECODE)
    assert len(launched) == count + 3
    assert rig.layers[0].impl.bound.statistics.sum(dim=0)[Stat.ROWS] == 2 * len(query)
