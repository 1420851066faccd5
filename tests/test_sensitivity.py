"""How much loss an error of a layer makes, where rounding makes some too."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from topt_vllm.attention.common import Thetas
from topt_vllm.calibration import sensitivity
from topt_vllm.calibration.head_errors import HeadErrors


@pytest.mark.parametrize("rounding", [0.0, 1e-8, 0.0018], ids=["none", "float32", "bfloat16"])
def test_sensitivity_is_taken_where_rounding_does_not_hide_it(
    rounding: float, monkeypatch: pytest.MonkeyPatch
):
    """A layer's share of one per cent is less than bfloat16's rounding, and may then measure as nothing at all."""
    ks = tuple(1 << power for power in range(12))
    thetas = [Thetas(torch.tensor([8]), torch.zeros(1, 1), torch.zeros(1, 2)) for _ in ks]
    energies = torch.tensor([[100.0 / k for k in ks]], dtype=torch.float64)
    errors = HeadErrors(energies, energies, energies[0])
    true = 0.01
    number = {id(entry): index for index, entry in enumerate(thetas)}

    def divergence(*call: Any) -> float:
        if id(call[-1]) not in number:
            return rounding
        lost = true * float(energies[0, number[id(call[-1])]])
        return rounding + lost if lost > rounding else 0.9 * rounding

    monkeypatch.setattr(sensitivity, "_divergence", divergence)
    subject = SimpleNamespace(full_layers=range(30))
    found = sensitivity.sensitivity(None, subject, 0, ks, thetas, errors)
    assert found == pytest.approx(true, rel=1e-3)


def test_a_layer_that_rounding_hides_altogether_is_not_taken_for_free(monkeypatch: pytest.MonkeyPatch):
    thetas = [Thetas(torch.tensor([8]), torch.zeros(1, 1), torch.zeros(1, 2)) for _ in range(2)]
    energies = torch.tensor([[2.0, 1.0]], dtype=torch.float64)
    monkeypatch.setattr(sensitivity, "_divergence", lambda *_: 0.002)
    errors = HeadErrors(energies, energies, energies[0])
    subject = SimpleNamespace(full_layers=range(30))
    assert sensitivity.sensitivity(None, subject, 0, (1, 16), thetas, errors) > 0
