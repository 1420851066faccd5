"""Kernels with a K screen against the reference operator, which makes each row's codes anew."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import BYTES, NAN, Case, finish, implementation, random_case
from screen_cases import with_screen

from topt_vllm.attention.common import RowThetas, Selection, Stat, Thetas, new_statistics
from topt_vllm.attention.reference import gather, softcapped
from topt_vllm.attention.screen import EncodedKeys, refined_scores

# By name: the format that it offers.
IMPLS = {"cpu": "int4+4"}
every_implementation = pytest.mark.parametrize("impl", IMPLS)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
KEPT = [Stat.ROWS, Stat.ELEMENTS, Stat.KEPT_ELEMENTS, Stat.V_ROWS, Stat.V_ROWS_READ]


def screened(impl: str, case: Case, margin: float | None = 2.5) -> Case:
    """With the implementation's codes, θ moved into the widest gap near it of the scores that decide."""
    case = with_screen(case, impl, IMPLS[impl], margin)
    return replace(case, thetas=in_gaps(case)) if isinstance(case.thetas, Thetas) else case


def in_gaps(case: Case) -> Thetas:
    """θ of every head and length in the middle of the widest gap among the 20 scores around it."""
    screen, thetas = case.cache.key_screen, case.thetas
    assert screen is not None
    assert isinstance(thetas, Thetas)
    moved = thetas.theta.clone()
    for column, length in enumerate(thetas.lengths.tolist()):
        scores = []
        for row, sequence, n in case.rows():
            if n != length:
                continue
            blocks = case.batch.block_table[sequence, : -(-n // case.cache.key.shape[2])].long()
            key = gather(case.cache.key, blocks, case.cache.key_scale)[:, :n]
            encoded, queries = screen.transform.encode(key), screen.transform.queries(case.query[row])
            scores.append(softcapped(refined_scores(queries, encoded, case.scale), case.softcap))
        ordered = torch.cat(scores, dim=1).nan_to_num(0.0).sort(dim=1).values
        for head, theta in enumerate(thetas.theta[:, column].tolist()):
            near = int(torch.searchsorted(ordered[head].contiguous(), theta))
            window = ordered[head, max(0, near - 10) : near + 10]
            if theta > -math.inf and len(window) > 1:
                widest = int(window.diff().argmax())
                moved[head, column] = float(window[widest] + window[widest + 1]) / 2
    return replace(thetas, theta=moved)


def check(impl: str, case: Case, shared: bool = False) -> torch.Tensor:
    """Output and statistics are the reference's. Returns the statistics.

    Args:
        impl: Implementation.
        case: With a screen.
        shared: Rows may have shared candidates: then there are more of them, and those that no row keeps stand with
            refined scores in a denominator, where the reference has approximate ones.
    """
    got, expected = new_statistics(), new_statistics()
    out, wanted = case.run(impl, got), case.run("reference", expected)
    counts = [*KEPT, Stat.K_ROWS_READ, *([] if shared else [Stat.CANDIDATES])]
    assert got[0, counts].tolist() == expected[0, counts].tolist()
    mass = float(expected[0, Stat.DROPPED_MASS])
    error = 5e-2 if shared else 1e-3
    assert float(got[0, Stat.DROPPED_MASS]) == pytest.approx(mass, rel=error, abs=error / 10, nan_ok=True)
    # Codes are the same on both sides: what differs is the order of sums, a query of 16 bits, and outputs' bits.
    rounding = 2 * torch.finfo(case.query.dtype).eps
    torch.testing.assert_close(out, wanted, rtol=rounding + error, atol=rounding + error / 10, equal_nan=True)
    return got[0]


def decoded(case: Case, sequence: int, n: int) -> EncodedKeys:
    """What the CPU kernel has stored of a context, rows [Hkv, n]; csrc/screen_block.h has the layout."""
    assert case.cache.key_screen is not None
    _, _, size, dim = case.cache.key.shape
    memory = case.cache.key_screen.codes[case.batch.block_table[sequence, : -(-n // size)].long()].transpose(
        0, 1
    )
    groups, rest = memory.split([size // 16 * (8 * dim + 64), size * dim // 2], dim=2)
    groups = groups.unflatten(2, (size // 16, 8 * dim + 64))
    words = groups[..., : 8 * dim].unflatten(3, (dim // 16, 16, 8)).transpose(3, 4).flatten(1, 3)
    steps, errors = groups[..., 8 * dim :].contiguous().view(torch.float16).chunk(2, dim=3)

    def nibbles(words: torch.Tensor) -> torch.Tensor:
        return torch.stack([words & 15, words >> 4], dim=-2).flatten(-3).int()

    lower = nibbles(rest.unflatten(2, (size, dim // 16, 8)).flatten(1, 2))
    codes = (16 * (nibbles(words) - 8) + lower).to(torch.int8)
    return EncodedKeys(codes[:, :n], steps.flatten(1)[:, :n], errors.flatten(1)[:, :n])


def check_codes(case: Case) -> None:
    """Bits of codes and steps; error norms may round otherwise."""
    screen = case.cache.key_screen
    assert screen is not None
    for sequence, n in enumerate(case.batch.seq_lens.tolist()):
        blocks = case.batch.block_table[sequence, : -(-n // case.cache.key.shape[2])].long()
        key = gather(case.cache.key, blocks, case.cache.key_scale)[:, :n]
        expected, got = screen.transform.encode(key), decoded(case, sequence, n)
        assert torch.equal(got.codes, expected.codes)
        torch.testing.assert_close(got.step, expected.step, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(got.error, expected.error, rtol=2e-3, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 96, 112, 128, 192, 256, 512])
def test_codes_are_those_of_the_transform(head_dim: int) -> None:
    check_codes(with_screen(random_case([(1, 37), (1, 64)], head_dim=head_dim), "cpu", "int4+4"))


@pytest.mark.parametrize("block_size", [16, 48, 128])
@pytest.mark.parametrize("dtype", [*DTYPES, *BYTES], ids=str)
def test_codes_of_every_dtype(dtype: torch.dtype, block_size: int) -> None:
    case = random_case([(1, 150), (1, 1)], dtype=dtype, block_size=block_size, query_dtype=torch.bfloat16)
    check_codes(with_screen(case, "cpu", "int4+4"))


@pytest.mark.parametrize("value", [0.0, math.inf, -math.inf, NAN, 1e30, 7e4, 3e-7, -1e-39])
def test_codes_of_rows_that_are_hard_to_store(value: float) -> None:
    case = random_case([(1, 100)], dtype=torch.float32)
    block = int(case.batch.block_table[0, 1])
    case.cache.key[block, :, 5] = value
    case.cache.key[block, :, 9, 3] = value
    check_codes(with_screen(case, "cpu", "int4+4"))


@pytest.mark.parametrize("chunk", [1, 5, 16, 33])
def test_codes_do_not_depend_on_how_rows_came(chunk: int) -> None:
    """As prompts of chunks, and decoded rows, come; some are written, rejected and written again."""
    at_once = with_screen(random_case([(1, 100)]), "cpu", "int4+4")
    assert at_once.cache.key_screen is not None
    codes = torch.randint_like(at_once.cache.key_screen.codes, 256)
    made = replace(
        at_once.cache, key_screen=replace(at_once.cache.key_screen, codes=codes), key=at_once.cache.key
    )
    batch, table = at_once.batch, at_once.batch.block_table
    for begin in range(0, 100, chunk):
        end = min(100, begin + chunk)
        for rejected in (True, False):
            if rejected:
                before = made.key.clone()
                made.key[table[0, :4].long()] += 3.0
            starts = torch.tensor([7, 7 + end - begin], dtype=torch.int32)
            written = replace(batch, query_start_loc=starts, seq_lens=torch.tensor([end], dtype=torch.int32))
            implementation("cpu").finish(made, written)
            made.key.copy_(before)
    got, expected = decoded(replace(at_once, cache=made), 0, 100), decoded(at_once, 0, 100)
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(got.step, expected.step)
    assert torch.equal(got.error, expected.error)


def test_rows_outside_a_batch_keep_their_codes() -> None:
    case = with_screen(random_case([(1, 100)], block_size=16), "cpu", "int4+4")
    assert case.cache.key_screen is not None
    codes = case.cache.key_screen.codes
    before = codes.clone()
    finish(case.cache, case.batch.block_table, [100], "cpu")
    assert torch.equal(codes, before)


@every_implementation
@pytest.mark.parametrize("margin", [None, 0.0, 1.0, 2.5], ids=str)
@pytest.mark.parametrize("head_dim", [32, 80, 128, 192, 512])
def test_head_dims_and_margins(impl: str, head_dim: int, margin: float | None) -> None:
    case = random_case(
        [(1, 700), (1, 128), (1, 15)], 4, 2, head_dim, 64, query_dtype=torch.float32, keep=0.03
    )
    assert check(impl, screened(impl, case, margin))[Stat.K_ROWS_READ] == 2 * 15


@every_implementation
@pytest.mark.parametrize("dtype", [*DTYPES, *BYTES], ids=str)
@pytest.mark.parametrize("query_dtype", DTYPES, ids=str)
def test_dtypes(impl: str, dtype: torch.dtype, query_dtype: torch.dtype) -> None:
    check(impl, screened(impl, random_case([(1, 400)], dtype=dtype, query_dtype=query_dtype, keep=0.05)))


@every_implementation
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (9, 3), (5, 1), (16, 2), (16, 1), (20, 1)])
@pytest.mark.parametrize("group_keep", ["head", "union"])
def test_groups(impl: str, heads: int, kv_heads: int, group_keep: Any) -> None:
    selection = Selection(sink_tokens=3, recent_tokens=70, group_keep=group_keep)
    case = random_case([(1, 500), (1, 300)], heads, kv_heads, block_size=128, selection=selection, keep=0.02)
    check(impl, screened(impl, case))


@every_implementation
@pytest.mark.parametrize("compensation", ["none", "vmean"])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_compensations_and_softcap(impl: str, compensation: Any, softcap: float) -> None:
    selection = Selection(sink_tokens=20, recent_tokens=5, compensation=compensation, min_seq_len=300)
    contexts = [(1, 900), (1, 300), (1, 301), (0, 0), (1, 7)]
    case = random_case(contexts, selection=selection, softcap=softcap, keep=0.03, query_dtype=torch.float32)
    check(impl, screened(impl, case))


@every_implementation
@pytest.mark.parametrize("compensation", ["none", "vmean"])
def test_sinks_stand_beside_a_screen(impl: str, compensation: Any) -> None:
    selection = Selection(compensation=compensation)
    sinks = torch.tensor([5.0, 7.0, 6.0, 8.0])
    case = random_case([(1, 3000), (1, 15)], 4, 2, keep=0.03, selection=selection, sinks=sinks)
    case = screened(impl, case)
    check(impl, case)
    plain, out = replace(case, sinks=None).run(impl).float(), case.run(impl).float()
    assert float((out - plain).abs().mean()) > 0.1 * float(plain.abs().mean())


@every_implementation
@pytest.mark.parametrize("rows", [2, 8, 11])
def test_rows_of_one_sequence(impl: str, rows: int) -> None:
    """A hard bound keeps the same keys whoever shares candidates, and a huge margin makes all keys some."""
    case = screened(impl, random_case([(rows, 150), (1, 257), (rows, 66)], 6, 2, keep=0.02), 1e4)
    check(impl, case)
    case = screened(impl, case, None)
    expected = new_statistics()
    case.run("reference", expected)
    got = check(impl, case, shared=True)
    assert expected[0, Stat.CANDIDATES] <= got[Stat.CANDIDATES] < 0.9 * got[Stat.V_ROWS]


@every_implementation
def test_rows_of_one_sequence_that_part_ways(impl: str) -> None:
    """Those below ``min_seq_len`` and those whose θ is −inf, for one head even, have K itself."""
    selection = Selection(min_seq_len=396)
    case = screened(impl, random_case([(8, 400), (4, 396)], 4, 2, selection=selection, keep=0.05), None)
    check(impl, case, shared=True)
    theta = torch.stack([case.thetas.at(n) for _, _, n in case.rows()])
    theta[2, 1] = theta[5, 3] = -math.inf
    case = replace(case, thetas=RowThetas(theta), selection=Selection())
    got = check(impl, case, shared=True)
    assert got[Stat.K_ROWS_READ] == 395 + 398


@every_implementation
def test_rows_of_short_contexts_read_k(impl: str) -> None:
    case = screened(impl, random_case([(1, 40), (4, 102), (1, 100), (1, 101)]), None)
    assert case.cache.key_screen is not None
    short = replace(case.cache, key_screen=replace(case.cache.key_screen, min_seq_len=100))
    counts = check(impl, replace(case, cache=short), shared=True)
    # Two KV heads; the second sequence's rows have 99 to 102 keys.
    assert counts[Stat.K_ROWS_READ] == 2 * (40 + 99 + 100 + 100)


@every_implementation
@pytest.mark.parametrize("theta", [-math.inf, math.inf])
def test_thetas_without_an_end(impl: str, theta: float) -> None:
    case = with_screen(random_case([(1, 300), (1, 20)]), impl, IMPLS[impl])
    check(impl, replace(case, thetas=RowThetas(torch.full((2, 4), theta))))
    check(impl, replace(case, thetas=None))


@every_implementation
@pytest.mark.parametrize("value", [math.inf, -math.inf, NAN, 1e30, 7e4, 0.0])
def test_keys_that_are_hard_to_store(impl: str, value: float) -> None:
    case = random_case([(1, 512)], heads=2, kv_heads=1, keep=0.02, dtype=torch.float32)
    case.cache.key[int(case.batch.block_table[0, 3]), 0, 5, 7] = value
    check(impl, screened(impl, case))


@every_implementation
@pytest.mark.parametrize("value", [0.0, NAN, math.inf, 1e-30])
def test_queries_that_are_hard_to_store(impl: str, value: float) -> None:
    case = with_screen(random_case([(1, 300)], dtype=torch.float32), impl, IMPLS[impl])
    query = case.query.clone()
    query[0, 1] = value
    check(impl, replace(case, query=query))


@every_implementation
def test_keys_that_reach_theta_are_counted(impl: str) -> None:
    case = screened(impl, random_case([(1, 600), (1, 40)], keep=0.05))
    got, expected = torch.zeros(2, 2, 4, dtype=torch.int64)
    case.run(impl, reached=got)
    case.run("reference", reached=expected)
    assert got.tolist() == expected.tolist()


@every_implementation
def test_contexts_that_threads_share(impl: str) -> None:
    check(impl, screened(impl, random_case([(1, 9000), (1, 130)], 2, 1, block_size=64, keep=0.02)))


@pytest.fixture(params=[1, 2, 3, 17])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_any_number_of_threads() -> None:
    case = random_case([(1, 3000), (1, 70), (3, 900)], dtype=torch.float32, keep=0.03)
    check("cpu", screened("cpu", case, None), shared=True)
    check_codes(screened("cpu", case))


@every_implementation
def test_tiles_without_a_candidate_behind_rows_that_read_k(impl: str) -> None:
    """In one thread, whose state goes from the one to the other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        case = screened(impl, random_case([(1, 40), (1, 900)], keep=0.004), None)
        assert case.cache.key_screen is not None
        part = replace(case.cache, key_screen=replace(case.cache.key_screen, min_seq_len=100))
        check(impl, replace(case, cache=part))
    finally:
        torch.set_num_threads(threads)


def test_screens_that_the_cpu_kernel_has_not() -> None:
    for head_dim, block_size, message in (
        (72, 32, "head dimension that is a multiple of 16, got 72"),
        (64, 24, "block size that is a multiple of 16, got 24"),
        (528, 32, "takes head dimensions up to 512, got 528"),
    ):
        with pytest.raises(ValueError, match=message):
            implementation("cpu").screen_bytes("int4+4", head_dim, block_size)
