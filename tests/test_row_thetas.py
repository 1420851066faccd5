"""Thresholds of single rows, over the implementations that take them; quantiles of scores."""

from dataclasses import replace

import pytest
import torch
from attention_cases import Case, attend, random_case
from device import TRITON

from topt_vllm.attention.common import (
    DecodeArguments,
    DecodeBatch,
    RowThetas,
    Selection,
    Thetas,
    new_statistics,
)
from topt_vllm.attention.quantiles import kept_of, score_quantiles

IMPLS = ["reference", "cpu", TRITON]
SHAPES = [(4, 2), (9, 3)]


def by_row(case: Case) -> Case:
    """The same call with each row's θ looked up before."""
    assert isinstance(case.thetas, Thetas)
    theta = torch.full(case.query.shape[:2], float("nan"))
    for row, _, n in case.rows():
        theta[row] = case.thetas.at(n)
    return replace(case, thetas=RowThetas(theta))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("compensation", ["none", "vmean"])
@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
def test_rows_with_the_heads_thresholds_give_the_same(
    impl: str, compensation: str, heads: int, kv_heads: int
):
    selection = Selection(compensation=compensation)  # type: ignore[arg-type]
    case = random_case([(1, 700), (3, 150), (1, 64), (2, 515)], heads, kv_heads, selection=selection)
    expected, counted = new_statistics(), new_statistics()
    out = case.run(impl, expected)
    assert torch.equal(by_row(case).run(impl, counted), out)
    assert torch.equal(counted, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_one_length_have_thresholds_of_their_own(impl: str):
    case = by_row(random_case([(1, 300), (1, 300), (1, 300)], selection=Selection(compensation="none")))
    assert isinstance(case.thetas, RowThetas)
    theta = case.thetas.theta.clone()
    theta[1], theta[2] = -torch.inf, torch.inf
    mixed = replace(case, thetas=RowThetas(theta)).run(impl)
    dense = replace(case, thetas=None)
    assert torch.equal(mixed[0], case.run(impl)[0])
    torch.testing.assert_close(mixed[1].double(), attend(dense, torch.float64)[1], rtol=0.02, atol=0.004)
    newest = torch.stack([dense.gather(2, 300)[1][head // 2, 299] for head in range(4)]).double()
    scores = dense.scores64(2, 2, 300)
    weight = scores.softmax(dim=-1)[:, 299:]
    torch.testing.assert_close(mixed[2].double(), weight * newest, rtol=0.02, atol=0.004)


@pytest.mark.parametrize("impl", IMPLS)
def test_thresholds_of_the_wrong_shape_are_refused(impl: str):
    case = random_case([(1, 100)])
    with pytest.raises(ValueError, match=r"theta \(2, 4\) must be \[R, H\] = \(1, 4\)"):
        replace(case, thetas=RowThetas(torch.zeros(2, 4))).run(impl)


def test_keys_are_counted_against_thresholds_of_heads_only():
    case = by_row(random_case([(1, 100)]))
    with pytest.raises(ValueError, match="reached counts against thresholds of heads"):
        case.run("cpu", reached=torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_a_quantile_is_the_score_that_the_share_stays_below(dtype: torch.dtype, softcap: float):
    case = random_case(
        [(1, 700), (3, 150), (1, 20)], 9, 3, dtype=dtype, query_dtype=torch.float32, softcap=softcap
    )
    case = replace(case, cache=replace(case.cache, value=torch.empty(0)))
    tau = 0.9
    rows = [(0, 0, 700), (1, 1, 148), (2, 4, 20)]
    given = DecodeArguments(
        case.query, case.cache, case.batch, None, case.selection, case.scale, softcap, torch.empty(0)
    )
    found = score_quantiles(given, rows, tau)
    # A scheduler that runs ahead knows no more than how long a context can be.
    assert torch.equal(score_quantiles(given, [(s, row, n + 4) for s, row, n in rows], tau), found)
    for got, (sequence, row, n) in zip(found, rows, strict=True):
        ordered = _scores(case, row, sequence, n).sort(dim=-1, descending=True).values
        torch.testing.assert_close(got.double(), ordered[:, kept_of(n, tau) - 1], rtol=1e-4, atol=1e-4)


def test_a_quantile_reads_nothing_off_the_device():
    """Tensors of the device ``meta`` have no data: any read of them raises."""
    case = random_case([(1, 700), (3, 150)])
    query, key = case.query.to("meta"), case.cache.key.to("meta")
    batch = DecodeBatch(
        *(part.to("meta") for part in vars(case.batch).values() if isinstance(part, torch.Tensor)), 3
    )
    cache = replace(case.cache, key=key, value=torch.empty(0))
    given = DecodeArguments(query, cache, batch, None, case.selection, case.scale, 0.0, torch.empty(0))
    assert score_quantiles(given, [(0, 0, 700), (1, 1, 148)], 0.9).shape == (2, query.shape[1])


def _scores(case: Case, row: int, sequence: int, n: int) -> torch.Tensor:
    whole = replace(case, cache=replace(case.cache, value=case.cache.key))
    return whole.scores64(row, sequence, n)


def test_a_quantile_leaves_a_key_at_least():
    assert [kept_of(n, 0.9) for n in (1, 9, 10, 25, 1000)] == [1, 1, 1, 2, 100]
