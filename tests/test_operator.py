"""The operator's semantics, over every implementation: hand-computed cases first, then random hostile ones."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import (
    BYTES,
    NAN,
    Case,
    attend,
    finish,
    kept_sets,
    paged_cache,
    poison_unread_values,
    random_case,
)
from device import TRITON
from hypothesis import given, settings
from hypothesis import strategies as st

from topt_vllm.attention.common import DecodeBatch, Selection, Stat, Thetas, new_statistics

IMPLS = ["reference", "cpu", "triton"]
KERNELS = [name for name in IMPLS if name != "reference"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PLAIN = Selection(group_keep="head", compensation="none")


def parameter(impl: str, *more: object) -> Any:
    """An implementation and what goes with it; Triton's has the marks of :mod:`device`."""
    return pytest.param(impl, *more, marks=TRITON.marks if impl == "triton" else ())


def each(impls: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("impl", [parameter(impl) for impl in impls])


every_implementation = each(IMPLS)
kernels_only = each(KERNELS)


def hand_case(
    scores: list[list[float]], selection: Selection, theta: list[float] | None, state_rows: int = 16
) -> Case:
    """Heads of one KV head with given scores: key j is (score of head 0, score of head 1, ...), query h is e_h.

    V row j is e_j, so that output[h, j] is the weight of key j, and the mean of V is 1/n everywhere.
    """
    table = torch.tensor(scores)
    heads, n = table.shape
    dim, block_size = 16 * -(-max(n, heads) // 16), 16
    blocks = -(-n // block_size)
    key, value = torch.full((2, 1, blocks * block_size, dim), NAN)
    key[:, :n] = 0
    key[0, :n, :heads] = table.T
    value[0, :n] = torch.eye(n, dim)
    split = lambda part: part.view(1, blocks, block_size, dim).transpose(0, 1)  # noqa: E731
    cache = paged_cache(split(key), split(value), state_rows)
    batch = DecodeBatch(
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([n], dtype=torch.int32),
        torch.arange(blocks, dtype=torch.int32)[None],
    )
    finish(cache, batch.block_table, [n])
    thetas = None
    if theta is not None:
        thetas = Thetas(
            torch.tensor([n], dtype=torch.int32), torch.tensor(theta)[:, None], torch.zeros(heads, 2)
        )
    return Case(torch.eye(heads, dim)[None], cache, batch, thetas, selection, 1.0)


def softmax(scores: list[float]) -> torch.Tensor:
    return torch.tensor(scores, dtype=torch.float64).softmax(dim=0).float()


def close(got: torch.Tensor, expected: torch.Tensor | list[float]) -> None:
    torch.testing.assert_close(got, torch.as_tensor(expected), rtol=2e-6, atol=1e-7)


@every_implementation
def test_score_equal_to_theta_is_kept(impl: str) -> None:
    scores = [0.5, 2.0, 1.9999, 3.0, 0.0]
    p = softmax(scores)
    got = hand_case([scores], PLAIN, [2.0]).run(impl)[0, 0, :5]
    # The last key is recent; the others stand in the denominator only.
    close(got, [0.0, p[1], 0.0, p[3], p[4]])


@every_implementation
@pytest.mark.parametrize("theta", [None, [-math.inf]], ids=["no thresholds", "minus infinity"])
def test_no_thresholds_and_theta_minus_infinity_are_dense(impl: str, theta: list[float] | None) -> None:
    scores = [0.5, -2.0, 1.0]
    close(hand_case([scores], PLAIN, theta).run(impl)[0, 0, :3], softmax(scores))


@every_implementation
def test_theta_plus_infinity_keeps_the_recent_token_only(impl: str) -> None:
    scores = [9.0, 1.0, 2.0]
    close(hand_case([scores], PLAIN, [math.inf]).run(impl)[0, 0, :3], [0.0, 0.0, softmax(scores)[2]])


@every_implementation
def test_sink_and_recent_tokens_are_kept(impl: str) -> None:
    scores = [0.1 * j for j in range(20)]
    p = softmax(scores)
    selection = replace(PLAIN, sink_tokens=3, recent_tokens=2)
    got = hand_case([scores], selection, [math.inf]).run(impl)[0, 0, :20]
    close(got, torch.where((torch.arange(20) < 3) | (torch.arange(20) >= 18), p, 0.0))


@every_implementation
@pytest.mark.parametrize(("n", "dense"), [(17, True), (18, False)])
def test_min_seq_len_is_inclusive(impl: str, n: int, dense: bool) -> None:
    selection = replace(PLAIN, min_seq_len=17)
    got = hand_case([[0.0] * n], selection, [1.0]).run(impl)[0, 0, :n]
    assert int((got > 0).sum()) == (n if dense else 1)


@every_implementation
def test_union_lets_the_group_use_what_one_head_keeps(impl: str) -> None:
    scores = [[3.0, 0.0, 0.0, 1.0], [0.0, 3.0, 0.0, 1.0]]
    first, second = softmax(scores[0]), softmax(scores[1])
    got = hand_case(scores, replace(PLAIN, group_keep="union"), [2.0, 2.0]).run(impl)[0, :, :4]
    close(got[0], [first[0], first[1], 0.0, first[3]])
    close(got[1], [second[0], second[1], 0.0, second[3]])
    got = hand_case(scores, PLAIN, [2.0, 2.0]).run(impl)[0, :, :4]
    close(got[0], [first[0], 0.0, 0.0, first[3]])
    close(got[1], [0.0, second[1], 0.0, second[3]])


@every_implementation
def test_vmean_adds_the_dropped_mass_times_the_mean(impl: str) -> None:
    scores = [0.0] * 30 + [4.0, 0.0]
    p = softmax(scores)
    got = hand_case([scores], Selection(group_keep="head"), [2.0], state_rows=2).run(impl)[0, 0]
    dropped = p[:30].sum()
    close(got, torch.where(torch.arange(32) >= 30, p, 0.0) + dropped / 32)


@every_implementation
def test_vmean_attends_the_rows_behind_the_last_sum_densely(impl: str) -> None:
    scores = [0.0] * 20
    got = hand_case([scores], Selection(), [1.0]).run(impl)[0, 0, :20]
    # 16 keys of the finished block are dropped: 0.8 of the mass; every V row has mean 1/20.
    close(got, [0.8 / 20] * 16 + [0.05 + 0.8 / 20] * 4)


@every_implementation
@pytest.mark.parametrize(("n", "dense"), [(16, 16), (17, 1), (31, 15), (32, 16)])
def test_a_row_needs_no_sum_that_ends_with_it(impl: str, n: int, dense: int) -> None:
    got = hand_case([[0.0] * n], Selection(), [1.0]).run(impl)[0, 0, :n]
    dropped = (n - dense) / n
    close(got, [dropped / n] * (n - dense) + [(1 + dropped) / n] * dense)


@every_implementation
def test_without_vmean_the_last_rows_are_selected(impl: str) -> None:
    got = hand_case([[0.0] * 20], PLAIN, [1.0]).run(impl)[0, 0, :20]
    close(got, [0.0] * 19 + [0.05])


@every_implementation
def test_softcap_comes_before_the_threshold(impl: str) -> None:
    scores = [10.0, 1.0, 0.0]
    capped = [2.0 * math.tanh(s / 2.0) for s in scores]
    case = replace(hand_case([scores], PLAIN, [1.9]), softcap=2.0)
    p = softmax(capped)
    close(case.run(impl)[0, 0, :3], [p[0], 0.0, p[2]])
    # Above the cap no score is kept by its own rule.
    case = replace(hand_case([scores], PLAIN, [2.1]), softcap=2.0)
    close(case.run(impl)[0, 0, :3], [0.0, 0.0, p[2]])


@every_implementation
def test_nan_score_poisons_its_row_only(impl: str) -> None:
    got = hand_case([[0.0, NAN, 1.0], [0.0, 0.0, 1.0]], PLAIN, [0.5, 0.5])
    # The NaN sits in key 1's first dimension, which the second head multiplies with zero.
    got.cache.key[0, 0, 1, 0] = math.inf
    statistics = new_statistics()
    out = got.run(impl, statistics)
    assert out[0, 0, :3].isnan().any()
    # What accumulates for the life of a process stays a number.
    assert statistics.isfinite().all()


@every_implementation
@pytest.mark.parametrize(
    ("n", "expected"),
    [(15, -math.inf), (16, 1.0), (32, 1.5), (64, 2.0), (128, 0.5 + 0.25 * math.log(128))],
    ids=["below", "first", "between", "last", "law"],
)
def test_theta_follows_the_context_length(impl: str, n: int, expected: float) -> None:
    offsets = [-1e-3, 1e-3]
    scores = [0.0] * n
    base = expected if math.isfinite(expected) else 0.0
    scores[0], scores[1] = base + offsets[0], base + offsets[1]
    case = hand_case([scores], PLAIN, None)
    thetas = Thetas(
        torch.tensor([16, 64], dtype=torch.int32), torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.25]])
    )
    got = replace(case, thetas=thetas).run(impl)[0, 0]
    assert got[1] > 0
    assert bool(got[0] > 0) == (expected == -math.inf)


@every_implementation
def test_statistics_count_rows_pairs_and_mass(impl: str) -> None:
    scores = [[3.0, 0.0, 0.0, 1.0], [0.0, 3.0, 0.0, 1.0]]
    statistics = new_statistics() + 1
    hand_case(scores, replace(PLAIN, group_keep="union"), [2.0, 2.0]).run(impl, statistics)
    p = softmax(scores[0])
    expected = [1, 8, 4, 4, 3, 2 * float(p[2]), 4, 4]
    close(statistics - 1, torch.tensor([expected], dtype=torch.float64))


@every_implementation
def test_each_row_of_a_sequence_has_its_own_context(impl: str) -> None:
    case = hand_case([[0.0] * 20], PLAIN, None)
    batch = replace(case.batch, query_start_loc=torch.tensor([0, 3], dtype=torch.int32))
    case = replace(case, batch=batch, query=case.query.repeat(3, 1, 1))
    got = case.run(impl)[:, 0, :20]
    for row, n in enumerate((18, 19, 20)):
        close(got[row], [1 / n] * n + [0.0] * (20 - n))


@every_implementation
def test_sequence_without_rows_is_skipped(impl: str) -> None:
    case = random_case([(1, 40), (0, 0), (2, 33)])
    torch.testing.assert_close(case.run(impl), case.run("reference"), rtol=2e-2, atol=2e-3)


@every_implementation
def test_batch_without_rows(impl: str) -> None:
    case = random_case([(1, 5)])
    empty = replace(
        case,
        query=case.query[:0],
        batch=replace(case.batch, query_start_loc=torch.zeros(2, dtype=torch.int32)),
    )
    assert empty.run(impl).shape == (0, 4, 64)


@every_implementation
def test_rows_outside_the_batch_stay_as_they_are(impl: str) -> None:
    case = random_case([(1, 40), (1, 33)])
    padded = replace(case, query=torch.cat([case.query, case.query]))
    out = padded.run(impl)
    assert out[:2].isfinite().all()
    assert out[2:].isnan().all()


def oracle_error(case: Case, got: torch.Tensor) -> tuple[float, float]:
    """Largest error against fp64: of ``got``, and of eager attention in the cache's dtype."""
    exact = attend(case, torch.float64)
    # Bytes are decoded exactly, so a cache of bytes adds no rounding to that of the query's dtype.
    cache_dtype = case.query.dtype if case.cache.key.dtype in BYTES else case.cache.key.dtype
    coarsest = min((case.query.dtype, cache_dtype), key=lambda dtype: -torch.finfo(dtype).eps)
    eager = attend(case, coarsest)
    return float((got.double() - exact).abs().max()), float((eager.double() - exact).abs().max())


def check_against_oracle(impl: str, case: Case) -> None:
    """Output, survivors and statistics; poisoned V rows must not be touched."""
    statistics = new_statistics()
    got = poison_unread_values(case).run(impl, statistics)
    error, eager = oracle_error(case, got)
    # Rounding of the output itself, and summation order in float32, come on top of what eager attention loses.
    band = torch.finfo(case.query.dtype).eps * float(got.abs().max()) + 2e-6
    assert error <= 2 * eager + band, (error, eager, band)
    sets = kept_sets(case)
    kv_heads = case.cache.value.shape[1]
    read = [kept.unflatten(0, (kv_heads, -1)).any(dim=1) for kept, _ in sets]
    expected = {
        Stat.ROWS: len(sets),
        Stat.ELEMENTS: sum(kept.numel() for kept, _ in sets),
        Stat.KEPT_ELEMENTS: sum(int(kept.sum()) for kept, _ in sets),
        Stat.V_ROWS: sum(part.numel() for part in read),
        Stat.V_ROWS_READ: sum(int(part.sum()) for part in read),
        Stat.K_ROWS_READ: sum(part.numel() for part in read),
        Stat.CANDIDATES: sum(part.numel() for part in read),
    }
    assert {stat: int(statistics[0, stat]) for stat in expected} == expected
    mass = sum(
        float((case.probabilities(case.scores64(*row)) * ~used).sum())
        for row, (_, used) in zip(case.rows(), sets, strict=True)
    )
    assert float(statistics[0, Stat.DROPPED_MASS]) == pytest.approx(mass, rel=1e-4, abs=1e-5)


@kernels_only
@pytest.mark.parametrize("n", [1, 15, 63, 127, 128, 129, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_context_lengths(impl: str, n: int, dtype: torch.dtype) -> None:
    check_against_oracle(impl, random_case([(1, n)], block_size=128, dtype=dtype, seed=n))


@kernels_only
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (9, 3), (8, 1), (10, 2), (16, 1)])
@pytest.mark.parametrize("group_keep", ["head", "union"])
def test_groups(impl: str, heads: int, kv_heads: int, group_keep: str) -> None:
    selection = Selection(group_keep=group_keep, sink_tokens=2)
    check_against_oracle(impl, random_case([(1, 300), (1, 65)], heads, kv_heads, selection=selection))


def sinks_beside(case: Case, share: list[float]) -> Case:
    """The case with sinks that take about these shares of the probability of its longest row, of each head."""
    mass = case.scores64(*max(case.rows(), key=lambda row: row[2])).logsumexp(dim=1)
    return replace(case, sinks=(mass + torch.tensor(share).double().logit()).float())


@pytest.mark.parametrize(("group_keep", "compensation"), [("head", "none"), ("union", "vmean")])
def test_sinks(group_keep: Any, compensation: Any) -> None:
    """One more score in the denominator, once, also where parts of a context are merged."""
    selection = Selection(group_keep=group_keep, compensation=compensation, min_seq_len=70)
    contexts = [(1, 2000), (3, 70), (3, 301), (1, 1)]
    case = random_case(contexts, dtype=torch.float32, selection=selection)
    case = sinks_beside(case, [0.1, 0.5, 0.3, 0.9])
    check_against_oracle("cpu", case)
    check_against_oracle("cpu", replace(case, thetas=None))
    plain = replace(case, sinks=None).run("cpu")
    assert float((case.run("cpu") - plain).abs().mean()) > 0.2 * float(plain.abs().mean())


@kernels_only
@pytest.mark.parametrize("sink", [-math.inf, -1e4, 60.0, 1e4])
def test_sinks_far_from_the_scores(impl: str, sink: float) -> None:
    """They leave everything to the keys, or nothing."""
    case = random_case([(1, 200), (2, 40)], dtype=torch.float32)
    out, plain = replace(case, sinks=torch.full((4,), sink)).run(impl), case.run(impl)
    expected = plain if sink < 0 else torch.zeros_like(plain)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-7)


@kernels_only
@pytest.mark.parametrize("head_dim", [32, 48, 64, 80, 112, 128, 256, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims(impl: str, head_dim: int, dtype: torch.dtype) -> None:
    check_against_oracle(impl, random_case([(1, 200)], head_dim=head_dim, dtype=dtype))


@kernels_only
@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 128, 256])
def test_block_sizes(impl: str, block_size: int) -> None:
    check_against_oracle(impl, random_case([(1, 300), (1, 256)], block_size=block_size))


@kernels_only
@pytest.mark.parametrize("compensation", ["none", "vmean"])
def test_compensations(impl: str, compensation: str) -> None:
    selection = Selection(compensation=compensation, recent_tokens=5, min_seq_len=64)
    check_against_oracle(impl, random_case([(1, 64), (1, 65), (1, 500)], selection=selection))


@kernels_only
@pytest.mark.parametrize("rows", [2, 3, 8, 11])
def test_multi_row_queries(impl: str, rows: int) -> None:
    check_against_oracle(impl, random_case([(rows, 100), (1, 70), (rows, 66)], 4, 2, block_size=32))


@pytest.mark.parametrize("impl", ["cpu"])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 160])
@pytest.mark.parametrize(("heads", "rows"), [(5, 1), (3, 5), (16, 1), (17, 2), (40, 8)])
@pytest.mark.parametrize("group_keep", ["head", "union"])
def test_many_query_vectors(impl: str, heads: int, rows: int, head_dim: int, group_keep: Any) -> None:
    """Heads times rows that share a context; AMX takes 16 of them at a time, and rows share a list of V rows."""
    selection = Selection(group_keep=group_keep, sink_tokens=1, recent_tokens=3)
    case = random_case([(rows, 333), (rows, 130)], heads, 1, head_dim, 48, selection=selection)
    check_against_oracle(impl, case)
    check_against_oracle(impl, replace(case, thetas=None))


@kernels_only
@pytest.mark.parametrize("query_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_mix(impl: str, dtype: torch.dtype, query_dtype: torch.dtype) -> None:
    check_against_oracle(impl, random_case([(1, 150)], dtype=dtype, query_dtype=query_dtype))


BYTES_READ = [parameter(impl, dtype) for impl in KERNELS for dtype in BYTES]
kernels_and_bytes = pytest.mark.parametrize(("impl", "dtype"), BYTES_READ)


@kernels_and_bytes
@pytest.mark.parametrize("query_dtype", DTYPES, ids=str)
def test_byte_caches(impl: str, dtype: torch.dtype, query_dtype: torch.dtype) -> None:
    """A tile of 64 tokens, one of 16, an unfinished block; NaN in every slot that is not used."""
    contexts = [(1, 391), (2, 70)]
    check_against_oracle(impl, random_case(contexts, 6, 2, 80, 80, dtype, query_dtype))


@kernels_and_bytes
@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 32), (128, 128), (256, 64)])
def test_byte_caches_of_other_shapes(impl: str, dtype: torch.dtype, head_dim: int, block_size: int) -> None:
    selection = Selection(group_keep="head", sink_tokens=2)
    case = random_case([(1, 300)], 10, 2, head_dim, block_size, dtype, torch.bfloat16, selection, softcap=3.0)
    check_against_oracle(impl, case)


def byte_case(key: torch.Tensor, value: torch.Tensor, query: torch.Tensor, dtype: torch.dtype) -> Case:
    """Dense attention of one head over one full block for each sequence.

    Args:
        key: uint8 codes [S, P, D].
        value: uint8 codes [S, P, D].
        query: [S, D].
        dtype: What the codes are.
    """
    count, size, _ = key.shape
    cache = paged_cache(key[:, None].view(dtype), value[:, None].view(dtype))
    starts = torch.arange(count + 1, dtype=torch.int32)
    table = torch.arange(count, dtype=torch.int32)[:, None]
    batch = DecodeBatch(starts, torch.full((count,), size, dtype=torch.int32), table)
    return Case(query[:, None], cache, batch, None, PLAIN, 1.0)


def values_of(dtype: torch.dtype) -> torch.Tensor:
    """float32 value of every code."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


@pytest.mark.parametrize("dtype", BYTES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 256])
def test_every_code_of_v_is_decoded(dtype: torch.dtype, head_dim: int) -> None:
    """Sixteen tokens with weight 1/16 and the same V row: their mean is the row, but for the rounding of exp."""
    codes = torch.arange(256, dtype=torch.uint8).view(-1, 1, head_dim).expand(-1, 16, -1)
    query = torch.zeros(codes.shape[0], head_dim)
    got = byte_case(torch.zeros_like(codes), codes, query, dtype).run("cpu").flatten()
    torch.testing.assert_close(got, values_of(dtype), rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", BYTES, ids=str)
@pytest.mark.parametrize("query_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [16, 64])
def test_every_code_of_k_is_decoded(dtype: torch.dtype, query_dtype: torch.dtype, size: int) -> None:
    """Code c stands in a channel of token c % P alone, and the query makes its score 1 or -1, nearly."""
    values, codes, tokens = values_of(dtype), torch.arange(256), torch.arange(256) % size
    key = torch.zeros(256, size, 64, dtype=torch.uint8)
    key[codes, tokens, codes % 61] = codes.to(torch.uint8)
    value = torch.eye(size, 64).to(dtype).view(torch.uint8).expand(256, -1, -1)
    query = torch.zeros(256, 64, dtype=query_dtype)
    usual = values.isfinite() & (values != 0)
    query[codes, codes % 61] = torch.where(usual, 1 / values.abs(), 1.0).to(query_dtype)
    case = byte_case(key, value, query, dtype)
    # The weight in float32 also where the query is bfloat16.
    out = torch.full((256, 1, 64), NAN)
    got = case.run("cpu", out=out)[:, 0, :size]
    scores = torch.zeros(256, size, dtype=torch.float64)
    scores[codes, tokens] = values.double() * query[codes, codes % 61].double()
    expected = scores.softmax(dim=1).float()
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-7, equal_nan=True)


def without_format(case: Case) -> Case:
    codes = {part: getattr(case.cache, part).view(torch.uint8) for part in ("key", "value")}
    return replace(case, cache=replace(case.cache, **codes))


REFUSED_BYTES = {
    "unmarked": (without_format, "take a view with the fp8 dtype"),
    "scale": (
        lambda case: replace(case, cache=replace(case.cache, value_scale=torch.ones(2))),
        "value_scale: expected one float32",
    ),
}


@pytest.mark.parametrize("what", REFUSED_BYTES)
def test_byte_caches_that_are_refused(what: str) -> None:
    change, message = REFUSED_BYTES[what]
    with pytest.raises((RuntimeError, ValueError), match=message):
        change(random_case([(1, 100)], dtype=torch.float8_e4m3fn, query_dtype=torch.bfloat16)).run("cpu")


@kernels_only
def test_softcap_random(impl: str) -> None:
    check_against_oracle(impl, random_case([(1, 300)], softcap=3.0))


@kernels_only
def test_long_context_is_split_and_merged(impl: str) -> None:
    check_against_oracle(impl, random_case([(1, 9000), (2, 130)], heads=2, kv_heads=1, block_size=64))


@kernels_only
def test_scores_that_grow_rescale_the_sums(impl: str) -> None:
    case = random_case([(1, 2000)], heads=2, kv_heads=1, dtype=torch.float32, keep=None)
    ramp = torch.linspace(0.1, 6.0, case.cache.key.shape[0])[case.batch.block_table[0, :63].long().argsort()]
    order = case.batch.block_table[0, :63].long().sort().values
    case.cache.key[order] *= ramp[: len(order), None, None, None]
    check_against_oracle(impl, case)


@kernels_only
def test_strided_output(impl: str) -> None:
    case = random_case([(2, 100)])
    out = torch.full((2, 4, 128), NAN, dtype=torch.bfloat16)
    case.run(impl, out=out[:, :, :64])
    assert torch.equal(out[:, :, :64], case.run(impl))
    assert out[:, :, 64:].isnan().all()


@pytest.mark.parametrize("impl", ["cpu"])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    contexts=st.lists(st.tuples(st.integers(1, 3), st.integers(3, 300)), min_size=1, max_size=3),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 3, 5]),
    head_dim=st.sampled_from([32, 64, 80]),
    block_size=st.sampled_from([16, 32, 128]),
    dtype=st.sampled_from(DTYPES),
    selection=st.builds(
        Selection,
        min_seq_len=st.sampled_from([0, 50]),
        sink_tokens=st.integers(0, 20),
        recent_tokens=st.integers(1, 40),
        group_keep=st.sampled_from(["head", "union"]),
        compensation=st.sampled_from(["none", "vmean"]),
    ),
    keep=st.sampled_from([None, 0.02, 0.2, 0.8]),
    seed=st.integers(0, 1000),
)
def test_random_batches(
    impl: str,
    contexts: list[tuple[int, int]],
    kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    selection: Selection,
    keep: float | None,
    seed: int,
) -> None:
    case = random_case(
        contexts,
        kv_heads * group,
        kv_heads,
        head_dim,
        block_size,
        dtype,
        selection=selection,
        keep=keep,
        seed=seed,
    )
    check_against_oracle(impl, case)


def used_by(impl: str, case: Case) -> torch.Tensor:
    """Which keys an implementation used in a one-row case, bool [H, n], read off its output.

    V row j of each window of D keys is e_j and all others are 0, so that output[h, j] > 0 says that j was used.
    """
    ((_, sequence, n),) = case.rows()
    size, dim = case.cache.value.shape[2:]
    used = torch.zeros(case.query.shape[1], n, dtype=torch.bool)
    for window in range(0, n, dim):
        value = torch.zeros_like(case.cache.value)
        for j in range(window, min(n, window + dim)):
            value[case.batch.block_table[sequence, j // size], :, j % size, j - window] = 1
        out = replace(case, cache=replace(case.cache, value=value)).run(impl)[0]
        used[:, window : window + dim] = out[:, : n - window] > 0
    return used


@kernels_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kept_set_equals_reference_but_for_ties(impl: str, dtype: torch.dtype) -> None:
    case = random_case(
        [(1, 700)], 4, 2, 128, 128, dtype, query_dtype=torch.float32, selection=PLAIN, keep=0.1, seed=3
    )
    scores = case.scores64(0, 0, 700)
    # θ lies exactly on a score, where rounding may decide either way.
    theta = scores.sort(dim=1).values[:, 630].float()
    case = replace(
        case, thetas=Thetas(torch.tensor([700], dtype=torch.int32), theta[:, None], torch.zeros(4, 2))
    )
    differs = used_by(impl, case) != used_by("reference", case)
    # Two float32 sums of D products differ by at most about D eps Σ|q k|.
    key, _ = case.gather(0, 700)
    magnitude = (case.query[0].double().abs().view(2, 2, -1) @ key.double().abs().transpose(1, 2)).flatten(
        0, 1
    )
    band = 128 * 2**-24 * magnitude * case.scale
    near = (scores - theta.double()[:, None]).abs() <= band
    assert not (differs & ~near).any()
    assert float(near.float().mean()) < 0.005


def test_result_does_not_depend_on_the_threads() -> None:
    case = random_case([(1, 5000), (1, 70), (3, 900)], dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 17):
            torch.set_num_threads(count)
            results.append(case.run("cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)


REFUSED = {
    "key.stride": (
        lambda case: replace(case, cache=replace(case.cache, key=case.cache.key.contiguous())),
        r"key: expected blocks stored \[D, P\]",
    ),
    "value.stride": (
        lambda case: replace(case, cache=replace(case.cache, value=case.cache.value.mT.contiguous().mT)),
        r"value: expected blocks stored \[P, D\]",
    ),
    "value.dtype": (
        lambda case: replace(case, cache=replace(case.cache, value=case.cache.value.float())),
        "value: expected the dtype of key",
    ),
    "int64 metadata": (
        lambda case: replace(case, batch=replace(case.batch, seq_lens=case.batch.seq_lens.long())),
        "seq_lens: expected Int, got Long",
    ),
    "query.dtype": (
        lambda case: replace(case, query=case.query.double()),
        "query: expected bfloat16, float16 or float32, got Double",
    ),
    "block table too short": (
        lambda case: replace(case, batch=replace(case.batch, block_table=case.batch.block_table[:, :1])),
        "seq_lens: expected at most 32 tokens",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_name_argument_expected_and_got(what: str) -> None:
    change, message = REFUSED[what]
    with pytest.raises(RuntimeError, match=message):
        change(random_case([(1, 100)])).run("cpu")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"recent_tokens": 0}, "recent_tokens is 0; it must be at least 1"),
        ({"group_keep": "heads"}, "group_keep is 'heads'; it must be one of head, union"),
        ({"compensation": "mean"}, "compensation is 'mean'; it must be one of none, vmean"),
    ],
    ids=["recent_tokens", "group_keep", "compensation"],
)
def test_policies_that_do_not_exist(what: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selection(**what)
