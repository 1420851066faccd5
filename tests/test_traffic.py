"""The traffic model against every load and store of an interpreted run."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from attention_cases import random_case
from device import interpreter_only
from screen_cases import with_screen
from traffic_model import traffic
from triton.runtime import interpreter

from topt_vllm.attention.common import (
    DecodeArguments,
    LargestBatch,
    Stat,
    choose_rows_per_state,
    new_statistics,
)
from topt_vllm.attention.triton import launch, launcher
from topt_vllm.attention.triton.launch import LaunchShape
from topt_vllm.attention.triton.workspace import cut, words_of
from topt_vllm.benchmarks.cases import Shape

pytestmark = pytest.mark.slow

LIMITS = launch.limits_of(torch.device("cpu"))


class Meter:
    """Counts bytes that the interpreter loads and stores, by tensor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tensors: dict[str, torch.Tensor]) -> None:
        self.bytes: Counter[str] = Counter()
        self.ranges = {
            name: (part.data_ptr(), part.data_ptr() + part.untyped_storage().nbytes() - _offset(part))
            for name, part in tensors.items()
        }
        builder = interpreter.InterpreterBuilder
        load, store = builder.create_masked_load, builder.create_masked_store

        def counted_load(this, pointers, mask, *rest):
            self.count(pointers, mask)
            return load(this, pointers, mask, *rest)

        def counted_store(this, pointers, value, mask, *rest):
            self.count(pointers, mask)
            return store(this, pointers, value, mask, *rest)

        monkeypatch.setattr(builder, "create_masked_load", counted_load)
        monkeypatch.setattr(builder, "create_masked_store", counted_store)

    def count(self, pointers: interpreter.TensorHandle, mask: interpreter.TensorHandle) -> None:
        addresses = pointers.data[mask.data.astype(bool)]
        item = pointers.get_element_ty().primitive_bitwidth // 8
        for name, (start, end) in self.ranges.items():
            self.bytes[name] += int(((addresses >= start) & (addresses < end)).sum()) * item


def _offset(part: torch.Tensor) -> int:
    return part.storage_offset() * part.element_size()


@interpreter_only
@pytest.mark.parametrize(("seq_len", "block_size"), [(300, 32), (256, 128), (300, 48)])
def test_model_is_what_the_kernel_moves(monkeypatch: pytest.MonkeyPatch, seq_len: int, block_size: int):
    monkeypatch.setattr(launch, "MIN_PROGRAM_TOKENS", 64)
    case = random_case(
        [(1, seq_len)] * 2, 6, 2, 80, block_size, keep=0.1, state_rows=choose_rows_per_state(block_size)
    )
    # Apart, so that addresses tell K from V; query and output too.
    key, value = case.cache.key.contiguous(), case.cache.value.contiguous()
    query, out = case.query.contiguous(), torch.empty_like(case.query)
    cache = type(case.cache)(key, value, case.cache.value_sums)
    statistics = new_statistics()
    batch = replace(case.batch, max_query_rows=1)
    device = torch.device("cpu")
    bound = launcher.allocate(LargestBatch(2, 1, 6, 2, 80, device), programs=3)
    lists = 2 * 3 * launch.choose(LaunchShape(1, 6, 2, 80, 2), LIMITS, 3).list_keys * (4 + 1)
    tensors = {"key": key, "value": value, "sums": cache.value_sums, "partials": bound.memory[lists:]}
    meter = Meter(monkeypatch, {**tensors, "query": query, "out": out})
    step = case.thetas, case.selection, case.scale, case.softcap
    bound.decode(DecodeArguments(query, cache, batch, *step, out, statistics))
    shape = Shape((seq_len,) * 2, 6, 2, 80, block_size, torch.bfloat16)
    rows = int(statistics[0, Stat.V_ROWS_READ])
    expected = traffic(shape, rows, LIMITS, programs=3)
    assert 0 < rows < statistics[0, Stat.V_ROWS]
    assert meter.bytes["key"] == expected.key
    assert meter.bytes["value"] + meter.bytes["sums"] == expected.value + expected.sums + expected.again
    assert meter.bytes["sums"] == 3 * expected.sums
    assert meter.bytes["partials"] == expected.partials
    assert meter.bytes["query"] + meter.bytes["out"] == expected.rows


@interpreter_only
def test_model_is_what_the_kernel_moves_with_a_screen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "MIN_PROGRAM_TOKENS", 64)
    case = with_screen(random_case([(1, 300)] * 2, 6, 2, 80, keep=0.05), "triton")
    screen = case.cache.key_screen
    assert screen is not None
    key, query, out = case.cache.key.contiguous(), case.query.contiguous(), torch.empty_like(case.query)
    cache, statistics = replace(case.cache, key=key), new_statistics()
    bound = launcher.allocate(LargestBatch(2, 1, 6, 2, 80, torch.device("cpu")), programs=3)
    chosen = launch.choose(LaunchShape(1, 6, 2, 80, 2, screened=True), LIMITS, 3)
    parts = cut(bound.memory, words_of(chosen, 2, 6, 2, 80, 80))
    tensors = {"key": key, "codes": screen.codes, "query": query, "out": out}
    # The last but one part of the workspace; behind it are the coefficients.
    meter = Meter(monkeypatch, tensors | {"queries": parts["query_codes"]})
    batch, step = (
        replace(case.batch, max_query_rows=1),
        (case.thetas, case.selection, case.scale, case.softcap),
    )
    bound.decode(DecodeArguments(query, cache, batch, *step, out, statistics))
    shape = Shape((300,) * 2, 6, 2, 80, 32, torch.bfloat16)
    counted = statistics[0].int().tolist()
    rows, candidates = counted[Stat.V_ROWS_READ], counted[Stat.K_ROWS_READ]
    expected = traffic(shape, rows, LIMITS, programs=3, k_rows_read=candidates)
    assert rows < candidates < counted[Stat.V_ROWS]
    assert meter.bytes["key"] == expected.key
    assert meter.bytes["codes"] == expected.codes
    assert sum(meter.bytes[name] for name in ("query", "out", "queries")) == expected.rows
