"""The controller that moves thresholds with the traffic."""

import math

import pytest
import torch

from topt_vllm.adaptation import BOUND, GAIN, ROWS, ThetaController
from topt_vllm.attention.common import Thetas

HEADS = 3


def controller(keys: int = 64, dense_up_to: int = 255) -> ThetaController:
    theta = torch.arange(HEADS * 2, dtype=torch.float32).view(HEADS, 2)
    law = torch.tensor([[1.0, 0.5]] * HEADS)
    return ThetaController(Thetas(torch.tensor([256, 4096]), theta, law), [keys] * HEADS, dense_up_to)


def serve(control: ThetaController, reached: list[float], context: int = 4096, rows: int = ROWS) -> None:
    """Rows of one context length, with so many keys reached in each by every head."""
    control.count(torch.tensor(reached).long().expand(rows, HEADS), torch.full((rows,), context))


def test_heads_that_keep_too_much_get_a_higher_threshold():
    control = controller()
    before = control.thetas.theta.clone(), control.thetas.law.clone()
    serve(control, [64, 128, 32])
    step = GAIN * math.log(2)
    torch.testing.assert_close(control.offset, torch.tensor([0.0, step, -step]))
    torch.testing.assert_close(control.thetas.theta, before[0] + control.offset[:, None])
    # Extrapolated lengths move alike: only the law's constant changes.
    torch.testing.assert_close(control.thetas.law[:, 0], before[1][:, 0] + control.offset)
    assert torch.equal(control.thetas.law[:, 1], before[1][:, 1])


def test_every_head_has_keys_of_its_own():
    thetas = controller().thetas
    control = ThetaController(thetas, [32, 64, 128], 0)
    serve(control, [64, 64, 64])
    assert [round(float(d) / GAIN / math.log(2)) for d in control.offset] == [1, 0, -1]
    with pytest.raises(ValueError, match="keys has 2 entries"):
        ThetaController(thetas, [1, 2], 0)


def test_a_row_is_asked_for_half_of_its_context_at_most():
    control = controller(keys=1000)
    serve(control, [150, 150, 150], context=300)
    assert control.offset.tolist() == [0, 0, 0]


def test_steps_and_offsets_are_bounded():
    control = controller()
    serve(control, [0, 4096, 64])
    torch.testing.assert_close(control.offset, torch.tensor([-GAIN, GAIN, 0.0]))
    for _ in range(2 * math.ceil(BOUND / GAIN)):
        serve(control, [0, 4096, 64])
    assert control.offset.tolist() == [-BOUND, BOUND, 0]


def test_nothing_moves_before_enough_rows_came_and_short_ones_count_for_nothing():
    control = controller()
    serve(control, [640, 640, 640], rows=ROWS - 1)
    assert control.offset.tolist() == [0, 0, 0]
    serve(control, [0, 0, 0], context=255, rows=5)
    torch.testing.assert_close(control.offset, torch.full((HEADS,), GAIN))
    serve(control, [0, 0, 0], context=255)
    torch.testing.assert_close(control.offset, torch.full((HEADS,), GAIN))


def test_it_settles_on_the_promised_keys_of_another_distribution():
    """Heavy-tailed rows whose scores lie half a unit and more beside those of the calibration."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.full((HEADS, 1), 2.2)
    control = ThetaController(Thetas(torch.tensor([1024]), theta, torch.zeros(HEADS, 2)), [16] * HEADS, 0)
    shift = torch.tensor([-0.7, 0.0, 0.7])[:, None, None]
    counts = []
    for _ in range(240):
        wide = 1 + 0.2 * torch.randn(HEADS, 8, 1, generator=generator)
        scores = shift + wide * torch.randn(HEADS, 8, 1024, generator=generator)
        reached = (scores >= control.thetas.theta[:, :, None]).sum(dim=-1)
        counts.append(reached)
        control.count(reached.T, torch.full((8,), 1024))
    settled = torch.cat(counts[120:], dim=1).median(dim=1).values / 16
    assert ((settled > 0.8) & (settled < 1.2)).all(), settled
    static = torch.cat(counts[:4], dim=1).median(dim=1).values / 16
    assert static[0] < 0.5
    assert static[2] > 2


def test_the_same_traffic_gives_the_same_offsets():
    controls = [controller(), controller()]
    for control in controls:
        for reached in ([90, 10, 64], [64, 200, 3], [1, 2, 3]):
            serve(control, reached, rows=20)
    assert torch.equal(controls[0].offset, controls[1].offset)
    assert controls[0].offset.abs().max() > 0
