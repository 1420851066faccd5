"""Thresholds that change while an engine runs, on every host: with the traffic, or by request."""

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from adapter_cases import (
    CLOSE,
    DECODE,
    EVERY_HOST,
    FLASH,
    GPU_HOSTS,
    HOSTS,
    NOBODYS,
    NUM_HEADS,
    BatchSpec,
    Host,
    Table,
    vllm_config,
)
from adapter_engine import make_rig
from vllm.v1.attention.backend import AttentionCGSupport

from topt_vllm.adaptation import ROWS
from topt_vllm.attention.common import Stat
from topt_vllm.backend import requests, thresholds
from topt_vllm.backend.metrics import recorder

__all__ = ["make_rig", "vllm_config"]

ADAPT = {"adapt": True}


@pytest.mark.parametrize("host", HOSTS)
def test_thresholds_follow_the_traffic(make_rig: Any, host: Host):
    """Too many keys are kept at first, so that θ rises with the step after the last row, and fewer are."""
    torch.manual_seed(8)
    rig = make_rig(host, Table(theta=0.0, keys=[12, 12, 12, 200]), settings=ADAPT)
    offsets = rig.builder._bound.group.thresholds._controller.offset
    batch = BatchSpec("decode", [240] * 8, [1] * 8)
    rig.write_contexts(batch)
    for _ in range(ROWS // 8):
        assert offsets.tolist() == [[0.0] * NUM_HEADS]
        rig.step(batch)
    before = rig.statistics()[Stat.KEPT_ELEMENTS]
    step = rig.step(batch)
    # Half of 240 random scores are positive; the last head is asked for half of them too, not for 200.
    assert (offsets[0, :3] > 0.1).all()
    assert abs(float(offsets[0, 3])) < 0.05
    torch.testing.assert_close(rig.thetas().theta[:, 0], offsets[0])
    torch.testing.assert_close(step.output.float(), rig.sparse(step, rig.thetas(), rig.selection), **CLOSE)
    assert rig.statistics()[Stat.KEPT_ELEMENTS] - before < before / (ROWS // 8)


@pytest.mark.gpu
@pytest.mark.parametrize("host", GPU_HOSTS, ids=str)
def test_rows_of_nobody_move_no_thresholds(make_rig: Any, host: Host):
    """And what the last step's rows reached is not lost for them."""
    offsets = []
    for between in ([], [NOBODYS, NOBODYS]):
        torch.manual_seed(8)
        rig = make_rig(host, Table(theta=0.0, keys=12), settings=ADAPT)
        batch = BatchSpec("decode", [240] * 8, [1] * 8)
        rig.write_contexts(batch)
        thresholds = rig.builder._bound.group.thresholds
        for _ in range(ROWS // 8):
            rig.builder.build(0, rig.common(batch))
            thresholds._reached[0, :8] = 120
            for nobodys in between:
                rig.builder.build(0, rig.common(nobodys))
                thresholds._reached[0, :2] = 1
        rig.builder.build(0, rig.common(batch))
        offsets.append(thresholds._controller.offset.clone())
    assert (offsets[0] > 0.1).all()
    assert torch.equal(*offsets)


@pytest.mark.parametrize("host", EVERY_HOST)
def test_a_rank_adapts_its_own_heads(make_rig: Any, host: Host):
    rig = make_rig(host, Table(theta=0.0, keys=[10, 20, 30, 40]), settings=ADAPT, rank=(1, 2))
    thresholds = rig.builder._bound.group.thresholds
    counted = torch.tensor([[30, 80]]).expand(1, ROWS, 2).to(host.device)
    thresholds._controller.count(counted, torch.full((ROWS,), 1000, device=host.device))
    assert thresholds._controller.offset[0, 0] == 0
    assert thresholds._controller.offset[0, 1] > 0


@pytest.mark.parametrize("host", EVERY_HOST)
def test_layers_without_thresholds_do_not_adapt(make_rig: Any, host: Host):
    rig = make_rig(host, Table(dense_layers=(0,)), layers=3, settings=ADAPT)
    assert rig.thetas(0) is None
    assert rig.builder._bound.group.thresholds._controller.offset.shape == (2, NUM_HEADS)
    assert rig.bound(0).group.thresholds.reached(0, 1) is None
    counters = rig.bound(2).group.thresholds.reached(2, 3)
    assert counters.shape == (3, NUM_HEADS)
    assert not counters.any()


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says whose the rows of the next batch are, as TOPTHETA's worker knows it from vLLM's first model runner."""
    runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=[]))
    monkeypatch.setattr(requests, "_runner", runner)

    def named(*names: str) -> None:
        runner.input_batch.req_ids = list(names)

    return named


SIFT = {"policy": "sift", "sift_tau": 0.9, "sift_warmup": 2}


@pytest.mark.parametrize("host", HOSTS)
def test_sift_finds_thresholds_by_request(make_rig: Any, named: Any, host: Host):
    """Dense while warming up, sparse afterwards; a request keeps its thresholds in another place of the batch."""
    torch.manual_seed(9)
    rig = make_rig(host, settings=SIFT)
    named("a", "b", "c", "d")
    batch = BatchSpec("decode", [400] * 4, [1] * 4)
    rig.write_contexts(batch)
    dense = recorder().totals().get("dense_rows:sift_warmup", 0)
    for _ in range(2):
        step = rig.step(batch)
        assert step.metadata.thresholds.warm.all()
        torch.testing.assert_close(step.output.float(), rig.dense(step), **CLOSE)
    assert recorder().totals()["dense_rows:sift_warmup"] - dense == 8
    before = rig.statistics()
    assert before[Stat.KEPT_ELEMENTS] == before[Stat.ELEMENTS] > 0

    step = rig.step(batch)
    assert not step.metadata.thresholds.warm.any()
    kept, elements = (rig.statistics() - before)[[Stat.KEPT_ELEMENTS, Stat.ELEMENTS]]
    assert 0.05 < kept / elements < 0.25  # a tenth, and the unfinished state
    thresholds = rig.bound().group.thresholds
    laws = thresholds.of_rows(0, step.metadata.thresholds, 4)
    torch.testing.assert_close(step.output.float(), rig.sparse(step, laws, rig.selection), **CLOSE)
    named("d", "e", "a", "b")
    requests.ended(["c"])
    step = rig.step(batch)
    assert step.metadata.thresholds.warm.tolist() == [False, True, False, False]
    theta = thresholds.of_rows(0, step.metadata.thresholds, 4).theta
    assert torch.equal(theta[[0, 2, 3]], laws.theta[[3, 0, 1]])
    assert (theta[1] == -torch.inf).all()


@pytest.mark.gpu
def test_sift_is_told_of_a_step_through_pinned_memory(
    make_rig: Any, named: Any, monkeypatch: pytest.MonkeyPatch
):
    rig = make_rig(FLASH, settings=SIFT)
    named("a", "b", "c", "d")
    copied: list[torch.Tensor] = []
    copy = thresholds.async_tensor_h2d
    monkeypatch.setattr(
        thresholds, "async_tensor_h2d", lambda part, device: copied.append(part) or copy(part, device)
    )
    step = rig.builder.build(0, rig.common(DECODE)).thresholds
    parts = {name for name, part in vars(step).items() if isinstance(part, torch.Tensor)}
    assert len(copied) == len(parts - {"warm_contexts"}) == 7


@pytest.mark.parametrize("host", EVERY_HOST)
def test_sift_asks_either_of_vllm_s_runners_for_names(
    make_rig: Any, monkeypatch: pytest.MonkeyPatch, host: Host
):
    """The second one keeps requests in a table, and says which rows of it a batch has."""
    rig = make_rig(host, settings=SIFT)
    table = SimpleNamespace(index_to_req_id={3: "a", 5: "b", 7: "c"})
    monkeypatch.setattr(requests, "_runner", SimpleNamespace(req_states=table))
    common = rig.common(BatchSpec("decode", [40, 50], [1, 1]))
    warm = []
    for places in ([3, 5], [3, 5], [7, 3]):
        step = common.replace(req_idx=torch.tensor(places))
        warm.append(rig.builder.build(0, step).thresholds.warm.tolist())
    assert warm == [[True, True], [True, True], [True, False]]


@pytest.mark.parametrize("host", EVERY_HOST)
def test_batches_of_no_request_are_dense_and_leave_no_trace(
    make_rig: Any, named: Any, monkeypatch: pytest.MonkeyPatch, host: Host
):
    """vLLM's runners warm up with such, and idle ranks of data parallelism step with them beside the others."""
    rig = make_rig(host, settings=SIFT)
    laws = rig.builder._bound.group.thresholds._requests
    common = rig.common(BatchSpec("decode", [1, 1], [1, 1]))
    named("a")  # the last step's, and it is one more in the batch
    assert rig.builder.build(0, common).thresholds is None
    table = SimpleNamespace(index_to_req_id={1: "a"})
    monkeypatch.setattr(requests, "_runner", SimpleNamespace(req_states=table))
    # On GPUs an idle rank's batch names places, whoever has them.
    for known in ({1: "a"}, {0: "a", 1: "b"})[: 1 + host.on_gpus]:
        table.index_to_req_id = known
        assert rig.builder.build(0, common.replace(req_idx=np.arange(2))).thresholds is None
    assert len(laws._slots) == 0


@pytest.mark.parametrize("host", EVERY_HOST)
def test_sift_needs_a_worker_that_names_requests(make_rig: Any, monkeypatch: pytest.MonkeyPatch, host: Host):
    monkeypatch.setattr(requests, "_runner", None)
    rig = make_rig(host, settings=SIFT)
    with pytest.raises(RuntimeError, match="policy sift needs TOPTHETA's worker"):
        rig.step(BatchSpec("decode", [40], [1]))


@pytest.mark.parametrize("host", EVERY_HOST)
def test_graphs_are_never_declared_under_sift(make_rig: Any, host: Host):
    """Layers look at single rows while requests warm up, and a graph that is replayed runs no Python."""
    builder = make_rig(host, settings=SIFT).builder
    support = builder.get_cudagraph_support(builder.vllm_config, builder.kv_cache_spec)
    assert support == AttentionCGSupport.NEVER


@pytest.mark.parametrize("host", EVERY_HOST)
def test_extrapolation_is_logged_once_and_when_it_happens(
    make_rig: Any, host: Host, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    rig = make_rig(host, Table(longest=256))
    with caplog.at_level(logging.INFO):
        for seq_len, notices in ((256, 0), (257, 1), (300, 1)):
            rig.builder.build(0, rig.common(BatchSpec("decode", [seq_len, 20], [1, 1])))
            # A record may be seen by several handlers.
            found = {text for text in caplog.messages if "extrapolated by each head's fitted law" in text}
            assert len(found) == notices
    assert "257 tokens is longer than the table's 256" in found.pop()
