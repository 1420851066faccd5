"""Errors of query heads for many thresholds at once, against attention computed budget by budget."""

import pytest
import torch

from topt_vllm.attention.common import Selection, Thetas
from topt_vllm.attention.reference import attend_row
from topt_vllm.calibration.collect import _late
from topt_vllm.calibration.head_errors import HeadErrors, head_errors
from topt_vllm.replay.scores import LayerCall

HEADS, KV_HEADS, DIM, LENGTH = 6, 2, 8, 50
THETAS = (2.0, 0.5, -1.0, -1e30)
ROWS = torch.tensor([20, 33, 49])


@pytest.fixture
def call() -> LayerCall:
    generator = torch.Generator().manual_seed(0)
    query = 2 * torch.randn(HEADS, LENGTH, DIM, generator=generator)
    key, value = torch.randn(2, KV_HEADS, LENGTH, DIM, generator=generator)
    return LayerCall(0, query, key, value, DIM**-0.5)


@pytest.fixture
def projection() -> torch.Tensor:
    return torch.randn(12, HEADS * DIM, generator=torch.Generator().manual_seed(1))


def thetas() -> list[Thetas]:
    """By ascending keys: falling θ, the last one keeps everything."""
    return [
        Thetas(torch.tensor([1, 64]), torch.full((HEADS, 2), theta), torch.zeros(HEADS, 2))
        for theta in THETAS
    ]


def by_hand(call: LayerCall, projection: torch.Tensor | None, selection: Selection) -> torch.Tensor:
    """The operator's output less dense attention's, projected, [K, rows, H, hidden]."""
    weight = torch.eye(HEADS * DIM) if projection is None else projection
    slices = weight.view(-1, HEADS, DIM)
    found = []
    for theta in THETAS:
        rows = []
        for row in ROWS.tolist():
            seen = call.query[:, row], call.key[:, : row + 1], call.value[:, : row + 1]
            sparse = attend_row(*seen, torch.full((HEADS,), theta), selection, call.scale)
            dense = attend_row(*seen, None, selection, call.scale)
            rows.append(torch.einsum("hd,ohd->ho", sparse - dense, slices))
        found.append(torch.stack(rows))
    return torch.stack(found)


def errors_of(call: LayerCall, projection: torch.Tensor | None) -> HeadErrors:
    return head_errors(call, ROWS, thetas(), projection)


@pytest.mark.parametrize("projected", [True, False])
def test_energy_is_what_the_operator_errs_by(call, projection, projected):
    weight = projection if projected else None
    found = errors_of(call, weight)
    alone = by_hand(call, weight, Selection(group_keep="head"))
    torch.testing.assert_close(found.energy.float(), alone.square().sum(dim=-1).mean(dim=1).T)
    together = by_hand(call, weight, Selection(group_keep="union")).sum(dim=2)
    torch.testing.assert_close(found.layer_energy.float(), together.square().sum(dim=-1).mean(dim=1))
    assert found.energy[:, 0].min() > 0.01
    assert found.energy[:, -1].max() < 1e-9


def test_rows_of_all_heads_are_the_union(call):
    """Heads of a group share the rows that several of them keep."""
    found = errors_of(call, None)
    for index, theta in enumerate(THETAS):
        shares = []
        for row in ROWS.tolist():
            keys = call.key[:, : row + 1].repeat_interleave(HEADS // KV_HEADS, dim=0)
            kept = (keys @ call.query[:, row, :, None])[..., 0] * call.scale >= theta
            kept[:, -1] = True
            shares.append(kept.view(KV_HEADS, -1, row + 1).any(dim=1).float().mean(dim=1))
        expected = torch.stack(shares).mean(dim=0)
        torch.testing.assert_close(found.rows[:, index].view(KV_HEADS, -1).sum(dim=1).float(), expected)


def test_what_is_kept_of_a_pass_keeps_no_projection_alive():
    """Where one product gives queries, keys and values, they are views of it."""
    heads, n, dim = 4, 40, 8
    fused = torch.randn(n, heads + 2, dim)
    query, key, value = (part.transpose(0, 1) for part in fused.split([heads, 1, 1], dim=1))
    kept = _late(LayerCall(0, query, key, value, 1.0))
    assert kept.first == 30
    assert torch.equal(kept.value, value)
    for part, size in ((kept.query, heads * 10), (kept.key, n), (kept.value, n)):
        assert part.untyped_storage().nbytes() == size * dim * 4
