"""What CUDA graphs ask of the GPU adapter: static buffers, honest declarations, no look at the device's data."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from adapter_cases import (
    BATCHES,
    CAPTURE,
    CLOSE,
    DECODE,
    FLASH,
    GPU_HOSTS,
    HEAD_DIM,
    MAX_SEQUENCES,
    MIXED,
    NUM_HEADS,
    NUM_KV_HEADS,
    TRITON,
    BatchSpec,
    Host,
    Table,
    vllm_config,
)
from adapter_engine import make_rig
from adapter_rig import Step
from device import interpreter_only, synchronize
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
from vllm.v1.worker.gpu.attn_utils import init_attn_backend

from topt_vllm.adaptation import ROWS
from topt_vllm.attention.common import DecodeBatch, Stat
from topt_vllm.attention.triton.calls import Call
from topt_vllm.backend import thresholds
from topt_vllm.backend.metrics import recorder

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

__all__ = ["make_rig", "vllm_config"]


def refilled(static: Any, real: Any) -> Any:
    """The batch of a graph after vLLM has changed its static buffers to four real sequences and padding."""
    static.query_start_loc.fill_(4)[:5] = real.query_start_loc
    static.seq_lens.fill_(0)[:4] = real.seq_lens
    static.block_table_tensor.fill_(0)[:4] = real.block_table_tensor
    return static.replace(query_start_loc_cpu=static.query_start_loc.to("cpu", copy=True))


def real_rows(query: torch.Tensor, common: Any) -> Step:
    """What a replayed graph did for the four real sequences of :func:`refilled`."""
    metadata = SimpleNamespace(
        num_decode_rows=4,
        decode=DecodeBatch(common.query_start_loc, common.seq_lens, common.block_table_tensor),
    )
    return Step(query[:4], query[:4], metadata, common)


def test_a_captured_batch_replays_on_other_lengths_and_with_padding(make_rig: Any):
    """vLLM captures with dummy sequences and replays after changing the contents of its static buffers."""
    torch.manual_seed(5)
    rig = make_rig(TRITON)
    rig.write_contexts(DECODE)
    static = rig.common(CAPTURE)
    captured = rig.builder.build_for_cudagraph_capture(static)
    replay = rig.capture(0, captured, MAX_SEQUENCES)
    before = recorder().totals()

    real = rig.common(DECODE)
    rig.write(0, real.slot_mapping)
    rig.builder.build(0, refilled(static, real))
    query, output = replay()
    expected = rig.sparse(real_rows(query, real), rig.thetas(), rig.selection)
    torch.testing.assert_close(output[:4].float(), expected, **CLOSE)
    assert output[4:].isnan().all()

    statistics = rig.statistics()
    assert statistics[Stat.ROWS] == 4
    assert statistics[Stat.ELEMENTS] == sum(DECODE.seq_lens) * NUM_HEADS
    rig.builder._bound.group.counters._next_copy = 0.0
    rig.builder.build(0, real)
    synchronize()
    assert recorder().totals()["toptheta:decode_rows_total"] - before["toptheta:decode_rows_total"] == 4


def test_a_replayed_graph_finishes_states_and_moves_with_the_thresholds(make_rig: Any):
    """Its tensors are those that each step's metadata brings up to date; what a capture counted moves nothing."""
    torch.manual_seed(15)
    rig = make_rig(TRITON, Table(theta=0.0, keys=4), settings={"adapt": True})
    batch = BatchSpec("decode", [127] * MAX_SEQUENCES, [1] * MAX_SEQUENCES)
    rig.write_contexts(batch)
    static = rig.common(CAPTURE)
    replay = rig.capture(0, rig.builder.build_for_cudagraph_capture(static), MAX_SEQUENCES)
    offsets = rig.builder._bound.group.thresholds._controller.offset
    for last in range(127, 128 + ROWS // MAX_SEQUENCES):
        step = rig.common(BatchSpec("decode", [last] * MAX_SEQUENCES, [1] * MAX_SEQUENCES))
        static.seq_lens.copy_(step.seq_lens)
        static.block_table_tensor.copy_(step.block_table_tensor)
        rig.builder.build(0, step)
        assert bool((offsets > 0).all()) == (last == 127 + ROWS // MAX_SEQUENCES)
        rig.write(0, step.slot_mapping)
        query, output = replay()
    decode = DecodeBatch(step.query_start_loc, step.seq_lens, step.block_table_tensor)
    metadata = SimpleNamespace(num_decode_rows=MAX_SEQUENCES, decode=decode)
    expected = rig.sparse(Step(query, output, metadata, step), rig.thetas(), rig.selection)
    torch.testing.assert_close(output.float(), expected, **CLOSE)
    for row in range(MAX_SEQUENCES):
        torch.testing.assert_close(*rig.sums(row, 128), rtol=1e-5, atol=1e-4)


def test_a_step_without_requests_counts_nothing_and_takes_nothing_away(make_rig: Any):
    """A rank of data parallelism that has none replays a graph, as for a capture, between real steps."""
    rig = make_rig(TRITON)
    rig.write_contexts(DECODE)
    rig.step(DECODE)
    for _ in range(2):
        metadata = rig.builder.build_for_cudagraph_capture(rig.common(CAPTURE))
        rig.attend(0, metadata, MAX_SEQUENCES)
    assert rig.statistics()[Stat.ROWS] > 4
    rig.builder.build(0, rig.common(DECODE))
    statistics = rig.statistics()
    assert statistics[Stat.ROWS] == 4
    assert statistics[Stat.ELEMENTS] == sum(DECODE.seq_lens) * NUM_HEADS


def test_settling_fetches_what_the_device_counted_since_the_last_copy(make_rig: Any):
    """A step's metadata is built before the step is decoded, so the last step is never in its copy."""
    rig = make_rig(TRITON)
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


@pytest.mark.parametrize("host", GPU_HOSTS, ids=str)
def test_a_graph_holds_layers_of_both_kinds(make_rig: Any, monkeypatch: pytest.MonkeyPatch, host: Host):
    """A dense layer's part is what the platform's builder makes for a graph, and it is made anew for each step."""
    torch.manual_seed(8)
    rig = make_rig(host, Table(dense_layers=(0,)), layers=2, settings={"implementation": "auto"})
    rig.write_contexts(DECODE)
    platform = rig.builder._platform
    assert type(platform) is rig.builder.platform_builder
    calls: list[str] = []

    def spied(method: str) -> Any:
        stock = getattr(platform, method)
        return lambda *args, **options: (calls.append(method), stock(*args, **options))[1]

    for method in ("build_for_cudagraph_capture", "build"):
        monkeypatch.setattr(platform, method, spied(method))
    static = rig.common(CAPTURE)
    captured = rig.builder.build_for_cudagraph_capture(static)
    assert calls[0] == "build_for_cudagraph_capture"
    assert (static.seq_lens == 1).all()
    replay = rig.capture(1, captured, MAX_SEQUENCES)

    calls.clear()
    real = rig.common(DECODE)
    rig.builder.build(0, refilled(static, real))
    assert calls == ["build"]
    for index in range(2):
        rig.write(index, real.slot_mapping)
        # Torch reads what it stands in with off the device, which no graph can hold.
        query, output = replay() if index else rig.attend(index, captured, MAX_SEQUENCES)
        step = real_rows(query, real)
        expected = rig.sparse(step, rig.thetas(1), rig.selection, 1) if index else rig.dense(step)
        torch.testing.assert_close(output[:4].float(), expected, **CLOSE)
    assert rig.platform_rows == [MAX_SEQUENCES]


@pytest.mark.parametrize("host", GPU_HOSTS, ids=str)
@pytest.mark.parametrize("platform", AttentionCGSupport)
def test_no_more_is_declared_than_the_platform_s_builder_can_do(
    vllm_config: Any, monkeypatch: pytest.MonkeyPatch, host: Host, platform: AttentionCGSupport
):
    builder = host.backend.get_builder_cls()
    monkeypatch.setattr(
        builder.platform_builder, "get_cudagraph_support", classmethod(lambda cls, *args: platform)
    )
    declared = builder.get_cudagraph_support(vllm_config, None)
    assert declared.value == min(platform.value, AttentionCGSupport.UNIFORM_BATCH.value)


@pytest.mark.parametrize("adapt", [False, True], ids=["fixed", "adapt"])
@pytest.mark.parametrize("host", GPU_HOSTS, ids=str)
def test_graphs_are_declared_for_uniform_decode_batches(make_rig: Any, host: Host, adapt: bool):
    """States' layers declare nothing that would take more from them."""
    rig = make_rig(host, settings={"adapt": adapt})
    builder = rig.builder
    support = builder.get_cudagraph_support(rig.config, builder.kv_cache_spec)
    assert support == AttentionCGSupport.UNIFORM_BATCH
    assert builder.reorder_batch_threshold == 1
    assert not builder.supports_update_block_table
    assert not builder.supports_draft_decode_metadata_update
    _, whole, _ = init_attn_backend(rig.plan, rig.config, host.device)
    assert whole.min_cg_support == AttentionCGSupport.UNIFORM_BATCH
    assert whole.min_cg_attn_backend == host.backend.__name__


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """As a tensor, without its data."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    memory = torch.empty(size, dtype=tensor.dtype, device=device)
    return memory.as_strided(tensor.shape, tensor.stride())


def on_meta(common: Any) -> Any:
    """A batch whose device part has no data."""
    names = ("query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping")
    return common.replace(**{name: getattr(common, name).to("meta") for name in names})


@interpreter_only
@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("host", GPU_HOSTS, ids=str)
@pytest.mark.parametrize("implementation", ["auto", "triton"])
def test_building_metadata_reads_nothing_off_the_device(
    make_rig: Any, host: Host, batch: BatchSpec, implementation: str
):
    """Tensors of the device ``meta`` have no data: any read of them raises."""
    settings = {"implementation": implementation}
    rig = make_rig(host, Table(dense_layers=(0,)), layers=3, windows=(None, None, 24), settings=settings)
    common = on_meta(rig.common(batch))
    with pytest.raises(RuntimeError, match="meta"):
        common.seq_lens.max().item()
    for builder in (rig.builders[1], rig.builders[2]):
        metadata = builder.build(0, common)
        assert metadata.num_decode_rows == batch.query_lens.count(1)
        builder.build_for_cudagraph_capture(common)


def test_thresholds_that_adapt_are_told_of_a_step_through_pinned_memory(
    make_rig: Any, monkeypatch: pytest.MonkeyPatch
):
    """A copy of other memory is staged by the driver, which may wait; VLLM_GPU_SYNC_CHECK calls that an error."""
    rig = make_rig(FLASH, settings={"adapt": True})
    copied: list[Any] = []
    copy = thresholds.async_tensor_h2d
    monkeypatch.setattr(
        thresholds, "async_tensor_h2d", lambda data, device: copied.append(data) or copy(data, device)
    )
    rig.builder.build(0, rig.common(DECODE))
    assert [lengths.tolist() for lengths in copied] == [DECODE.seq_lens]


@interpreter_only
@pytest.mark.parametrize("batch", [DECODE, MIXED], ids=str)
def test_a_whole_step_reads_nothing_off_the_device(
    make_rig: Any, monkeypatch: pytest.MonkeyPatch, batch: BatchSpec
):
    """Everything on the device ``meta``, up to the launches, which are recorded instead."""
    rig = make_rig(FLASH)
    (layer,), bound = rig.layers, rig.bound()
    meta = torch.device("meta")
    bound.group.thresholds.thetas = [bound.group.thresholds.thetas[0].to(meta)]
    bound.statistics = bound.statistics.to(meta)
    sums = rig.states().value_sums
    sums.kv_cache = on_device(sums.kv_cache, meta)
    launched: list[str] = []
    monkeypatch.setattr(Call, "launch", lambda call: launched.append(call.kernel.fn.__name__))
    monkeypatch.setattr(FlashAttentionImpl, "do_kv_cache_update", lambda *args: None)
    monkeypatch.setattr(FlashAttentionImpl, "forward", lambda *args: launched.append("prefill"))
    common = on_meta(rig.common(batch))
    metadata = rig.builder.build(0, common)
    bound.group.warm_up = None
    rows = common.num_actual_tokens
    query = torch.empty(rows, NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=meta)
    kv_cache = on_device(rig.caches[0], meta)
    layer.impl.do_kv_cache_update(layer, query, query, kv_cache, common.slot_mapping)
    layer.impl.forward(layer, query, query, query, kv_cache, metadata, torch.empty_like(query))
    prefill = ["prefill"] * (metadata.prefill is not None)
    assert launched == ["_topt_finish_kernel", *prefill, "_topt_decode_kernel", "_topt_merge_kernel"]


def test_the_first_step_compiles_what_later_ones_need(make_rig: Any, monkeypatch: pytest.MonkeyPatch):
    """Single rows and several, small batches and the largest: by constants. It is one of prompts alone."""
    rig = make_rig(TRITON, drafts=4)
    launched: list[Call] = []
    launch = Call.launch
    monkeypatch.setattr(Call, "launch", lambda call: (launched.append(call), launch(call)))
    rig.write_contexts(DECODE)
    kinds = {(call.kernel.fn.__name__, call.arguments.get("SINGLE_ROW")) for call in launched}
    assert kinds == {
        ("_topt_decode_kernel", True),
        ("_topt_decode_kernel", False),
        ("_topt_merge_kernel", None),
        ("_topt_finish_kernel", None),
    }
    for _ in range(2):
        count = len(launched)
        step = rig.step(DECODE)
        assert step.output.isfinite().all()
        assert len(launched) == count + 3
    assert rig.statistics()[Stat.ROWS] == 2 * len(step.query)
