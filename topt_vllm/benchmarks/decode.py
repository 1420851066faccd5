"""Synthetic decode calls: one batch, thresholds that read given shares of V rows."""

from collections.abc import Sequence
from typing import Any

from topt_vllm.attention.common import Selection
from topt_vllm.benchmarks.cases import Shape, thetas_for
from topt_vllm.benchmarks.comparison import ThetaSet, compare
from topt_vllm.benchmarks.devices import CPU, Device
from topt_vllm.benchmarks.screens import NO_SCREEN, Screens, plain_transform


def bench_case(
    shape: Shape,
    keeps: Sequence[float],
    selection: Selection,
    seconds: float = 2.0,
    screens: Screens = NO_SCREEN,
    device: Device = CPU,
) -> list[dict[str, Any]]:
    """Checks, then times one shape at every share of V rows.

    Args:
        shape: Dimensions.
        keeps: Target shares of V rows.
        selection: Selection and compensation.
        seconds: Time for the turns of this shape.
        screens: K screens to measure.
        device: Where to measure.

    Returns:
        One record per share and screen; every row kept has none to try.

    Raises:
        ValueError: As :func:`topt_vllm.benchmarks.cases.thetas_for`; no such K screen.
        RuntimeError: As :func:`topt_vllm.benchmarks.comparison.compare`.
    """
    inputs = device.inputs(shape)
    targets = [ThetaSet(keep, [thetas_for(inputs, keep, selection)]) for keep in keeps]
    return compare([inputs], targets, screens, [plain_transform(shape)], selection, seconds, device)
