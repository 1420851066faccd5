"""What the adapter stores beside K and V: whose, where vLLM puts it, what it costs, and that it is right."""

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from adapter_cases import (
    BLOCK_SIZE,
    CLOSE,
    EVERY_HOST,
    HEAD_DIM,
    HOSTS,
    NUM_KV_HEADS,
    STATE_ROWS,
    BatchSpec,
    Host,
    Table,
    vllm_config,
)
from adapter_engine import make_rig
from adapter_rig import layer_name
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout

from topt_vllm.backend import connectors
from topt_vllm.backend.states import LayerStates, StatesLayer, ValueSums, register

__all__ = ["make_rig", "vllm_config"]

# Where sums came in batches of other sizes, their last bits may differ.
SAME_SUMS = {"rtol": 1e-5, "atol": 1e-4}
BLOCK_COMPACT = [layout for layout in KVCacheLayout if layout.is_block_compact]


def states_layers(config: Any) -> dict[str, StatesLayer]:
    """All that vLLM caches besides attention layers."""
    context = config.compilation_config.static_forward_context
    return {name: layer for name, layer in context.items() if isinstance(layer, StatesLayer)}


@pytest.mark.parametrize("host", HOSTS)
def test_value_sums_follow_rewritten_blocks(make_rig: Any, host: Host):
    """A reused block, or a rejected draft token, leaves no trace in the sums."""
    torch.manual_seed(2)
    rig = make_rig(host)
    for _ in range(2):
        rig.prefill([300])
        torch.testing.assert_close(*rig.sums(0, 300), **SAME_SUMS)
        unwritten = rig.states().value_sums.numbers()[int(rig.tables[0][0, 3])]
        assert unwritten[:, 1:].isnan().all()
    rig.step(BatchSpec("chunk to the last slot", [384], [84]), rows=[0])
    torch.testing.assert_close(*rig.sums(0, 384), **SAME_SUMS)
    rig.step(BatchSpec("chunk", [415], [31]), rows=[0])
    for last in (416, 417):  # decoded tokens, the first of which ends a state
        rig.step(BatchSpec("decode", [last], [1]), rows=[0])
    torch.testing.assert_close(*rig.sums(0, 417 // STATE_ROWS * STATE_ROWS), **SAME_SUMS)


@pytest.mark.parametrize("host", HOSTS)
def test_rejected_drafts_leave_no_trace(make_rig: Any, host: Host):
    """The state that drafted tokens finished is written again once other tokens take their place."""
    torch.manual_seed(12)
    rig = make_rig(host, drafts=4)
    rig.prefill([125])
    rig.step(BatchSpec("drafts", [130], [5]), rows=[0])
    torch.testing.assert_close(*rig.sums(0, 128), **SAME_SUMS)
    rig.step(BatchSpec("others", [131], [5]), rows=[0])  # the first of them was accepted
    torch.testing.assert_close(*rig.sums(0, 128), **SAME_SUMS)


@pytest.mark.parametrize("host", HOSTS)
def test_blocks_of_a_prefix_are_shared(make_rig: Any, host: Host):
    """A request whose prompt begins like another's goes on from its blocks, and from its sums."""
    torch.manual_seed(13)
    rig = make_rig(host)
    rig.prefill([300])
    rig.tables[0][1, :2] = rig.tables[0][0, :2]
    before = rig.sums(0, 300)[0].clone()
    rig.step(BatchSpec("after a hit", [2 * BLOCK_SIZE + 70], [70]), rows=[1])
    torch.testing.assert_close(*rig.sums(1, 2 * BLOCK_SIZE + 70), **SAME_SUMS)
    assert torch.equal(rig.sums(0, 300)[0], before)
    step = rig.step(BatchSpec("decode", [301, 2 * BLOCK_SIZE + 71], [1, 1]))
    torch.testing.assert_close(step.output.float(), rig.sparse(step, rig.thetas(), rig.policy), **CLOSE)


@pytest.mark.parametrize("layout", BLOCK_COMPACT, ids=lambda layout: layout.name)
@pytest.mark.parametrize("host", HOSTS)
def test_states_lie_beside_the_cache_in_every_layout(make_rig: Any, host: Host, layout: KVCacheLayout):
    """Two layers, of which each rewrites blocks; K, V and sums of neither are disturbed by the other's."""
    torch.manual_seed(2)
    offered = host.backend.supported_kv_cache_layouts()
    if offered is not None and layout not in offered:
        pytest.skip(f"{host} reads {', '.join(each.name for each in offered)}")
    rig = make_rig(host, layers=2, layout=layout)
    whole = BatchSpec("prefill", [290, 100], [290, 100])
    for index in (0, 1, 0):
        other = 1 - index
        kept = [part.clone() for part in (*rig.stored(other), rig.states(other).value_sums.numbers())]
        rig.step(whole, index)
        now = (*rig.stored(other), rig.states(other).value_sums.numbers())
        for before, after in zip(kept, now, strict=True):
            torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    for index in (0, 1):
        for row, length in enumerate(whole.seq_lens):
            torch.testing.assert_close(*rig.sums(row, length, index), **SAME_SUMS)


@pytest.mark.parametrize("host", EVERY_HOST)
def test_layouts_without_whole_blocks_are_refused_by_vllm(
    make_rig: Any, monkeypatch: pytest.MonkeyPatch, host: Host
):
    """Sums and K are of different shapes, so vLLM wants the parts of a block together."""
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "BHLNC")
    with pytest.raises(ValueError, match=r"VLLM_KV_CACHE_LAYOUT=BHLNC .*valid layouts"):
        make_rig(host)


@pytest.mark.parametrize("host", HOSTS)
def test_models_with_windows_keep_sums_beside_full_attention(make_rig: Any, host: Host):
    """As Gemma 3: groups of layers lie over each other, block by block, so all of a block must lie together."""
    torch.manual_seed(14)
    rig = make_rig(host, layers=3, windows=(64, None, 64))
    assert rig.builders[1] not in (rig.builders[0], rig.builders[2])
    assert KVCacheLayout[rig.config.cache_config.kv_cache_layout].is_block_outermost
    # On GPUs vLLM fills new blocks then; on CPUs it doesn't reach those of windows, and the host does.
    assert rig.plan.needs_kv_cache_zeroing
    assert list(states_layers(rig.config)) == [f"{layer_name(1)}.toptheta_value_sums"]
    (group,) = [group for group in rig.plan.kv_cache_groups if layer_name(1) in group.layer_names]
    assert set(group.layer_names) == {layer_name(1), *states_layers(rig.config)}
    # All that lies in the blocks before are NaN, for what a layer left there may be no number to another.
    batch = BatchSpec("mixed", [290, 150, 40], [1, 1, 40])
    rig.write_contexts(batch)
    for index in range(3):
        step = rig.step(batch, index)
        assert step.output.isfinite().all()
        if index == 1:
            expected = rig.sparse(step, rig.thetas(index), rig.policy, index)
            torch.testing.assert_close(step.output[:2].float(), expected, **CLOSE)
    torch.testing.assert_close(*rig.sums(0, 290, 1), **SAME_SUMS)


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
@pytest.mark.parametrize("host", [EVERY_HOST[0], EVERY_HOST[2]])
def test_vllm_does_not_fill_each_new_block_for_the_states_sake(make_rig: Any, host: Host, dtype: str):
    """It would where caches are of several dtypes, in each step."""
    assert not make_rig(host, layers=2, kv_cache_dtype=dtype).plan.needs_kv_cache_zeroing


@pytest.mark.parametrize("host", EVERY_HOST)
def test_states_are_those_of_layers_that_may_skip_rows(make_rig: Any, host: Host):
    rig = make_rig(host, Table(dense_layers=(0,)), layers=2)
    assert rig.states(0) == LayerStates()
    assert rig.states(1).value_sums is not None
    assert rig.states(1).key_screen is None
    assert rig.bound(1).states == rig.states(1)
    for nothing in ({"table": None}, {"settings": {"compensation": "none"}}, {"windows": (64,)}):
        rig = make_rig(host, **nothing)
        assert states_layers(rig.config) == {}, nothing
    rig = make_rig(host, settings={"policy": "sift"})
    assert rig.states(0).value_sums is not None


@pytest.mark.parametrize("host", HOSTS)
def test_states_move_with_connectors_that_move_layers(
    make_rig: Any, monkeypatch: pytest.MonkeyPatch, host: Host
):
    """vLLM does it for attention layers: waits before one attends, and saves what it has written."""
    rig = make_rig(host)
    name, sums = f"{layer_name(0)}.toptheta_value_sums", rig.states().value_sums
    told: list[Any] = []

    def saved(name: str, kv_layer: torch.Tensor, metadata: Any) -> None:
        told.append((name, metadata))
        assert kv_layer is sums.kv_cache
        torch.testing.assert_close(*rig.sums(0, 70), **SAME_SUMS)

    def waited(name: str) -> None:
        told.append(name)
        assert sums.numbers().isnan().all()

    connector = SimpleNamespace(wait_for_layer_load=waited, save_kv_layer=saved)
    monkeypatch.setattr(connectors, "_moving", lambda: connector)
    context = SimpleNamespace(attn_metadata={name: "metadata"})
    monkeypatch.setattr(connectors, "get_forward_context", lambda: context)
    rig.prefill([70])
    assert told == [name, (name, "metadata")]


@pytest.mark.parametrize("host", EVERY_HOST)
def test_weights_that_are_loaded_again_change_nothing(make_rig: Any, host: Host):
    rig = make_rig(host, layers=2)
    before = states_layers(rig.config)
    assert len(before) == 2
    register(rig.config)
    for layer in rig.layers:
        layer.process_weights_after_loading(torch.bfloat16)
    after = states_layers(rig.config)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert rig.states(0).value_sums.kv_cache.numel() > 0


@pytest.mark.parametrize("host", EVERY_HOST)
def test_what_sums_cost_is_in_vllm_s_budget_and_in_the_log(
    make_rig: Any, host: Host, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO):
        rig = make_rig(host, Table(dense_layers=(0,)), layers=2)
    sums = NUM_KV_HEADS * BLOCK_SIZE // STATE_ROWS * HEAD_DIM * 4
    content = 2 * NUM_KV_HEADS * BLOCK_SIZE * 2 * HEAD_DIM * 2
    assert rig.plan.kv_cache_tensors[0].size == (content + sums) * rig.plan.num_blocks
    assert f"TOPTHETA: of the layers' cache: V sums {sums / (content + sums):.1%}\n" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        make_rig(host, settings={"compensation": "none"})
    assert "budget 64" in caplog.text
    assert "V sums" not in caplog.text


@pytest.mark.parametrize("host", EVERY_HOST)
def test_attention_layers_are_charged_for_nothing_but_k_and_v(host: Host):
    """vLLM sizes hybrid models' blocks from what one token takes of them."""
    spec = FullAttentionSpec(block_size=1, num_kv_heads=2, head_size=256, dtype=torch.bfloat16)
    assert host.backend.customize_spec(spec) == spec
    layer = SimpleNamespace(
        head_size_v=256,
        get_kv_cache_spec=lambda config: replace(spec, block_size=config.cache_config.block_size),
    )
    config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=64),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    assert ValueSums("sums", layer, config).get_kv_cache_spec(config).page_size_bytes == 2 * 256 * 4
