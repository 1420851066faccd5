"""TOPTHETA without thresholds on a GPU: what vLLM picks unasked, with its rows counted."""

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
    NOBODYS,
    NUM_HEADS,
    NUM_KV_HEADS,
    BatchSpec,
    Table,
    vllm_config,
)
from adapter_engine import make_rig
from adapter_rig import counting
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

from topt_vllm.backend.hosts.stock import stock_backend

pytestmark = pytest.mark.gpu

__all__ = ["make_rig", "vllm_config"]

PICKED = [FlashAttentionBackend, TritonAttentionBackend]


AUTO = {"implementation": "auto"}


@pytest.fixture
def stock(make_rig: Any) -> Any:
    """Makes a rig of a model without thresholds, on TOPTHETA's class for a backend of vLLM."""

    def stock(picked: type, **options: Any) -> Any:
        return make_rig(FLASH, table=None, backend=stock_backend(picked), settings=AUTO, **options)

    return stock


@pytest.fixture
def counted() -> Any:
    """What has been added to the counters so far; zeros left out."""
    return counting()


def rows(lengths: list[int], layers: int = 1, **reasons: float) -> dict[str, float]:
    """The counters of decoded rows that see so many keys each."""
    keys, number = sum(lengths) * layers, len(lengths) * layers
    return {
        "toptheta:attention_elements_total": keys * NUM_HEADS,
        "toptheta:attention_elements_kept_total": keys * NUM_HEADS,
        "toptheta:v_rows_total": keys * NUM_KV_HEADS,
        "toptheta:v_rows_read_total": keys * NUM_KV_HEADS,
        "toptheta:k_rows_read_total": keys * NUM_KV_HEADS,
        "toptheta:k_candidates_total": keys * NUM_KV_HEADS,
        "toptheta:dropped_mass_count": number * NUM_HEADS,
        "toptheta:decode_rows_total": number,
    } | {f"{kind}:{reason}": n for reason, n in reasons.items() for kind in ("dense_rows", "platform_rows")}


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("picked", PICKED)
def test_every_row_is_the_platform_s_and_counted(stock: Any, counted: Any, picked: type, batch: BatchSpec):
    torch.manual_seed(0)
    rig = stock(picked)
    rig.write_contexts(batch)
    step = rig.step(batch)
    assert type(rig.layers[0].impl) is picked.get_impl_cls()
    assert isinstance(rig.builder, picked.get_builder_cls())
    assert rig.platform_rows == [len(step.query)] == [step.metadata.num_actual_tokens]
    torch.testing.assert_close(step.output.float(), rig.dense(step), **CLOSE)
    assert rig.plan.kv_cache_groups[0].layer_names == [layer.layer_name for layer in rig.layers]
    decoded = [n for n, rows in zip(batch.seq_lens, batch.query_lens, strict=True) if rows == 1]
    assert counted() == (rows(decoded, no_thresholds=len(decoded)) if decoded else {})


def test_decode_rows_are_found_where_the_batch_is_not_reordered(stock: Any, counted: Any):
    rig = stock(FlashAttentionBackend, layers=2)
    rig.builder.build(0, rig.common(BatchSpec("unordered", [40, 33, 7, 58], [20, 1, 7, 1])))
    assert counted() == rows([33, 58], layers=2, no_thresholds=4)


def test_drafted_tokens_are_decode_rows(stock: Any, counted: Any):
    rig = stock(FlashAttentionBackend)
    rig.builder._toptheta_query_rows = 3
    rig.builder.build(0, rig.common(BatchSpec("verify", [40, 33, 58], [20, 3, 1])))
    assert counted() == rows([31, 32, 33, 58], no_thresholds=4)


def test_windows_are_counted_with_the_keys_that_they_see(stock: Any, counted: Any):
    rig = stock(FlashAttentionBackend, windows=(24,))
    rig.builder.build(0, rig.common(DECODE))
    assert counted() == rows([min(24, n) for n in DECODE.seq_lens], sliding_window=4)


@pytest.mark.parametrize("picked", PICKED)
def test_steps_are_counted_and_captures_not(stock: Any, counted: Any, picked: type):
    rig = stock(picked)
    rig.builder.build_for_cudagraph_capture(rig.common(CAPTURE))
    assert counted() == {}
    rig.builder.build(0, rig.common(DECODE))
    assert counted() == rows(DECODE.seq_lens, no_thresholds=4)


def test_rows_of_nobody_are_not_counted(stock: Any, counted: Any):
    """The second model runner captures pieces of graphs with them, and idle ranks of data parallelism step."""
    rig = stock(FlashAttentionBackend)
    common = rig.common(NOBODYS)
    metadata = rig.builder.build(0, common)
    rig.builder.update_block_table(metadata, common.block_table_tensor, common.slot_mapping)
    assert counted() == {}


def test_a_group_that_takes_over_another_s_metadata_is_counted(stock: Any, counted: Any):
    """As vLLM's first model runner does for groups of the same kind of layers."""
    rig = stock(FlashAttentionBackend)
    assert rig.builder.supports_update_block_table
    common = rig.common(DECODE)
    metadata = rig.builder.build(0, common)
    table = common.block_table_tensor + 1
    assert rig.builder.update_block_table(metadata, table, common.slot_mapping).block_table is table
    assert counted() == rows(DECODE.seq_lens, layers=2, no_thresholds=8)


def test_batches_that_are_not_causal_do_not_decode(stock: Any, counted: Any):
    rig = stock(FlashAttentionBackend)
    rig.builder.build(0, rig.common(DECODE).replace(causal=False))
    assert counted() == {}


def test_thresholds_are_not_ignored_after_an_engine_without_any(make_rig: Any):
    """vLLM keeps the class that it chose for the first engine of a process."""
    backend = stock_backend(FlashAttentionBackend)
    with pytest.raises(
        RuntimeError, match=r"layers\.1\.self_attn\.attn has thresholds, .* process of its own"
    ):
        make_rig(FLASH, Table(dense_layers=(0,)), layers=2, backend=backend, settings=AUTO)
