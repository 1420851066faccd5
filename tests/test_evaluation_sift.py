"""SiftAttention's rules on scores made by hand."""

import math

import pytest
import torch

from topt_vllm.evaluation.rules import sift
from topt_vllm.evaluation.rules.sift import Quantile, Sift, SiftContext
from topt_vllm.replay.rule import Rows

RULES = [Sift, SiftContext]


def rows_of(scores: torch.Tensor, first: int) -> Rows:
    """One head; row i of ``scores`` sees ``first + i`` keys."""
    contexts = torch.arange(first, first + len(scores))
    hidden = torch.arange(scores.shape[1]) >= contexts[:, None]
    return Rows(
        0, scores.masked_fill(hidden, -math.inf)[None], contexts, torch.zeros(1, len(scores), 1), 1, []
    )


@pytest.fixture
def short_warmup(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sift, "WARMUP", 2)
    return 2


@pytest.mark.parametrize("rule", RULES)
def test_the_law_is_fitted_where_the_scores_are(rule: type[Sift], short_warmup: int):
    sequence, level = sift._Sequence(10), torch.zeros(1, 14, device="meta")
    for n in (10, 11):
        rule(0.9)._keep_row(sequence, level, n)
    assert sequence.law is not None
    assert sequence.law.is_meta


@pytest.mark.parametrize("rule", RULES)
def test_rows_are_dense_until_the_warm_up_is_over(rule: type[Sift], short_warmup: int):
    # Key 3 is the best tenth in each row; the newest key is kept whatever its score.
    scores = torch.zeros(4, 14)
    scores[:, 3] = 30.0
    kept = rule(0.9).keep(rows_of(scores, 10))[0]
    assert [row.nonzero().flatten().tolist() for row in kept] == [
        list(range(10)),
        list(range(11)),
        [3, 11],
        [3, 12],
    ]


@pytest.mark.parametrize("rule", RULES)
def test_a_sequence_goes_on_where_its_rows_were_cut(rule: type[Sift], short_warmup: int):
    scores = torch.randn(12, 40, generator=torch.Generator().manual_seed(1))
    whole = rows_of(scores, 20)
    expected = rule(0.8).keep(whole)
    shared: list = []
    parts = [
        rule(0.8).keep(Rows(0, whole.scores[:, part], whole.contexts[part], whole.query[:, part], 1, shared))
        for part in (slice(0, 1), slice(1, 5), slice(5, 12))
    ]
    assert torch.equal(torch.cat(parts, dim=1), expected)


def test_the_paper_thresholds_probabilities_and_ours_scores(short_warmup: int):
    """A row whose scores are all 40 higher has the same probabilities: the paper keeps its best key, ours all."""
    scores = torch.zeros(3, 12)
    scores[:, 4] = 30.0
    scores[2] += 40.0
    rows = rows_of(scores, 10)
    assert Sift(0.9).keep(rows)[0, 2].nonzero().flatten().tolist() == [4, 11]
    assert int(SiftContext(0.9).keep(rows_of(scores, 10))[0, 2].sum()) == 12
    assert not Sift.union
    assert not Sift.compensate
    assert SiftContext.union
    assert SiftContext.compensate


def test_the_power_law_in_the_rows_number_is_followed(short_warmup: int):
    """Quantiles 0 and 1 above -30 at rows 1 and 2 give θ(x) = log2 x - 30: -28.415 at row 3."""
    scores = torch.full((3, 24), -39.0)
    scores[:, 4] = 0.0  # which alone makes the softmax's denominator
    scores[0, 0], scores[1, 0] = -30.0, -29.0
    scores[2, :3] = torch.tensor([-28.4, -28.5, -29.0])
    rows = rows_of(scores, 10)
    assert Sift(0.8).keep(rows)[0, 2].nonzero().flatten().tolist() == [0, 4, 11]


def test_the_served_law_is_in_the_context_and_flat_where_contexts_are_alike(short_warmup: int):
    """From contexts 10 and 11 a slope of 1/ln 1.1 would follow; shrunk, θ stays between what was seen."""
    scores = torch.full((3, 24), -9.0)
    scores[0, 0], scores[1, 0] = 0.0, 1.0
    scores[2, :3] = torch.tensor([1.1, 0.9, -0.1])
    rows = rows_of(scores, 10)
    assert SiftContext(0.9).keep(rows)[0, 2].nonzero().flatten().tolist() == [0, 1, 11]


def test_tuning_samples_the_quantile_that_the_law_aims_at():
    scores = torch.arange(10.0).repeat(3, 1)
    assert Sift(0.7).on_sample() == Quantile(0.7)
    assert Quantile(0.7).keep(rows_of(scores, 8))[0].sum(dim=1).tolist() == [2, 2, 3]
