"""What the adapter counts of a step on every host, and as which reason."""

from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from adapter_cases import (
    DECODE,
    EVERY_HOST,
    FLASH,
    GPU_HOSTS,
    HOSTS,
    MIXED,
    NOBODYS,
    NUM_HEADS,
    NUM_KV_HEADS,
    BatchSpec,
    Host,
    Table,
    vllm_config,
)
from adapter_engine import make_rig
from adapter_rig import counting, layer_name
from device import synchronize
from vllm.v1.worker.gpu.attn_utils import init_attn_backend

from topt_vllm.attention.common import Stat
from topt_vllm.backend.metrics import recorder, summary

__all__ = ["make_rig", "vllm_config"]

DRAFT = f"draft_model.{layer_name(0)}"


@pytest.mark.parametrize("implementation", ["auto", "triton"])
@pytest.mark.parametrize("host", HOSTS)
def test_what_is_counted_and_why(make_rig: Any, host: Host, implementation: str):
    """Layer 0 of the table is dense, layer 1 sparse from 97 tokens on, layer 2 has a window of 24."""
    if not host.on_gpus and implementation != "auto":
        pytest.skip("on CPUs the platform's kernel decodes layers with windows only")
    torch.manual_seed(6)
    table = Table(shortest=97, dense_layers=(0,))
    settings = {"implementation": implementation}
    rig = make_rig(host, table, layers=3, windows=(None, None, 24), settings=settings)
    rig.write_contexts(DECODE)
    added, amounts = counting(), recorder().amounts()
    for builder, index in ((rig.builders[0], 0), (rig.builders[2], 2)):
        metadata = builder.build(0, rig.common(DECODE, index))
        for number, of_layer in enumerate(rig.builders):
            if of_layer is builder:
                rig.write(number, rig.common(DECODE, number).slot_mapping)
                rig.attend(number, metadata, 4)
    if host.on_gpus:
        assert rig.platform_rows == ([4, 4] if implementation == "auto" else [4])
    found = added()
    assert found["dense_rows:dense_layer"] == 4
    assert found["dense_rows:short_context"] == 2
    assert found["dense_rows:sliding_window"] == 4
    assert found["toptheta:decode_rows_total"] == 3 * 4
    windowed = sum(min(24, length) for length in DECODE.seq_lens)
    assert found["toptheta:v_rows_total"] == (2 * sum(DECODE.seq_lens) + windowed) * NUM_KV_HEADS
    sparse = rig.statistics(1)
    read = sum(DECODE.seq_lens) + windowed
    assert found["toptheta:v_rows_read_total"] == read * NUM_KV_HEADS + sparse[Stat.V_ROWS_READ]
    assert sparse[Stat.V_ROWS_READ] < sparse[Stat.V_ROWS]
    logged = summary(recorder().amounts(), amounts)
    assert logged is not None
    assert "dense_layer 33.3%" in logged
    assert "sliding_window 33.3%" in logged


@pytest.mark.parametrize("host", HOSTS)
def test_counters_come_to_the_host_with_a_later_step(make_rig: Any, host: Host):
    """Nothing waits for a device: a step's metadata is built before the step is decoded."""
    rig = make_rig(host)
    rig.write_contexts(DECODE)
    added = counting()
    rig.step(DECODE)
    rig.builder._bound.group.counters._next_copy = 0.0
    before = recorder().totals()["toptheta:decode_rows_total"]
    rig.builder.build(0, rig.common(BatchSpec("prefill", [9], [9])))
    synchronize()
    after = recorder().totals()["toptheta:decode_rows_total"]
    # On CPUs there is nothing to copy.
    assert after - before == (4 if host.on_gpus else 0)
    assert added()["toptheta:decode_rows_total"] == 4


@pytest.mark.gpu
@pytest.mark.parametrize("host", GPU_HOSTS, ids=str)
def test_rows_of_nobody_are_not_counted(make_rig: Any, host: Host):
    rig = make_rig(host)
    rig.write_contexts(DECODE)
    added = counting()
    rig.step(DECODE)
    once = added()
    for _ in range(2):
        rig.step(NOBODYS)
        assert added() == once
    rig.step(DECODE)
    twice = added()
    for name in ("toptheta:decode_rows_total", "toptheta:v_rows_total", "dense_rows:short_context"):
        assert twice[name] == 2 * once[name], name


@pytest.mark.parametrize("host", EVERY_HOST)
def test_a_draft_model_s_layers_are_counted_in_its_own_steps(make_rig: Any, host: Host):
    """vLLM builds for them when the draft model runs, where the layers of both models share a builder, too."""
    rig = make_rig(host, layers=2, prefixes=(layer_name(0), DRAFT))
    assert rig.builders[0] is rig.builders[1]
    assert rig.states(1).value_sums is None
    common = rig.common(DECODE)
    added = counting()
    rig.builder.build(0, common)
    assert "dense_rows:draft_model" not in added()
    rig.builder.build_for_drafting(common, 0)
    assert added()["dense_rows:draft_model"] == 4
    assert "dense_rows:short_context" in added()


@pytest.mark.parametrize("host", EVERY_HOST)
def test_a_draft_model_s_own_builder_counts_every_step(make_rig: Any, host: Host):
    rig = make_rig(host, prefixes=(DRAFT,))
    added = counting()
    rig.builder.build(0, rig.common(DECODE))
    rig.builder.build_for_drafting(rig.common(DECODE), 0)
    assert added()["dense_rows:draft_model"] == 2 * 4


@pytest.mark.parametrize("host", EVERY_HOST)
def test_drafting_moves_no_thresholds(make_rig: Any, host: Host):
    """The model's layers don't run in the draft model's steps, so its rows are none of theirs."""
    rig = make_rig(host, layers=2, prefixes=(layer_name(0), DRAFT), settings={"adapt": True})
    thresholds = rig.builder._bound.group.thresholds
    assert rig.builder.build_for_drafting(rig.common(DECODE), 0).thresholds is None
    assert thresholds._contexts is None
    rig.builder.build(0, rig.common(DECODE))
    assert thresholds._contexts.tolist() == DECODE.seq_lens


@pytest.mark.parametrize("host", EVERY_HOST)
def test_a_speculator_s_own_builder_moves_no_thresholds(make_rig: Any, host: Host):
    """The second model runner builds for a draft model as for a model, by builders of its layers alone."""
    rig = make_rig(host, layers=2, prefixes=(layer_name(0), DRAFT), settings={"adapt": True})
    groups, _, _ = init_attn_backend(rig.plan, rig.config, host.device, active_layer_names={DRAFT})
    builder = groups[0][0].get_metadata_builder()
    assert builder._bound.group is rig.builder._bound.group
    assert builder.build(0, rig.common(DECODE)).thresholds is None
    assert rig.builder._bound.group.thresholds._contexts is None


@pytest.mark.parametrize("host", EVERY_HOST)
def test_batches_that_are_not_causal_do_not_decode(make_rig: Any, host: Host):
    rig = make_rig(host, table=None)
    added = counting()
    metadata = rig.builder.build(0, rig.common(MIXED).replace(causal=False))
    assert metadata.num_decode_rows == 0
    assert metadata.decode is None
    assert added() == {}


@pytest.mark.parametrize("host", [EVERY_HOST[0], pytest.param(FLASH, marks=pytest.mark.gpu, id="flash")])
def test_a_rank_counts_its_heads(make_rig: Any, host: Host):
    """Rows are the first rank's; a KV head that several ranks hold is a part of one for each."""
    counted = []
    for rank in range(4):
        rig = make_rig(host, windows=(24,), rank=(rank, 4), table=None)
        added = counting()
        rig.builder.build(0, rig.common(BatchSpec("decode", [300, 20], [1, 1])))
        counted.append(added())
    totals = {name: sum(part.get(name, 0) for part in counted) for name in counted[0]}
    assert totals["toptheta:decode_rows_total"] == 2
    assert totals["toptheta:attention_elements_total"] == (24 + 20) * NUM_HEADS
    assert totals["toptheta:v_rows_total"] == (24 + 20) * NUM_KV_HEADS


@pytest.mark.parametrize("host", EVERY_HOST)
def test_a_rank_counts_its_heads_beside_a_draft_model(make_rig: Any, host: Host):
    """The heads of which aren't known, and count as the rank's own."""
    rig = make_rig(host, layers=2, prefixes=(layer_name(0), DRAFT), rank=(0, 4))
    decode = BatchSpec("decode", [300, 20], [1, 1])
    rig.write_contexts(decode)
    added = counting()
    rig.step(decode)
    assert added()["toptheta:v_rows_total"] == (300 + 20) * NUM_KV_HEADS / 4
