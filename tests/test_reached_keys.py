"""How many keys of each row and query head reach θ, over the implementations that count them."""

from dataclasses import replace

import pytest
import torch
from attention_cases import Case, random_case
from device import TRITON

from topt_vllm.attention.common import Selection

IMPLS = ["reference", "cpu", TRITON]
SELECTIONS = {
    "default": Selection(),
    # What is kept for other reasons must not count.
    "much is forced": Selection(sink_tokens=20, recent_tokens=90, group_keep="head"),
    "short rows are dense": Selection(min_seq_len=150),
}


def expected(case: Case) -> list[list[int]]:
    """By row and head, from float64 scores; θ lies in gaps between them."""
    assert case.thetas is not None
    total = torch.zeros(case.query.shape[:2], dtype=torch.int64)
    for row, sequence, n in case.rows():
        theta = case.thetas.at(n).double()[:, None]
        if n > case.selection.min_seq_len:
            total[row] = ((case.scores64(row, sequence, n) >= theta) & (theta > -torch.inf)).sum(dim=1)
    return total.tolist()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (9, 3)])
def test_reached_keys_are_counted_by_row_and_head(impl: str, selection: Selection, heads: int, kv_heads: int):
    case = random_case([(1, 1000), (3, 150), (1, 64), (2, 515)], heads, kv_heads, selection=selection)
    reached = torch.full((7, heads), 7)
    out = case.run(impl, reached=reached)
    assert (reached - 7).tolist() == expected(case)
    assert torch.equal(out, case.run(impl, reached=None))


@pytest.mark.parametrize("impl", IMPLS)
def test_heads_and_lengths_without_thresholds_count_nothing(impl: str):
    case = random_case([(1, 300), (1, 100)])
    assert case.thetas is not None
    # 100 tokens are fewer than the shortest length, and the second head keeps everything at any.
    thetas = replace(
        case.thetas, lengths=case.thetas.lengths[1:], theta=case.thetas.theta[:, 1:].contiguous()
    )
    thetas.theta[1] = -torch.inf
    case = replace(case, thetas=thetas)
    reached = torch.zeros(2, 4, dtype=torch.int64)
    case.run(impl, reached=reached)
    assert reached.tolist() == expected(case)
    assert reached[1].tolist() == [0, 0, 0, 0]
    assert (reached[0] > 0).tolist() == [True, False, True, True]


@pytest.mark.parametrize("impl", ["cpu", TRITON])
def test_counters_of_the_wrong_shape_are_refused(impl: str):
    with pytest.raises(RuntimeError, match=r"reached: expected contiguous \[1, 4\]"):
        random_case([(1, 100)]).run(impl, reached=torch.zeros(1, 3, dtype=torch.int64))
