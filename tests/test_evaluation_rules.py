"""The rules on scores made by hand: what each keeps, and what attention under it gives."""

import math

import pytest
import torch
from table_factory import make_table

from topt_vllm.attention.common import Policy, Stat, Thetas, new_statistics
from topt_vllm.attention.reference import attend_row
from topt_vllm.evaluation.rules.blasst import Blasst
from topt_vllm.evaluation.rules.quest import Quest
from topt_vllm.evaluation.rules.sparsev import SparseV
from topt_vllm.evaluation.rules.topk import TopK
from topt_vllm.evaluation.rules.toptheta import TopThetaNoMean, between_budgets, ladder
from topt_vllm.replay.rule import Rows, attend_rows
from topt_vllm.replay.top_theta import TopTheta
from topt_vllm.table.schema import ThresholdTable


def rows_from(scores: list[list[float]], contexts: list[int] | None = None, kv_heads: int = 1) -> Rows:
    """One row per head, or with ``contexts`` one head with several rows; K and Q say nothing."""
    tensor = torch.tensor(scores)
    tensor = tensor[:, None] if contexts is None else tensor[None]
    n = torch.tensor(contexts or [tensor.shape[-1]])
    tensor = tensor.masked_fill(torch.arange(tensor.shape[-1]) >= n[:, None], -math.inf)
    return Rows(0, tensor, n, torch.zeros(*tensor.shape[:2], 1), kv_heads)


def kept(rule, rows: Rows) -> list[list[int]]:
    """Kept keys of each head and row, flattened."""
    return [row.nonzero().flatten().tolist() for row in rule.keep(rows).flatten(0, 1)]


def thetas(*per_head: float) -> dict[int, Thetas]:
    count = len(per_head)
    return {
        0: Thetas(
            torch.tensor([2, 64]), torch.tensor(per_head)[:, None].expand(count, 2), torch.zeros(count, 2)
        )
    }


def test_toptheta_keeps_what_reaches_theta_and_the_newest_token():
    rows = rows_from([[1.0, 2.0, 3.0, 0.0], [5.0, 0.0, 0.0, 0.0]])
    assert kept(TopTheta(thetas(2.0, 6.0)), rows) == [[1, 2, 3], [3]]


def test_toptheta_keeps_everything_below_the_first_length_and_in_layers_without_thresholds():
    rows = rows_from([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], contexts=[1, 3])
    assert kept(TopTheta(thetas(9.0)), rows) == [[0], [2]]
    assert kept(TopTheta({7: thetas(9.0)[0]}), rows) == [[0], [0, 1, 2]]


def test_theta_of_many_contexts_is_the_operators():
    entry = Thetas(torch.tensor([16, 64, 100]), torch.randn(3, 3), torch.randn(3, 2))
    contexts = torch.tensor([1, 15, 16, 17, 40, 64, 65, 99, 100, 101, 5000])
    expected = torch.stack([entry.at(n) for n in contexts.tolist()], dim=1)
    torch.testing.assert_close(entry.at_each(contexts), expected)
    single = Thetas(torch.tensor([16]), torch.randn(3, 1), torch.randn(3, 2))
    expected = torch.stack([single.at(n) for n in contexts.tolist()], dim=1)
    torch.testing.assert_close(single.at_each(contexts), expected)


def test_between_budgets_theta_is_interpolated_and_beyond_them_extrapolated():
    table = make_table()
    few, many = (torch.tensor(budget.layers[0].theta) for budget in table.budgets[:2])
    layer = table.budgets[0].layers[0].layer
    for position, weight in ((0.0, 0.0), (0.25, 0.25), (1.0, 1.0), (-2.0, -2.0)):
        torch.testing.assert_close(between_budgets(table, position)[layer].theta, few + weight * (many - few))
    single = table.model_copy(update={"budgets": table.budgets[:1]})
    torch.testing.assert_close(between_budgets(single, 1.5)[layer].theta, few - 1.5)


def test_named_budgets_come_before_those_with_a_k_and_are_ordered_by_rows_or_thresholds():
    table = make_table(ks=(64, 128, 256))
    few, middle, many = table.budgets
    assert [budget.k for budget in ladder(table)] == [64, 128, 256]

    def named(rows: dict[str, float | None]) -> list:
        quality = few.quality
        changes = [
            {"k": None, "name": name, "quality": read and quality.model_copy(update={"v_rows_read": read})}
            for name, read in rows.items()
        ]
        budgets = [b.model_copy(update=change) for b, change in zip((many, middle), changes, strict=True)]
        return [budget.key for budget in ladder(table.model_copy(update={"budgets": [few, *budgets]}))]

    assert named({"loss-1%": 0.2, "rows-5%": 0.05}) == ["rows-5%", "loss-1%"]
    assert named({"loss-1%": 0.05, "rows-5%": 0.2}) == ["loss-1%", "rows-5%"]
    assert named({"loss-1%": 0.05, "rows-5%": None}) == ["rows-5%", "loss-1%"]


def named_table(dense: tuple[list[int], list[int]]) -> ThresholdTable:
    """Two named budgets with these dense layers."""
    table = make_table(dense_layers=())
    budgets = [
        budget.model_copy(update={"k": None, "name": name, "dense_layers": layers})
        for budget, name, layers in zip(table.budgets, ("rows-5%", "rows-20%"), dense, strict=False)
    ]
    return table.model_copy(update={"budgets": budgets})


def test_named_budgets_take_their_dense_layers_along():
    """Towards the budget that keeps a layer dense its θ falls below every score; θ of other layers doesn't."""
    table = named_table(([], [0]))
    few, many = ladder(table)
    assert (few.dense_layers, many.dense_layers) == ([], [0])
    a, b = ({entry.layer: torch.tensor(entry.theta) for entry in budget.layers} for budget in (few, many))
    for position in (0.0, 0.5, 0.9, 1.0, 2.0):
        found = between_budgets(table, position)
        inside = min(position, 1.0)
        other = a[2].lerp(b[2], inside) - (position - inside)
        torch.testing.assert_close(found[2].theta, other)
        fall = -math.log(1 - position) if position < 1 else 1e9
        torch.testing.assert_close(found[0].theta, a[0].lerp(b[0], inside) - fall - (position - inside))
    below = between_budgets(table, -3.0)
    torch.testing.assert_close(below[0].theta, a[0] + 3.0)
    both = named_table(([0], [0]))
    assert between_budgets(both, 0.5)[0].theta.max() < -1e8
    # Far below the first budget a layer that is dense in it gives rows up like the others.
    torch.testing.assert_close(between_budgets(both, -3.0)[0].theta, a[0] + 3.0)
    few_only = named_table(([0], []))
    assert between_budgets(few_only, 0.0)[0].theta.max() < -1e8
    torch.testing.assert_close(between_budgets(few_only, 1.0)[0].theta, b[0])


def test_topk_keeps_k_and_ties():
    rows = rows_from([[1.0, 4.0, 3.0, 2.0], [1.0, 1.0, 0.0, 2.0]])
    assert kept(TopK(2), rows) == [[1, 2], [0, 1, 3]]
    assert kept(TopK(9), rows) == [[0, 1, 2, 3]] * 2
    assert kept(TopK(3), rows_from([[5.0, 1.0, 9.0, 9.0]], contexts=[2])) == [[0, 1]]


def test_blasst_skips_tiles_far_below_the_running_maximum():
    scores = torch.full((4 * 128 + 5,), -50.0)
    # Tile maxima 0, −1, 4, −2, 1: tile 1 is near the maximum of its time, tiles 3 and 4 are not.
    for tile, top in enumerate((0.0, -1.0, 4.0, -2.0, 1.0)):
        scores[tile * 128 + 3] = top
    n = len(scores)
    found = kept(Blasst(n * math.exp(-2.0)), rows_from([scores.tolist()]))
    assert found == [list(range(3 * 128))]
    # λ = scale / n: exp(−1) ≥ λ keeps tile 1, and a little more than that doesn't.
    assert 128 in kept(Blasst(n * math.exp(-1.0) * 0.999), rows_from([scores.tolist()]))[0]
    assert 128 not in kept(Blasst(n * math.exp(-1.0) * 1.001), rows_from([scores.tolist()]))[0]


def test_blasst_keeps_the_tile_of_the_maximum_whatever_the_scale():
    scores = [0.0] * 128 + [1.0] * 128 + [0.5] * 10
    assert kept(Blasst(1e9), rows_from([scores])) == [list(range(256))]


def test_blasst_skips_a_tile_only_when_all_its_rows_may():
    near = [0.0] * 256
    far = [0.0] * 128 + [-9.0] * 128
    rule = Blasst(256 * math.exp(-5.0))
    assert kept(rule, rows_from([far, far])) == [list(range(128))] * 2
    assert kept(rule, rows_from([far, near])) == [list(range(256))] * 2
    # Heads of different KV heads lie in different tiles, and so do heads beyond the sixteenth.
    assert kept(rule, rows_from([far, near], kv_heads=2)) == [list(range(128)), list(range(256))]
    many = kept(rule, rows_from([near] + [far] * 16))
    assert many == [list(range(256))] * 16 + [list(range(128))]


def test_sparsev_drops_small_probabilities():
    rows = rows_from([[math.log(p) + 3 for p in (0.5, 0.3, 0.15, 0.05)]])
    assert kept(SparseV(0.1), rows) == [[0, 1, 2]]
    assert kept(SparseV(0.6), rows) == [[]]
    assert kept(SparseV(1e-9), rows_from([[0.0, 0.0, 0.0]], contexts=[2])) == [[0, 1]]


def quest_rows(n: int, heads: int = 2) -> tuple[Rows, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(heads, 1, 4, generator=generator), torch.randn(1, n, 4, generator=generator)
    rows = Rows(0, query @ key.transpose(1, 2), torch.tensor([n]), query, 1, Quest(1).prepare(key))
    return rows, key


@pytest.mark.parametrize("n", [64, 70])
def test_quest_keeps_the_pages_of_the_highest_bounds_and_the_newest(n):
    rows, key = quest_rows(n)
    newest = (n - 1) // 16
    for head in range(2):
        bounds = []
        for page in range(newest):
            keys = key[0, page * 16 : page * 16 + 16]
            low, high = keys.min(dim=0).values, keys.max(dim=0).values
            bounds.append(torch.maximum(rows.query[head, 0] * low, rows.query[head, 0] * high).sum().item())
        best = max(range(newest), key=lambda page: bounds[page])
        expected = [j for j in range(n) if j // 16 in (best, newest)]
        assert kept(Quest(2), rows)[head] == expected
    assert kept(Quest(1), rows) == [list(range(newest * 16, n))] * 2
    assert kept(Quest(99), rows) == [list(range(n))] * 2


def test_quest_never_chooses_pages_after_the_row():
    rows, key = quest_rows(64, heads=1)
    early = Rows(
        0,
        torch.cat([rows.scores.masked_fill(torch.arange(64) >= 20, -math.inf), rows.scores], dim=1),
        torch.tensor([20, 64]),
        rows.query.expand(1, 2, 4),
        1,
        # Prepared from more keys than the rows see, as by a layer for all its rows.
        Quest(3).prepare(torch.cat([key, key], dim=1)),
    )
    assert kept(Quest(3), early)[0] == list(range(20))


def random_rows(n: int = 300) -> tuple[Rows, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    query, key, value = torch.randn(4, 1, 8) * 2, torch.randn(2, n, 8), torch.randn(2, n, 6)
    scores = (query.view(2, 2, 8) @ key.transpose(1, 2)).view(4, 1, n)
    return Rows(0, scores, torch.tensor([n]), query, 2, Quest(1).prepare(key)), query, key, value


@pytest.mark.parametrize("compensation", ["vmean", "none"])
def test_attention_under_toptheta_is_the_operators(compensation):
    rows, query, key, value = random_rows()
    theta = torch.tensor([2.0, 3.0, 4.0, 50.0])
    rule = TopTheta if compensation == "vmean" else TopThetaNoMean
    found = attend_rows(
        rule(thetas(*theta.tolist())), rows_at(rows, 64), value[:, :64], value[:, :64].mean(1)[:, None]
    )
    (statistics,) = new_statistics()
    expected = attend_row(
        query[:, 0],
        key[:, :64],
        value[:, :64],
        theta,
        Policy(compensation=compensation),
        1.0,
        statistics=statistics,
    )
    torch.testing.assert_close(found.out[:, 0], expected)
    assert found.kept.sum() == statistics[Stat.KEPT_ELEMENTS]
    assert found.read == statistics[Stat.V_ROWS_READ]
    assert found.dropped == pytest.approx(statistics[Stat.DROPPED_MASS].item(), rel=1e-5)


def rows_at(rows: Rows, n: int) -> Rows:
    return Rows(0, rows.scores[..., :n], torch.tensor([n]), rows.query, 2)


@pytest.mark.parametrize(
    "rule", [TopK(7), Quest(3), Blasst(100.0), SparseV(0.01)], ids=lambda rule: type(rule).__name__
)
def test_attention_under_a_rule_is_its_definition(rule):
    rows, _, _, value = random_rows()
    found = attend_rows(rule, rows, value, torch.full((2, 1, 6), math.nan))
    used = rule.keep(rows)
    probabilities = torch.softmax(rows.scores, dim=-1) * used
    dropped = 1 - probabilities.sum(dim=-1)
    if rule.renormalise:
        probabilities = torch.softmax(rows.scores.masked_fill(~used, -math.inf), dim=-1)
    expected = probabilities @ value.repeat_interleave(2, dim=0)
    torch.testing.assert_close(found.out, expected)
    assert found.kept.flatten().tolist() == used.sum(dim=-1).flatten().tolist()
    assert found.read == used.view(2, 2, 1, -1).any(dim=1).sum()
    assert found.dropped == pytest.approx(dropped.sum().item(), abs=1e-5)
    assert not torch.isnan(found.out).any()
