"""K screens in the adapter: which layers have one, what the operator is given, where codes lie, what is counted."""

import logging
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from adapter_cases import (
    BLOCK_SIZE,
    CLOSE,
    CPU,
    FLASH,
    HEAD_DIM,
    NUM_HEADS,
    NUM_KV_HEADS,
    PROMPTS,
    STATE_ROWS,
    TRITON,
    BatchSpec,
    Host,
    Table,
    vllm_config,
)
from adapter_engine import make_rig
from adapter_rig import Rig, Step

from topt_vllm.attention import reference
from topt_vllm.attention.common import DecodeArguments, Stat
from topt_vllm.attention.screen import rotation_signs
from topt_vllm.backend.warm_up import WarmUp

ON_CPUS = pytest.mark.skipif(CPU.backend is None, reason="vLLM's build here has no CPU kernels")

__all__ = ["make_rig", "vllm_config"]

ON_GPUS = [pytest.mark.gpu, pytest.mark.slow]
SCREENS = [
    pytest.param(CPU, "reference", "int4", marks=ON_CPUS),
    pytest.param(CPU, "reference", "int4+4", marks=ON_CPUS),
    pytest.param(CPU, "cpu", "int4+4", marks=ON_CPUS),
    pytest.param(FLASH, "triton", "int4", marks=ON_GPUS),
    pytest.param(TRITON, "triton", "int4", marks=ON_GPUS),
]
STORED = SCREENS[2:]
THETA = Table(theta=2.0)
DECODE = BatchSpec("decode", [420, 300], [1, 1])


def settings_of(implementation: str, screen: str, **others: Any) -> dict[str, Any]:
    return {"implementation": implementation, "k_screen": screen} | others


@pytest.mark.usefixtures("screens_anywhere")
@pytest.mark.parametrize(("host", "implementation", "screen"), SCREENS)
@pytest.mark.parametrize("compensation", ["none", "vmean"])
def test_a_screened_step_reads_less_of_k_and_keeps_the_rows(
    make_rig: Any, host: Host, implementation: str, screen: str, compensation: str
):
    counts = []
    for each in ("off", screen):
        torch.manual_seed(5)
        rig = make_rig(host, THETA, settings=settings_of(implementation, each, compensation=compensation))
        rig.write_contexts(DECODE)
        assert_as_the_reference(rig, rig.step(DECODE))
        counts.append(rig.statistics())
    plain, screened = counts
    rows = plain[Stat.V_ROWS]
    assert plain[Stat.K_ROWS_READ] == plain[Stat.CANDIDATES] == screened[Stat.V_ROWS] == rows
    assert screened[Stat.V_ROWS_READ] <= screened[Stat.CANDIDATES] < 0.5 * rows
    assert screened[Stat.K_ROWS_READ] == (screened[Stat.CANDIDATES] if screen == "int4" else 0)
    assert abs(screened[Stat.V_ROWS_READ] - plain[Stat.V_ROWS_READ]) < 0.01 * rows


def assert_as_the_reference(rig: Rig, step: Step) -> None:
    """That decode rows are the reference operator's, which works codes and sums out anew from K and V."""
    found = step.output[: step.metadata.num_decode_rows].float()
    torch.testing.assert_close(found, rig.sparse(step, rig.thetas(), rig.selection), **CLOSE)


@pytest.mark.usefixtures("screens_anywhere")
@pytest.mark.parametrize(("host", "implementation", "screen"), STORED)
def test_codes_follow_the_cache(make_rig: Any, host: Host, implementation: str, screen: str):
    """Chunks of a prompt, blocks that are used again, drafts that are rejected, and blocks of another's prefix."""
    torch.manual_seed(12)
    settings = settings_of(implementation, screen, compensation="none")
    rig = make_rig(host, THETA, drafts=4, settings=settings)
    for _ in range(2):
        rig.step(BatchSpec("chunk", [130], [130]), rows=[0])
        rig.step(BatchSpec("the rest", [210], [80]), rows=[0])
        assert_as_the_reference(rig, rig.step(BatchSpec("drafts", [215], [5]), rows=[0]))
        # The first of them was accepted.
        assert_as_the_reference(rig, rig.step(BatchSpec("others", [216], [5]), rows=[0]))
    rig.tables[0][1, :2] = rig.tables[0][0, :2]
    rig.step(BatchSpec("after a hit", [2 * BLOCK_SIZE + 70], [70]), rows=[1])
    assert_as_the_reference(rig, rig.step(BatchSpec("decode", [217, 2 * BLOCK_SIZE + 71], [1, 1])))
    assert 0 < rig.statistics()[Stat.CANDIDATES] < 0.6 * rig.statistics()[Stat.V_ROWS]


@ON_CPUS
def test_short_contexts_have_no_screen(make_rig: Any):
    """On CPUs, where reading K of a thousand keys is as fast."""
    rig = make_rig(CPU, THETA, settings=settings_of("cpu", "int4+4"))
    rig.write_contexts(DECODE)
    assert_as_the_reference(rig, rig.step(DECODE))
    assert rig.statistics()[Stat.K_ROWS_READ] == rig.statistics()[Stat.V_ROWS]


@ON_CPUS
def test_the_operator_is_given_format_margin_and_transform_once(make_rig: Any):
    settings = settings_of("reference", "int4+4", k_screen_margin="hard")
    rig = make_rig(CPU, layers=2, settings=settings)
    rig.write_contexts(DECODE)
    rig.step(DECODE)
    screen = rig.bound().cache.key_screen
    assert (screen.format, screen.margin) == ("int4+4", None)
    assert screen.transform.mean.tolist() == [[0.0] * HEAD_DIM] * NUM_KV_HEADS
    assert screen.transform.signs.equal(rotation_signs(0, HEAD_DIM))
    rig.step(DECODE)
    assert rig.bound().cache.key_screen is screen


@ON_CPUS
@pytest.mark.parametrize(("rank", "heads"), [((0, 2), [0]), ((1, 2), [1]), ((1, 4), [0]), ((2, 4), [1])])
def test_a_rank_has_the_transform_of_its_kv_heads(
    make_rig: Any, monkeypatch: pytest.MonkeyPatch, rank: tuple[int, int], heads: list[int]
):
    """Also where several ranks hold the same KV head."""
    means = torch.arange(NUM_KV_HEADS * HEAD_DIM).float().view(NUM_KV_HEADS, HEAD_DIM)
    monkeypatch.setattr(
        "topt_vllm.table.schema.KeyStatistics.transforms",
        lambda self: {entry.layer: with_means(means, HEAD_DIM) for entry in self.layers},
    )
    rig = make_rig(CPU, rank=rank, settings=settings_of("reference", "int4"))
    assert rig.bound().key_screen.transform.mean.equal(means[heads])


def with_means(means: torch.Tensor, head_dim: int) -> Any:
    from topt_vllm.attention.screen import ScreenTransform

    return ScreenTransform(means, torch.ones_like(means), rotation_signs(0, head_dim))


@ON_CPUS
def test_layers_that_do_not_gain_have_none(make_rig: Any):
    """Dense layers, windows, and those in which most keys would pass."""
    table = Table(theta=2.0, dense_layers=(0,), candidates=[0.0, 0.9, 0.1])
    rig = make_rig(CPU, table, layers=3, settings={"k_screen": "int4+4"})
    assert [rig.bound(index).key_screen is not None for index in range(3)] == [False, False, True]
    assert [rig.states(index).key_screen is not None for index in range(3)] == [False, False, True]
    rig = make_rig(CPU, table, layers=3, windows=(None, None, 64), settings={"k_screen": "int4+4"})
    assert rig.bound(2) is None
    assert all(rig.states(index).key_screen is None for index in range(3))


@ON_CPUS
def test_codes_that_are_not_stored_take_nothing_of_the_cache(make_rig: Any):
    rig = make_rig(CPU, settings=settings_of("reference", "int4"))
    assert rig.states().key_screen is None
    assert rig.bound().key_screen.codes.numel() == 0


@ON_CPUS
def test_a_screen_alone_is_finished_too(make_rig: Any, monkeypatch: pytest.MonkeyPatch):
    """In every forward that wrote rows: prompts in chunks, mixed steps and decoding."""
    finished: list[tuple[bool, list[int]]] = []
    finish = reference.finish

    def spy(cache: Any, batch: Any) -> None:
        finished.append((cache.key_screen is not None, batch.seq_lens.tolist()))
        finish(cache, batch)

    monkeypatch.setattr(reference, "finish", spy)
    rig = make_rig(CPU, settings=settings_of("reference", "int4", compensation="none"))
    rig.step(BatchSpec("chunk", [130], [130]))
    rig.step(BatchSpec("mixed", [131, 40], [1, 40]))
    rig.step(BatchSpec("decode", [132, 41], [1, 1]))
    assert finished == [(True, [130]), (True, [131, 40]), (True, [132, 41])]


@ON_CPUS
def test_what_a_screen_costs_is_in_vllm_s_budget_and_in_the_log(
    make_rig: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    content = NUM_KV_HEADS * BLOCK_SIZE * 2 * HEAD_DIM * 2
    sums = NUM_KV_HEADS * BLOCK_SIZE // STATE_ROWS * HEAD_DIM * 4
    with caplog.at_level(logging.INFO):
        rig = make_rig(CPU, settings={"k_screen": "int4+4"})
    block = rig.plan.kv_cache_tensors[0].size // rig.plan.num_blocks
    codes = rig.states().key_screen.codes()
    assert codes.shape[:2] == (rig.plan.num_blocks, NUM_KV_HEADS)
    assert codes.dtype == torch.uint8
    assert codes[0].numel() <= block - content - sums < codes[0].numel() + NUM_KV_HEADS * BLOCK_SIZE * 2
    shares = f"V sums {sums / block:.1%}, copies of K {(block - content - sums) / block:.1%}"
    assert f"TOPTHETA: of the layers' cache: {shares}\n" in caplog.text
    assert "K screen int4+4 with margin 2.5" in caplog.text


@ON_CPUS
@pytest.mark.parametrize("compensation", ["none", "vmean"])
def test_each_kind_of_layer_is_warmed_up(make_rig: Any, monkeypatch: pytest.MonkeyPatch, compensation: str):
    """Sparse or not, screened or not, beside sinks or not, kernels differ; layers of a kind don't."""
    settings = settings_of("reference", "int4", compensation=compensation)
    rig = make_rig(CPU, Table(dense_layers=(0,)), layers=3, settings=settings)
    rig.write_contexts(DECODE)
    rig.bound().group.warm_up = WarmUp(2, 1)
    ran: list[tuple[int, bool, bool, bool]] = []
    decode = reference.decode

    def seen(given: DecodeArguments) -> None:
        if not given.batch.seq_lens.any():
            kind = given.thetas is not None, given.cache.key_screen is not None, given.sinks is not None
            ran.append((len(given.batch.seq_lens), *kind))
        decode(given)

    monkeypatch.setattr(reference, "decode", seen)
    for index in range(3):
        rig.step(DECODE, index)
    rig.layers[2].impl.sinks = torch.zeros(NUM_HEADS)
    rig.step(DECODE, 2)
    rig.layers[2].impl.sinks = rig.bound(2).key_screen = rig.bound(2).cache = None
    rig.step(DECODE, 2)
    kinds = [(False, False, False), (True, True, False), (True, True, True), (True, False, False)]
    assert ran == [(sequences, *kind) for kind in kinds for sequences in (1, 2)]


@ON_CPUS
def test_a_prompt_warms_up_what_decodes_behind_it(make_rig: Any, monkeypatch: pytest.MonkeyPatch):
    """Without graphs vLLM may decode nothing when it starts; kernels would be compiled in a client's."""
    rig = make_rig(CPU, settings=settings_of("reference", "off"))
    rig.bound().group.warm_up = WarmUp(2, 1)
    decoded: list[int] = []
    monkeypatch.setattr(reference, "decode", lambda given: decoded.append(len(given.batch.seq_lens)))
    rig.step(PROMPTS, 0)
    assert decoded == [1, 2]
