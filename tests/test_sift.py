"""policy: sift: the law's fit, requests and their slots, a layer's thresholds."""

import math
import random

import pytest
import torch

from topt_vllm.attention.common import RowThetas
from topt_vllm.sift import SiftLayer, SiftRequests, SiftSettings, SiftStep, fit

SETTINGS = SiftSettings(tau=0.9, warmup=3)


def take(table: SiftRequests, lengths: dict[str, int], rows: int = 1) -> SiftStep:
    """A step in which each request decodes ``rows`` rows, the last at the given context."""
    starts = torch.arange(0, rows * len(lengths) + 1, rows, dtype=torch.int32)
    contexts = [n - rows + 1 + row for n in lengths.values() for row in range(rows)]
    return table.step(list(lengths), starts, torch.tensor(contexts))


def test_the_law_goes_through_what_it_is_fitted_to():
    x = torch.tensor([100.0, 200, 400, 800, 1600]).log()
    y = torch.stack([2.0 + 0.5 * x, -1.0 * x], dim=1)
    law = fit(x, y, stiffness=1e-9)
    torch.testing.assert_close(law, torch.tensor([[2.0, 0.5], [0.0, -1.0]]), rtol=1e-4, atol=1e-4)


def test_without_evidence_the_slope_is_zero():
    """Behind a long prompt ln n hardly moves: noise of a logit must not become a slope."""
    x = torch.arange(8000.0, 8032.0).log()
    y = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    law = fit(x, y)
    assert law[:, 1].abs().max() < 0.01
    theta = law[:, 0] + law[:, 1] * math.log(16000)
    torch.testing.assert_close(theta, y.mean(dim=0), rtol=0, atol=0.01)
    assert fit(x, y, stiffness=1e-9)[:, 1].abs().max() > 10


def test_rows_are_dense_until_their_request_has_warmed_up():
    table, layer = SiftRequests(SETTINGS), SiftLayer(2, SETTINGS)
    for n in (50, 51, 52):
        step = take(table, {"a": n})
        assert step.warm.tolist() == [True]
        assert step.recording == [0]
        assert layer.thetas(step).theta.tolist() == [[-math.inf] * 2]
        layer.record(step, torch.tensor([[1.0, 2.0 + n - 51]]))
    step = take(table, {"a": 53})
    assert step.warm.tolist() == [False]
    assert step.recording == []
    torch.testing.assert_close(layer.thetas(step).theta, torch.tensor([[1.0, 2.0]]), rtol=0, atol=0.05)


def test_the_first_row_of_a_request_is_recorded_at_its_own_context():
    starts, contexts = torch.tensor([0, 1, 4, 5], dtype=torch.int32), torch.tensor([700, 148, 149, 150, 20])
    step = SiftRequests(SETTINGS).step(["a", "b", "c"], starts, contexts)
    assert step.first_rows == [(0, 0, 700), (1, 1, 148), (2, 4, 20)]


def test_drafted_rows_share_their_requests_law_and_are_not_recorded():
    table, layer = SiftRequests(SETTINGS), SiftLayer(1, SETTINGS)
    for n in (20, 24, 28):
        step = take(table, {"a": n, "b": 2 * n}, rows=4)
        assert step.warm.tolist() == [True] * 8
        assert step.recording == [0, 1]
        layer.record(step, torch.tensor([[3.0], [5.0]]))
    theta = layer.thetas(take(table, {"b": 60, "a": 32}, rows=4)).theta
    torch.testing.assert_close(theta[:, 0], torch.tensor([5.0] * 4 + [3.0] * 4))


def quantile(request: str) -> float:
    """What a request records; a law of its own tells requests apart."""
    return float(sum(map(ord, request)) % 97)


def test_state_follows_requests_through_reordering_preemption_and_reuse():
    """A model of what vLLM may do, at random: each row's θ is that of its request alone."""
    source = random.Random(0)
    table, layer = SiftRequests(SETTINGS), SiftLayer(2, SETTINGS)
    steps: dict[str, int] = {}
    born, most = 0, 0
    for _ in range(600):
        while len(steps) < 12:
            steps[f"request-{born}"] = 0
            born += 1
        most = max(most, len(steps))
        batch = source.sample(sorted(steps), source.randint(1, 10))  # the others wait or are preempted
        step = take(table, {request: 100 + steps[request] for request in batch})
        theta = layer.thetas(step).theta
        for row, request in enumerate(batch):
            expected = -math.inf if steps[request] < SETTINGS.warmup else quantile(request)
            assert theta[row, 0] == pytest.approx(expected, abs=1e-3)
            steps[request] += 1
        recorded = [quantile(batch[index]) for index in step.recording]
        layer.record(step, torch.tensor(recorded)[:, None].expand(-1, 2))
        for request in [name for name in steps if source.random() < 0.05]:
            table.forget([request, "one that never decoded"])
            del steps[request]
    assert born > 100
    assert len(table._slots) <= most
    assert step.capacity <= 16, "slots of requests that ended are used again"


def test_a_request_that_comes_back_under_its_name_starts_anew():
    table = SiftRequests(SETTINGS)
    for n in range(3):
        take(table, {"a": 10 + n})
    assert not take(table, {"a": 14}).warm.any()
    table.forget(["a"])
    assert len(table._slots) == 0
    assert take(table, {"a": 14}).warm.all()


def test_thresholds_are_by_row():
    layer = SiftLayer(2, SETTINGS)
    assert isinstance(layer.thetas(take(SiftRequests(SETTINGS), {"a": 5, "b": 6})), RowThetas)
