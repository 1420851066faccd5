"""Synthetic decode calls: one batch, thresholds that read given shares of V rows."""

from collections.abc import Sequence
from typing import Any

from topt_vllm.attention.common import Policy
from topt_vllm.benchmarks.cases import Shape, thetas_for
from topt_vllm.benchmarks.comparison import ThetaSet, compare
from topt_vllm.benchmarks.devices import CPU, Device


def bench_case(
    shape: Shape,
    keeps: Sequence[float],
    policy: Policy,
    seconds: float = 2.0,
    k_screens: Sequence[str] = ("off",),
    device: Device = CPU,
) -> list[dict[str, Any]]:
    """Checks, then times one shape at every share of V rows.

    Args:
        shape: Dimensions.
        keeps: Target shares of V rows.
        policy: Selection and compensation.
        seconds: Time for the turns of this shape.
        k_screens: Values of ``k_screen``.
        device: Where to measure.

    Returns:
        One record per share and screen; every row kept has none to try.

    Raises:
        ValueError: As :func:`topt_vllm.benchmarks.cases.thetas_for`.
        RuntimeError: As :func:`topt_vllm.benchmarks.comparison.compare`.
    """
    inputs = device.inputs(shape)
    targets = [ThetaSet(keep, [thetas_for(inputs, keep, policy)]) for keep in keeps]
    return compare([inputs], targets, k_screens, policy, seconds, device)
