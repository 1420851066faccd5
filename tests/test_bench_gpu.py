"""The GPU benchmark on CPU tensors: Triton's interpreter, nothing captured, a clock that is made up."""

import ast
import importlib
import importlib.util
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from device import interpreter_only

from topt_vllm.attention.common import Selection
from topt_vllm.benchmarks import autotune, cuda, rivals
from topt_vllm.benchmarks.cases import Inputs, Shape, thetas_for
from topt_vllm.benchmarks.compile import CHIPS
from topt_vllm.benchmarks.decode import bench_case
from topt_vllm.benchmarks.device_cases import device_inputs
from topt_vllm.benchmarks.devices import Gpu
from topt_vllm.benchmarks.kernels import our_kernel
from topt_vllm.benchmarks.timing import Call, Variant
from topt_vllm.cli import bench_decode
from topt_vllm.cli.main import main

pytestmark = [pytest.mark.slow, interpreter_only]

CPU = torch.device("cpu")
SHAPE = Shape((300, 300), 4, 2, 32, 64, torch.bfloat16)


def fake_gpu(**changes: Any) -> Gpu:
    """Runs on the CPU; a call takes 1 ms, and the next of all a hundredth more."""
    counts = itertools.count(100)

    def measure(call: Call) -> float:
        call()
        return next(counts) * 1e-5

    return replace(Gpu(CPU, lambda call: call, measure, stream_bytes=1 << 16), **changes)


def dense_rival(name: str, inputs: Inputs) -> Variant:
    """Our kernel with every row read, in a rival's place."""
    return replace(
        our_kernel(name, fake_gpu().implementation(inputs), [inputs], [None], Selection()), name=name
    )


def vllm_arguments(file: str, function: str) -> tuple[set[str], set[str]]:
    """Names of arguments without and with a default, from vLLM's source: FlashAttention's needs a GPU to import."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    found = next(
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function
    ).args
    names = [each.arg for each in found.args]
    first_optional = len(names) - len(found.defaults)
    return set(names[:first_optional]), set(names[first_optional:])


@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_inputs_lie_as_in_vllms_cache_and_sums_are_those_of_the_contexts(block_size: int):
    inputs = device_inputs(replace(SHAPE, block_size=block_size), CPU)
    key, value = inputs.cache.key, inputs.cache.value
    assert inputs.memory.shape == (key.shape[0], block_size, SHAPE.kv_heads, 2 * SHAPE.head_dim)
    slots = torch.cat([key, value], dim=3).transpose(1, 2)
    assert torch.equal(slots, inputs.memory)
    assert value.untyped_storage().data_ptr() == key.untyped_storage().data_ptr()
    assert inputs.cache.value_sums is not None
    rows = inputs.cache.rows_per_state
    assert rows == min(block_size, 64)
    for sequence in range(2):
        blocks = inputs.batch.block_table[sequence].long()
        states = inputs.cache.value_sums[blocks].transpose(1, 2).flatten(0, 1)[: 300 // rows]
        values = value[blocks].transpose(1, 2).flatten(0, 1)[: 300 // rows * rows].double()
        expected = values.unflatten(0, (-1, rows)).sum(dim=1).cumsum(dim=0).float()
        torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-4)


def test_the_best_rival_is_the_platform_and_all_are_named(monkeypatch: pytest.MonkeyPatch):
    left_out = {"absent": "ImportError: not here"}

    def two(layers: list[Inputs]) -> tuple[list[Variant], dict[str, str]]:
        return [dense_rival("first", layers[0]), dense_rival("second", layers[0])], left_out

    monkeypatch.setattr("topt_vllm.benchmarks.devices.rivals", two)
    records = bench_case(SHAPE, [1.0, 0.1], Selection(), 0, device=fake_gpu())
    for record in records:
        assert record["platform"] == "first"
        assert set(record["rivals"]) == {"first", "second"}
        assert record["rivals"]["second"] > record["rivals"]["first"] == record["ms_platform"]
        assert record["left_out"] == left_out
        assert record["streaming_gbps"] > 0
    assert records[0]["v_rows_read"] == 1
    assert 0.05 < records[1]["v_rows_read"] < 0.3
    json.dumps(records)


def test_what_is_captured_is_what_is_checked_and_timed():
    graphs: list[Call] = []

    def capture(call: Call) -> Call:
        def broken() -> None:
            pass

        call()
        graphs.append(broken)
        return broken

    with pytest.raises(RuntimeError, match=r"every row: error nan .*not timed"):
        bench_case(SHAPE, [1.0], Selection(), 0, device=fake_gpu(capture=capture, measure=pytest.fail))
    assert len(graphs) == 1


def test_rivals_that_are_not_here_are_left_out_with_the_reason():
    found, left_out = rivals.rivals([device_inputs(SHAPE, CPU)])
    assert not found
    assert set(left_out) == {"FlashAttention", "FlashInfer", "Triton"}
    assert all(left_out.values())


def test_flashinfer_plans_with_the_blocks_of_each_sequence():
    inputs = device_inputs(replace(SHAPE, lengths=(300, 64, 1)), CPU)
    plan, table = rivals.plan_arguments(inputs), inputs.batch.block_table
    assert plan["indptr_cpu"].tolist() == [0, 5, 6, 7]
    assert plan["indptr_cpu"].dtype == torch.int32
    assert plan["last_page_len_cpu"].tolist() == [44, 64, 1]
    assert plan["indices"].tolist() == [*table[0].tolist(), table[1, 0], table[2, 0]]


def stand_in_vllm(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    """A module of vLLM's that needs a GPU to import."""
    package, _, last = name.rpartition(".")
    module = ModuleType(name)
    for attribute, value in attributes.items():
        setattr(module, attribute, value)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(importlib.import_module(package), last, module, raising=False)


@pytest.mark.parametrize("version", [2, 3])
def test_flash_attention_is_scheduled_before_it_is_called(monkeypatch: pytest.MonkeyPatch, version: int):
    pytest.importorskip("vllm")
    given: list[dict[str, Any]] = []
    stand_in_vllm(
        monkeypatch,
        "vllm.v1.attention.backends.fa_utils",
        get_flash_attn_version=lambda **_: version,
        uses_fa4_hd256_kernel=lambda *_: False,
        get_scheduler_metadata=lambda **arguments: ("schedule", arguments["num_splits"]),
        flash_attn_varlen_func=lambda **arguments: given.append(arguments),
    )
    found, left_out = rivals.rivals([device_inputs(SHAPE, CPU)])
    assert [variant.name for variant in found] == ["FlashAttention"]
    assert "FlashAttention" not in left_out
    # vLLM's bound in graphs, with a schedule of FlashAttention 3's alone.
    expected = (("schedule", 32), 32) if version == 3 else (None, 0)
    assert (given[0]["scheduler_metadata"], given[0]["num_splits"]) == expected
    assert given[0]["fa_version"] == version


def test_flashinfer_is_planned_once_and_run_often(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE", "64")
    told: list[str] = []

    class Wrapper:
        def __init__(self, workspace: torch.Tensor, layout: str, **_: Any) -> None:
            told.append(f"made {layout}")

        def run(
            self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, ...], out: torch.Tensor, **_: Any
        ) -> None:
            assert [part.shape for part in paged_kv_cache] == [(10, 64, 2, 32)] * 2
            told.append("run")

    stand_in_vllm(
        monkeypatch,
        "vllm.v1.attention.backends.flashinfer",
        BatchDecodeWithPagedKVCacheWrapper=Wrapper,
        fast_plan_decode=lambda *_, **__: told.append("planned"),
    )
    found, _ = rivals.rivals([device_inputs(SHAPE, CPU)])
    next(variant for variant in found if variant.name == "FlashInfer").call()
    assert told == ["made NHD", "planned", "run", "run"]
    _, left_out = rivals.rivals([device_inputs(replace(SHAPE, block_size=128), CPU)])
    assert left_out["FlashInfer"].endswith("not of 128")


def test_blocks_on_a_gpu_are_those_of_the_backend():
    backend = pytest.importorskip("topt_vllm.backend.hosts.gpu")
    assert bench_decode._BLOCK_SIZE["cuda"] == backend.PREFERRED_BLOCK_SIZE


def test_caches_are_made_cold_by_reading(monkeypatch: pytest.MonkeyPatch):
    """On a stand-in for CUDA: what lies before the first event writes one number."""
    told: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            told.append("event")

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Event") -> float:
            return 2.0

    real = torch.sum

    def read(*given: Any, **options: Any) -> torch.Tensor:
        told.append((given[0].nbytes, options["out"].numel()))
        return real(*given, **options)

    monkeypatch.setattr(
        cuda.torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=1000)
    )
    monkeypatch.setattr(cuda.torch.cuda, "Event", Event)
    monkeypatch.setattr(cuda.torch, "sum", read)
    assert cuda._EventTimer(CPU)(lambda: told.append("call")) == 2e-3
    assert told == [(4000, 1), "event", "call", "event"]


def test_ragged_batches_on_the_gpu_layout():
    ragged = replace(SHAPE, lengths=(300, 40))
    full, sparse = bench_case(ragged, [1.0, 0.2], Selection(), 0, device=fake_gpu())
    assert (full["lengths"], full["seq_len"]) == ("1x300+1x40", 300)
    assert sparse["v_rows_read"] < 0.5


def test_rivals_get_arguments_that_vllms_kernels_take():
    inputs = device_inputs(SHAPE, CPU)
    flash = rivals.flash_arguments(inputs, inputs.query, 3, torch.zeros(9, dtype=torch.int32), 32)
    triton = rivals.triton_arguments(inputs, inputs.query)
    schedule = rivals.schedule_arguments(inputs, 32)
    plan = {"self": None, **rivals.plan_arguments(inputs)}
    for file, function, given in (
        ("vllm_flash_attn/flash_attn_interface.py", "flash_attn_varlen_func", flash),
        ("vllm_flash_attn/flash_attn_interface.py", "get_scheduler_metadata", schedule),
        ("v1/attention/backends/flashinfer.py", "fast_plan_decode", plan),
        ("v1/attention/ops/triton_unified_attention.py", "unified_attention", triton),
    ):
        required, optional = vllm_arguments(file, function)
        assert required <= set(given) <= required | optional
    assert flash["k"].shape == flash["v"].shape == (10, 64, 2, 32)
    assert triton["softmax_segm_output"].shape == (64, 4, 16, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["decode", "--device", "cuda"], "--device cuda needs a GPU that torch sees: "),
        (["autotune"], "--device cuda needs a GPU that torch sees: "),
        (["decode", "--k-screen-margin", "3"], "--k-screen-margin is that of a K screen"),
        (["decode", "--k-screen", "int4+4", "--k-screen-margin", "-1"], "at least 0 and below 100, or hard"),
        (["decode", "--device", "cuda", "--dtype", "float32"], "bfloat16 and float16"),
    ],
)
def test_without_a_gpu_the_command_says_so(
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(cuda.torch.cuda, "is_available", lambda: False)
    assert main(["bench", *options]) == 2
    assert message in capsys.readouterr().err


def test_the_shape_is_what_the_record_says():
    record = bench_case(SHAPE, [1.0], Selection(), 0, device=fake_gpu())[0]
    for name in ("batch", "heads", "kv_heads", "head_dim", "block_size"):
        assert record[name] == getattr(SHAPE, name)
    assert (record["seq_len"], record["lengths"]) == (300, "2x300")
    assert record["platform"] is None
    assert record["ms_platform"] is None


def test_autotune_times_what_compiles_well_and_names_the_fastest():
    inputs, selection = device_inputs(replace(SHAPE, lengths=(100, 100), head_dim=128), CPU), Selection()
    seconds = itertools.chain([9.0] * 20, itertools.repeat(3.0))

    def used(call: Any) -> dict[str, int]:
        return {"registers": 100, "shared_bytes": 1 << 10, "spills": 8 * (call.arguments["TILE"] == 128)}

    def choose(chosen: Any) -> list[Any]:
        assert autotune.candidates(chosen)[0] == chosen
        return [chosen, replace(chosen, tile=128), replace(chosen, tile=32, programs=2)]

    gpu = fake_gpu(measure=lambda _: next(seconds))
    thetas = thetas_for(inputs, 0.3, selection)
    records = autotune.tune(inputs, thetas, selection, gpu, CHIPS["sm_90"], used, choose)
    assert [(r["tile"], r["programs"], r["ms"]) for r in records] == [
        (64, 1, 9e3),
        (32, 2, 3e3),
        (128, 1, None),
    ]
    assert records[2]["left_out"].startswith("spills 8")


def test_code_that_fits_no_block_is_left_out():
    used = {"registers": 100, "shared_bytes": 1 << 20, "spills": 0}
    assert "no block fits" in (autotune.why_not(used, 4, CHIPS["gfx942"]) or "")
