"""Times launch parameters of the Triton decode kernel for one call, beside what the heuristic chooses."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import product
from statistics import median
from typing import Any

import torch

from topt_vllm.attention.common import Selection, Thetas
from topt_vllm.attention.triton.calls import Call, DecodeStep
from topt_vllm.attention.triton.launch import Launch, limits_of
from topt_vllm.attention.triton.launcher import interpreted
from topt_vllm.benchmarks.cases import Inputs
from topt_vllm.benchmarks.compile import CHIPS, Chip, compile_call, resources
from topt_vllm.benchmarks.devices import Gpu
from topt_vllm.benchmarks.oracle import expect

_TURNS = 20


def candidates(chosen: Launch) -> list[Launch]:
    """The heuristic's choice, then tiles, gathers, stages and programs around it."""
    programs = sorted({max(1, chosen.programs // 2), chosen.programs, chosen.programs * 2})
    tried = [
        replace(
            chosen,
            tile=tile,
            gather=gather,
            key_stages=key_stages,
            value_stages=value_stages,
            programs=count,
        )
        for tile, gather, key_stages, value_stages, count in product(
            (32, 64, 128), (16, 32, 64), (3, 5, 7), (3, 5, 7), programs
        )
    ]
    return [chosen, *(launch for launch in tried if launch != chosen)]


def why_not(used: dict[str, int], num_warps: int, chip: Chip) -> str | None:
    """Why code that takes this much is not worth timing; None if it is."""
    if used["spills"]:
        return f"spills {used['spills']}: registers in memory cost what the tile gains"
    if not chip.occupancy(used["registers"], used["shared_bytes"], num_warps):
        return (
            f"{used['shared_bytes']} bytes of shared memory and {used['registers']} registers: no block fits"
        )
    return None


def compiled_for(chip: Chip) -> Callable[[Call], dict[str, int]]:
    """What a launch takes on a chip, compiled once for all numbers of programs."""
    known: dict[tuple[int, ...], dict[str, int]] = {}

    def used(call: Call) -> dict[str, int]:
        code = tuple(call.arguments[name] for name in ("TILE", "GATHER", "KEY_STAGES", "VALUE_STAGES"))
        if code not in known:
            known[code] = resources(*compile_call(call, chip.triton))
        return known[code]

    return used


def chip_of(device: torch.device) -> Chip:
    """The compiler's view of a GPU.

    Raises:
        ValueError: Its limits are not known.
    """
    major, minor = torch.cuda.get_device_capability(device)
    properties = torch.cuda.get_device_properties(device)
    name = properties.gcnArchName.partition(":")[0] if torch.version.hip else f"sm_{major}{minor}"
    if name not in CHIPS:
        raise ValueError(f"bench autotune knows the limits of {', '.join(CHIPS)}, and this GPU is {name}")
    return CHIPS[name]


def tune(
    inputs: Inputs,
    thetas: Thetas | None,
    selection: Selection,
    gpu: Gpu,
    chip: Chip,
    used: Callable[[Call], dict[str, int]],
    choose: Callable[[Launch], Sequence[Launch]] = candidates,
) -> list[dict[str, Any]]:
    """One record per candidate: the heuristic's first, then those that were timed, fastest first, then the rest.

    Args:
        inputs: The case.
        thetas: Thresholds, None for dense.
        selection: Selection and compensation.
        gpu: Where it lies.
        chip: Its limits.
        used: What a launch takes.
        choose: From the heuristic's choice to the candidates, that choice being the first.

    Raises:
        RuntimeError: A candidate's output is wrong.
    """
    step = DecodeStep(**vars(inputs.arguments(thetas, selection, torch.empty_like(inputs.query))))
    expected = expect(inputs, thetas, selection)
    heuristic, *others = [
        _try(launch, step, gpu, chip, used, expected)
        for launch in choose(step.choose(limits_of(gpu.device), None))
    ]
    return [heuristic, *sorted(others, key=lambda record: record["ms"] or math.inf)]


def _try(launch: Launch, step: DecodeStep, gpu: Gpu, chip: Chip, used: Any, expected: Any) -> dict[str, Any]:
    memory = torch.empty(sum(step.words(launch).values()), device=gpu.device)
    calls = step.calls(launch, memory, interpreted())
    *_, decode, _ = calls
    reason = why_not(used(decode), launch.num_warps, chip)
    record = {**asdict(launch), "ms": None, "left_out": reason}
    if reason:
        return record

    def run() -> None:
        for call in calls:
            call.launch()

    captured = gpu.capture(run)
    step.out.fill_(float("nan"))
    captured()
    error = expected.error(step.out)
    if not error <= expected.allowed:
        raise RuntimeError(f"{launch}: error {error:.3g} against float64, allowed {expected.allowed:.3g}")
    return {**record, "ms": 1e3 * median(gpu.measure(captured) for _ in range(_TURNS))}
