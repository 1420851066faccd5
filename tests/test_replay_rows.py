"""Operations on chunks of scores that CPUs have faster ways for than torch's plain ones."""

import math

import pytest
import torch

from topt_vllm.replay.scores import ones_and_zeros, reaching, true_per_row


@pytest.fixture
def scores() -> torch.Tensor:
    found = torch.randn(4, 3, 37, generator=torch.Generator().manual_seed(0))
    found[0, 0, :5] = torch.tensor([math.nan, -math.inf, math.inf, 0.25, -0.0])
    return found


def test_what_reaches_theta(scores: torch.Tensor):
    theta = torch.tensor([[0.25, 0.0, -math.inf]]).repeat(4, 1)
    expected = scores >= theta[..., None]
    assert torch.equal(reaching(scores, theta), expected)
    assert torch.equal(reaching(scores[:, :, ::2], theta), expected[:, :, ::2])
    assert expected[0, 0, :4].tolist() == [False, False, True, True]


def test_what_is_true_in_a_row(scores: torch.Tensor):
    kept = scores > 0.5
    assert torch.equal(true_per_row(kept), kept.sum(dim=-1, dtype=torch.int32))
    assert torch.equal(true_per_row(kept[::2, :, 3:]), kept[::2, :, 3:].sum(dim=-1, dtype=torch.int32))
    assert true_per_row(kept[:0]).shape == (0, 3)
    assert true_per_row(kept).dtype == torch.int32


def test_ones_and_zeros_of_what_is_true(scores: torch.Tensor):
    kept = (scores > 0.5).unflatten(0, (2, 2))
    for mask in (kept, kept[:, 0], kept[:, :, None, :, ::3]):
        assert torch.equal(ones_and_zeros(mask), mask.float())
