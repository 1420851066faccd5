"""What is particular to the Triton kernels: programs, layouts, fp8, V sums, workspace.

The operator's semantics are in test_operator.py, over every implementation.
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from attention_cases import NAN, Case, finish, kept_sets, poison_unread_values, random_case
from device import DEVICE, triton_implementation

from topt_vllm.attention import api
from topt_vllm.attention.common import LargestBatch, PagedCache, Selection, Stat, Thetas, new_statistics
from topt_vllm.attention.triton import decode_kernel, launch, launcher, merge_kernel
from topt_vllm.attention.triton.calls import items_pad
from topt_vllm.attention.triton.launch import LaunchShape
from topt_vllm.backend.warm_up import WarmUp

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

RAGGED = [(1, 448), (1, 65), (0, 0), (3, 130)]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz]


def with_programs(count: int) -> Any:
    """The kernel with a fixed number of programs for each KV head."""
    return triton_implementation(
        partial(launcher.decode, programs=count), launcher.finish, launcher.screen_bytes
    )


@pytest.fixture
def short_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs may have a single tile, so that short contexts are really shared out."""
    monkeypatch.setattr(launch, "MIN_PROGRAM_TOKENS", 1)


@pytest.mark.usefixtures("short_programs")
@pytest.mark.parametrize(
    "selection", [Selection(), Selection(group_keep="head", compensation="none")], ids=["union", "head"]
)
def test_output_and_counters_do_not_depend_on_the_programs(selection: Selection):
    clean = random_case(RAGGED, 6, 2, dtype=torch.float32, selection=selection)
    case = poison_unread_values(clean)
    results = []
    for programs in (1, 2, 7):
        statistics = new_statistics()
        results.append((case.run(with_programs(programs), statistics), statistics))
    for out, statistics in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=1e-5, atol=1e-6)
        assert torch.equal(statistics[:, : Stat.DROPPED_MASS], results[0][1][:, : Stat.DROPPED_MASS])
        torch.testing.assert_close(statistics, results[0][1], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(results[0][0], clean.run("reference"), rtol=1e-5, atol=2e-6)
    again = case.run(with_programs(7))
    assert torch.equal(again[again.isfinite()], results[2][0][again.isfinite()])


@pytest.mark.usefixtures("short_programs")
def test_kept_set_does_not_depend_on_the_programs():
    """θ is absolute, so a program decides without the others. Read off V rows that are unit vectors."""
    selection = Selection(group_keep="head", compensation="none", recent_tokens=3)
    case = random_case([(1, 448)], 2, 1, dtype=torch.float32, selection=selection, keep=0.1)
    used = {programs: torch.zeros(2, 448, dtype=torch.bool) for programs in (1, 2, 7)}
    for start in range(0, 448, 64):
        value = torch.zeros_like(case.cache.value)
        for position in range(start, start + 64):
            block = case.batch.block_table[0, position // 32]
            value[block, :, position % 32, position - start] = 1
        window = replace(case, cache=replace(case.cache, value=value))
        for programs, found in used.items():
            found[:, start : start + 64] = window.run(with_programs(programs))[0] > 0
    ((kept, _),) = kept_sets(case)
    for programs, found in used.items():
        assert torch.equal(found, kept), programs


@pytest.mark.usefixtures("short_programs")
@pytest.mark.parametrize(("count", "longest"), [(1, 5000), (3, 5000), (17, 1500), (64, 300)])
def test_ragged_batches_are_shared_out_whatever_their_lengths(count: int, longest: int):
    """Few long sequences, many short ones, some of them padding, with the programs of a real GPU."""
    generator = torch.Generator().manual_seed(count)
    lengths = (torch.rand(count, generator=generator) ** 3 * longest).int() + 1
    contexts = [(0, 0) if i % 7 == 5 else (1, n) for i, n in enumerate(lengths.tolist())]
    case = random_case(contexts, 2, 1, 32, 16, torch.float32, keep=0.2, seed=count)
    counted, expected = new_statistics(), new_statistics()
    out = case.run(with_programs(33), counted)
    torch.testing.assert_close(out, case.run("reference", expected), rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(counted, expected, rtol=1e-6, atol=2e-5)


@pytest.mark.usefixtures("short_programs")
@pytest.mark.parametrize("programs", [1, 5])
def test_lists_shorter_than_a_program_s_share_are_filled_again(
    monkeypatch: pytest.MonkeyPatch, programs: int
):
    monkeypatch.setattr(launch, "_LIST_BYTES", 1)
    case = random_case([(1, 700), (2, 300)], 4, 2, dtype=torch.float32, keep=0.3)
    chosen = launch.choose(LaunchShape(1, 4, 2, 64, 4), launch.limits_of(torch.device("cpu")))
    assert chosen.list_keys == chosen.tile == 128
    out = case.run(with_programs(programs))
    torch.testing.assert_close(out, case.run("reference"), rtol=1e-5, atol=2e-6)


def test_rows_without_thresholds_read_v_in_order_and_drop_nothing():
    """Contexts below the table's first length, beside others: their mass is kept to the last bit."""
    case = random_case([(1, 300), (1, 290)], dtype=torch.float32)
    assert isinstance(case.thetas, Thetas)
    short = Thetas(torch.tensor([295], dtype=torch.int32), torch.full((4, 1), 9.0), torch.zeros(4, 2))
    mixed, dense = replace(case, thetas=short), replace(case, thetas=None)
    statistics = new_statistics()
    out = mixed.run(with_programs(3), statistics)
    torch.testing.assert_close(out[1], dense.run("reference")[1], rtol=1e-5, atol=1e-6)
    expected = new_statistics()
    mixed.run("reference", expected)
    assert statistics[0, Stat.V_ROWS_READ] == expected[0, Stat.V_ROWS_READ]
    alone = replace(mixed, thetas=replace(short, lengths=short.lengths + 100))
    statistics = new_statistics()
    alone.run(with_programs(3), statistics)
    assert statistics[0, Stat.DROPPED_MASS] == 0


def in_layout(cache: PagedCache, layout: str) -> PagedCache:
    """The same cache as vLLM's GPU backends store it: K and V of a slot side by side."""
    both = torch.cat([cache.key, cache.value], dim=-1)
    if layout == "NHD":
        both = both.transpose(1, 2).contiguous().transpose(1, 2)
    key, value = both.split(cache.key.shape[-1], dim=-1)
    return replace(cache, key=key, value=value)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_layouts_of_the_gpu_backends(layout: str, head_dim: int):
    case = random_case([(1, 100), (2, 70)], head_dim=head_dim, block_size=48)
    other = replace(case, cache=in_layout(case.cache, layout))
    assert torch.equal(other.run("triton"), case.run("triton"))


def quantised(case: Case, dtype: torch.dtype) -> Case:
    """The case with an fp8 cache and scales that are no powers of two; what is unused is NaN still."""
    scales = torch.tensor([0.037]), torch.tensor([0.021])
    key, value = (
        (part / scale).to(dtype)
        for part, scale in zip((case.cache.key, case.cache.value), scales, strict=True)
    )
    sums = torch.full_like(case.cache.value_sums, NAN)
    return replace(case, cache=PagedCache(key, value, sums, None, *scales))


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_fp8_cache(dtype: torch.dtype):
    """Only summation order separates the kernel from the reference: fp8 is decoded exactly."""
    case = quantised(random_case([(1, 200), (2, 66)], dtype=torch.float32, keep=0.2), dtype)
    # θ lies in gaps between scores of the unquantised keys, so here a few keys might differ; keep away from that.
    case = replace(case, thetas=replace(case.thetas, theta=case.thetas.theta.round(decimals=1) + 0.0137))
    finish(case.cache, case.batch.block_table, case.batch.seq_lens.tolist(), "triton")
    got, statistics = {}, {}
    for name in ("triton", "reference"):
        statistics[name] = new_statistics()
        got[name] = case.run(name, statistics[name])
    torch.testing.assert_close(got["triton"], got["reference"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics["triton"], statistics["reference"], rtol=1e-6, atol=1e-6)
    assert statistics["triton"][0, Stat.V_ROWS_READ] < statistics["triton"][0, Stat.V_ROWS]


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_every_fp8_number_is_decoded(dtype: torch.dtype):
    """V of one block holds all 256 numbers; its sum over rows is theirs, for each row holds one and zeros."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256)
    value = torch.zeros(1, 1, 16, 256, dtype=torch.uint8)
    value[:, :, :1] = codes
    cache = PagedCache(value.view(dtype), value.view(dtype), torch.zeros(1, 1, 1, 256))
    finish(cache, torch.zeros(1, 1, dtype=torch.int32), [16], "triton")
    assert torch.equal(cache.value_sums.nan_to_num(12345.0), codes.view(dtype).float().nan_to_num(12345.0))


def test_a_workspace_serves_smaller_batches_and_statistics_spread_over_slots():
    case = random_case([(1, 300), (2, 65)])
    bound = launcher.allocate(LargestBatch(4, 3, 4, 2, 64, DEVICE), programs=3)
    bound.memory.fill_(NAN)
    case = replace(case, batch=replace(case.batch, max_query_rows=2))
    spread, plain = launcher.new_statistics("cpu"), new_statistics()
    got = case.run(triton_implementation(bound.decode), spread)
    torch.testing.assert_close(got, case.run(with_programs(3), plain), rtol=0, atol=0)
    torch.testing.assert_close(spread.sum(dim=0), plain[0])
    assert int((spread[:, Stat.ROWS] > 0).sum()) == 3
    small = replace(bound, memory=bound.memory[:1000])
    with pytest.raises(RuntimeError, match=r"workspace: expected at least \d+ words for 3 rows .* got 1000"):
        case.run(triton_implementation(small.decode))


def test_padding_is_left_alone():
    """A padded sequence has no rows, or rows of length 0; its block table and output stay untouched."""
    case = random_case([(1, 100), (1, 50)])
    # The number of rows decides about tiles, and they about the order of sums.
    case = replace(case, batch=replace(case.batch, max_query_rows=1))
    batch = replace(
        case.batch,
        query_start_loc=torch.tensor([0, 1, 2, 3, 3], dtype=torch.int32),
        seq_lens=torch.tensor([100, 50, 0, 77], dtype=torch.int32),
        block_table=torch.cat([case.batch.block_table, torch.full_like(case.batch.block_table, 2**31 - 1)]),
    )
    padded = replace(case, query=torch.cat([case.query, case.query[:1]]), batch=batch)
    statistics = new_statistics()
    out = padded.run("triton", statistics)
    assert torch.equal(out[:2], case.run("triton"))
    assert out[2].isnan().all()
    assert statistics[0, Stat.ROWS] == 2


HOPPER = launch.GpuLimits(amd=False, multiprocessors=132, shared_bytes=228 << 10, block_bytes=227 << 10)


def test_programs_fill_the_device_once_whatever_the_batch():
    """264 at once on 132 multiprocessors, shared out over the KV heads."""
    assert launch.choose(LaunchShape(1, 32, 8, 128, 2), HOPPER).programs == 33
    assert launch.choose(LaunchShape(1, 8, 1, 128, 2), HOPPER).programs == 264
    assert launch.choose(LaunchShape(1, 1024, 512, 128, 2), HOPPER).programs == 1


@pytest.mark.parametrize(
    ("hip", "reported", "expected"),
    [
        (
            None,
            {"shared_memory_per_multiprocessor": 228 << 10, "shared_memory_per_block_optin": 227 << 10},
            launch.GpuLimits.of(90, 132, 228 << 10, 227 << 10),
        ),
        ("6.4", {"gcnArchName": "gfx942"}, launch.GpuLimits.of(None, 132, 64 << 10, 64 << 10)),
    ],
    ids=["cuda", "rocm"],
)
def test_a_gpu_is_asked_only_what_its_torch_knows(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, reported: dict[str, Any], expected: launch.GpuLimits
):
    """Torch for ROCm has no shared memory that a block may opt in to (torch/cuda/_utils.py)."""
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, **reported)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert launch.limits_of.__wrapped__(torch.device("cuda:0")) == expected


@pytest.mark.skipif(DEVICE.type != "cpu", reason="compiled kernels don't follow what tests set")
@pytest.mark.usefixtures("short_programs")
def test_batches_of_more_items_than_registers_hold_are_added_up_in_parts(monkeypatch: pytest.MonkeyPatch):
    case = random_case([*RAGGED, (1, 20), (2, 300)], 6, 2, dtype=torch.float32)
    whole = case.run(with_programs(7))
    for kernel in (decode_kernel, merge_kernel):
        monkeypatch.setattr(kernel, "MOST_ITEMS", triton.language.constexpr(4))
    assert torch.equal(case.run(with_programs(7)), whole)


def test_many_sequences_have_programs_of_two_warps():
    shapes = (LaunchShape(1, 32, 8, 128, 2, True, sequences, 64) for sequences in (3, 4))
    few, many = (launch.choose(shape, HOPPER) for shape in shapes)
    assert (few.num_warps, few.tile, few.programs) == (4, 128, 33)
    assert (many.num_warps, many.tile, many.programs) == (2, 64, 66)


@pytest.mark.parametrize("query_rows", [1, 8, 9, 20])
@pytest.mark.parametrize("most", [8, 100, 300, 1024, 4096])
@pytest.mark.parametrize("heads", [(32, 8), (64, 4)], ids=["groups of 4", "groups of 16"])
def test_warm_up_batches_have_the_kernels_of_every_other(heads: tuple[int, int], most: int, query_rows: int):
    """Which depend on the number of sequences, though not on each: a server's first ones compile them all."""

    def kernel(sequences: int, screened: bool) -> Any:
        shape = LaunchShape(query_rows, *heads, 128, 2, screened, sequences, 64)
        chosen = launch.choose(shape, HOPPER)
        return chosen, items_pad(sequences * chosen.chunks(query_rows))

    for screened in (False, True):
        warm = [kernel(sequences, screened) for sequences in WarmUp(most, query_rows).sequences]
        assert all(kernel(sequences, screened) in warm for sequences in range(1, most + 1))


def test_lists_do_not_grow_with_batch_or_context():
    words = [
        launcher.allocate(LargestBatch(sequences, 1, 32, 8, 128, torch.device("meta"))).memory.numel()
        for sequences in (1024, 2047)
    ]
    partials, queries = 1023 * 8 * 4 * (128 + 4), 1023 * 32 * (128 // 4 + 5)
    assert words[1] - words[0] == partials + queries


def test_drafted_rows_share_tiles_of_16_columns():
    chosen = launch.choose(LaunchShape(8, 32, 8, 128, 2), HOPPER)
    assert (chosen.rows, chosen.columns, chosen.chunks(8)) == (4, 16, 2)
    assert launch.choose(LaunchShape(3, 9, 3, 64, 2), HOPPER).rows == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, query=c.query.double()), "query: expected .*bfloat16.*, got torch.float64"),
        (
            lambda c: replace(c, cache=replace(c.cache, value=c.cache.value.float())),
            "value: expected the dtype of key, torch.bfloat16, got torch.float32",
        ),
        (
            lambda c: replace(c, cache=replace(c.cache, value=c.cache.value.mT.contiguous().mT)),
            "value: stride of the last dimension: expected 1",
        ),
        (
            lambda c: replace(c, batch=replace(c.batch, seq_lens=c.batch.seq_lens.long())),
            "seq_lens: expected int32, got torch.int64",
        ),
        (
            lambda c: replace(c, cache=PagedCache(*[c.cache.value.to(torch.int8)] * 2), thetas=None),
            "key: expected .*float8_e4m3fn.*, got torch.int8",
        ),
    ],
    ids=["query.dtype", "value.dtype", "value.stride", "int64 metadata", "int8 cache"],
)
def test_refusals_name_argument_expected_and_got(change: Any, message: str):
    with pytest.raises(RuntimeError, match=message):
        change(random_case([(1, 100)])).run("triton")


def test_auto_picks_triton_on_gpus_and_the_cpu_kernel_refuses_them():
    assert api.load_implementation("auto", "cuda") == ("triton", launcher)
    with pytest.raises(RuntimeError, match="can't read cuda tensors; use implementation auto or triton"):
        api.load_implementation("cpu", "cuda")
