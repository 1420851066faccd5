"""TOPTHETA without thresholds on a GPU: what vLLM picks unasked, with its rows counted."""

from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from gpu_cases import (
    BATCHES,
    CLOSE,
    DECODE,
    MAX_SEQUENCES,
    NUM_HEADS,
    NUM_KV_HEADS,
    BatchSpec,
    as_on_gpu,
    vllm_config,
)
from gpu_rig import make_rig
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

from topt_vllm.attention.common import Policy
from topt_vllm.backend.gpu.stock import stock_backend
from topt_vllm.backend.metrics import recorder

pytestmark = pytest.mark.gpu

__all__ = ["make_rig", "vllm_config"]

PICKED = [FlashAttentionBackend, TritonAttentionBackend]


@pytest.fixture
def counted(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What has been added to the counters so far; zeros left out."""
    as_on_gpu(vllm_config, monkeypatch, thresholds="none")
    before = recorder().totals()

    def counted() -> dict[str, float]:
        now = recorder().totals()
        return {name: new for name in now if (new := now[name] - before.get(name, 0))}

    return counted


def rows(lengths: list[int], layers: int = 1, **reasons: float) -> dict[str, float]:
    """The counters of decoded rows that see so many keys each."""
    keys, number = sum(lengths) * layers, len(lengths) * layers
    return {
        "toptheta:attention_elements_total": keys * NUM_HEADS,
        "toptheta:attention_elements_kept_total": keys * NUM_HEADS,
        "toptheta:v_rows_total": keys * NUM_KV_HEADS,
        "toptheta:v_rows_read_total": keys * NUM_KV_HEADS,
        "toptheta:k_rows_read_total": keys * NUM_KV_HEADS,
        "toptheta:dropped_mass_count": number * NUM_HEADS,
        "toptheta:decode_rows_total": number,
    } | {f"{kind}:{reason}": n for reason, n in reasons.items() for kind in ("dense_rows", "platform_rows")}


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("picked", PICKED)
def test_every_row_is_the_platform_s_and_counted(make_rig: Any, counted: Any, picked: type, batch: BatchSpec):
    torch.manual_seed(0)
    rig = make_rig(stock_backend(picked))
    rig.write_contexts(batch)
    query, output, metadata = rig.step(batch)
    assert type(rig.layers[0].impl) is picked.get_impl_cls()
    assert isinstance(rig.builder, picked.get_builder_cls())
    assert rig.platform_rows == [len(query)] == [metadata.num_actual_tokens]
    torch.testing.assert_close(
        output.float(), rig.expected(0, query, rig.common(batch), None, Policy()), **CLOSE
    )
    decoded = [n for n, rows in zip(batch.seq_lens, batch.query_lens, strict=True) if rows == 1]
    assert counted() == (rows(decoded, no_thresholds=len(decoded)) if decoded else {})


def test_decode_rows_are_found_where_the_batch_is_not_reordered(make_rig: Any, counted: Any):
    rig = make_rig(stock_backend(FlashAttentionBackend), layers=2)
    rig.builder.build(0, rig.common(BatchSpec("unordered", [40, 33, 7, 58], [20, 1, 7, 1])))
    assert counted() == rows([33, 58], layers=2, no_thresholds=4)


def test_drafted_tokens_are_decode_rows(make_rig: Any, counted: Any):
    rig = make_rig(stock_backend(FlashAttentionBackend))
    rig.builder._toptheta_query_rows = 3
    rig.builder.build(0, rig.common(BatchSpec("verify", [40, 33, 58], [20, 3, 1])))
    assert counted() == rows([31, 32, 33, 58], no_thresholds=4)


def test_windows_are_counted_with_the_keys_that_they_see(make_rig: Any, counted: Any):
    rig = make_rig(stock_backend(FlashAttentionBackend), windows=(24,))
    rig.builder.build(0, rig.common(DECODE))
    assert counted() == rows([min(24, n) for n in DECODE.seq_lens], sliding_window=4)


@pytest.mark.parametrize("picked", PICKED)
def test_steps_are_counted_and_captures_not(make_rig: Any, counted: Any, picked: type):
    rig = make_rig(stock_backend(picked))
    rig.builder.build_for_cudagraph_capture(
        rig.common(BatchSpec("capture", [1] * MAX_SEQUENCES, [1] * MAX_SEQUENCES))
    )
    assert counted() == {}
    rig.builder.build(0, rig.common(DECODE))
    assert counted() == rows(DECODE.seq_lens, no_thresholds=4)


def test_a_group_that_takes_over_another_s_metadata_is_counted(make_rig: Any, counted: Any):
    """As vLLM's first model runner does for groups of the same kind of layers."""
    rig = make_rig(stock_backend(FlashAttentionBackend))
    assert rig.builder.supports_update_block_table
    common = rig.common(DECODE)
    metadata = rig.builder.build(0, common)
    table = common.block_table_tensor + 1
    assert rig.builder.update_block_table(metadata, table, common.slot_mapping).block_table is table
    assert counted() == rows(DECODE.seq_lens, layers=2, no_thresholds=8)


def test_batches_that_are_not_causal_do_not_decode(make_rig: Any, counted: Any):
    rig = make_rig(stock_backend(FlashAttentionBackend))
    rig.builder.build(0, rig.common(DECODE).replace(causal=False))
    assert counted() == {}


def test_thresholds_are_not_ignored_after_an_engine_without_any(
    make_rig: Any, vllm_config: Any, monkeypatch: pytest.MonkeyPatch
):
    """vLLM keeps the class that it chose for the first engine of a process."""
    as_on_gpu(vllm_config, monkeypatch)
    with pytest.raises(
        RuntimeError, match=r"layers\.1\.self_attn\.attn has thresholds, .* process of its own"
    ):
        make_rig(stock_backend(FlashAttentionBackend), layers=2)
