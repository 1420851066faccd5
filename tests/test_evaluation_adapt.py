"""The rule that adapts, on scores made by hand, and where an evaluation refuses it."""

import pytest
import torch

from topt_vllm.adaptation import GAIN, ROWS
from topt_vllm.attention.common import Thetas
from topt_vllm.evaluation.options import ADAPTING, EvaluationError, EvaluationOptions
from topt_vllm.evaluation.records import by_head
from topt_vllm.evaluation.rules.adaptive import STEP_ROWS, TopThetaAdapt
from topt_vllm.replay.rule import Rows
from topt_vllm.replay.top_theta import TopTheta

HEADS, CONTEXT = 2, 200


def thetas(*per_head: float) -> dict[int, Thetas]:
    theta = torch.tensor(per_head)[:, None].expand(len(per_head), 2).contiguous()
    return {3: Thetas(torch.tensor([100, 400]), theta, torch.zeros(len(per_head), 2))}


def rows(count: int) -> Rows:
    """Rows of one context length, and standard normal scores."""
    scores = torch.randn(HEADS, count, CONTEXT, generator=torch.Generator().manual_seed(0))
    return Rows(3, scores, torch.full((count,), CONTEXT), torch.zeros(HEADS, count, 1), 1, [])


def test_it_is_toptheta_until_enough_rows_came():
    some = rows(ROWS)
    rule = TopThetaAdapt(thetas(1.0, 2.0), {3: [20, 20]})
    assert torch.equal(rule.keep(some), TopTheta(thetas(1.0, 2.0)).keep(some))
    (controller,) = some.shared
    # A sixth of 200 keys is above 1, a fortieth above 2.
    assert controller.offset[0] > 0.2 * GAIN
    assert controller.offset[1] < -0.5 * GAIN


def test_later_rows_use_the_offsets_and_parts_do_not_matter():
    rule = TopThetaAdapt(thetas(1.0, 2.0), {3: [20, 20]})
    many = rows(10 * ROWS)
    whole = rule.keep(many)
    first, second = 4 * ROWS, 6 * ROWS
    shared: list[object] = []
    parts = []
    for part in (slice(0, first), slice(first, first + second)):
        scores, contexts = many.scores[:, part], many.contexts[part]
        parts.append(rule.keep(Rows(3, scores, contexts, many.query[:, part], 1, shared)))
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert ROWS % STEP_ROWS == 0
    static = TopTheta(thetas(1.0, 2.0)).keep(many)
    error = [(kept[:, -3 * ROWS :].sum(dim=-1).double().mean(dim=1) - 20).abs() for kept in (whole, static)]
    assert (error[0] < 0.25 * error[1]).all()


def test_each_layer_run_starts_from_the_table():
    rule = TopThetaAdapt(thetas(1.0, 2.0), {3: [20, 20]})
    assert rule.prepare(torch.zeros(1, 1, 1)) is not rule.prepare(torch.zeros(1, 1, 1))
    assert rule.in_order


def test_it_evaluates_budgets_only():
    with pytest.raises(EvaluationError, match="name budgets with --budget"):
        EvaluationOptions("m", ("t",), rules=(ADAPTING,))
    EvaluationOptions("m", ("t",), rules=(ADAPTING,), rows=(), ks=(64,))


def test_ratios_by_head_are_of_medians_over_rows():
    found = by_head([torch.tensor([[1.0, 0.9, 5.0], [2.0, 3.0, 0.1]]), torch.tensor([[1.0, 1.0, 1.0]] * 2)])
    assert found["within_20pct"] == 0.75
    assert found["p95"] == 2.0
    assert found["mean"] == 1.5
