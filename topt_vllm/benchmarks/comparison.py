"""Checks, then times ours against the platform's kernel on the same cache in the same process."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch

from topt_vllm.attention.common import Selection, Stat, Thetas
from topt_vllm.attention.screen import ScreenTransform
from topt_vllm.benchmarks.cases import Inputs
from topt_vllm.benchmarks.devices import CPU, Device
from topt_vllm.benchmarks.kernels import count, our_kernel
from topt_vllm.benchmarks.lengths import describe_lengths
from topt_vllm.benchmarks.oracle import Expectation, expect
from topt_vllm.benchmarks.screens import OFF, Screens, bytes_read, specified, ties, with_screen
from topt_vllm.benchmarks.timing import Variant, take_turns
from topt_vllm.table.words import budget_in_words


@dataclass(frozen=True)
class ThetaSet:
    """Thresholds to measure.

    Attributes:
        keep: The share of keys that they aim at.
        thetas: One entry per layer; None for dense.
        k: Budget of a threshold table, its k or name; None where there is none.
    """

    keep: float
    thetas: list[Thetas | None]
    k: int | str | None = None

    @property
    def dense(self) -> bool:
        """Whether every row is kept, so that a K screen has nothing to do."""
        return all(entry is None for entry in self.thetas)


@dataclass(frozen=True)
class _Column:
    """One of our variants on its cases, its largest error, what it counted by layer, and what skipping costs."""

    variant: Variant
    layers: Sequence[Inputs]
    target: ThetaSet
    k_screen: str
    error: float
    counts: torch.Tensor
    loss: float


def compare(
    layers: Sequence[Inputs],
    targets: Sequence[ThetaSet],
    screens: Screens,
    transforms: Sequence[ScreenTransform],
    selection: Selection,
    seconds: float,
    device: Device = CPU,
) -> list[dict[str, Any]]:
    """Checks every variant against float64, lets them take turns, and describes each.

    A call runs over copies of all layers, so that each cache has left the processor's own when its turn comes.

    Args:
        layers: The cases, all of one shape.
        targets: Thresholds.
        screens: For the targets that are not dense.
        transforms: Of the K screens, one per layer.
        selection: Selection and compensation.
        seconds: Time for the turns.
        device: Where the layers lie, and how to time there.

    Returns:
        One record per target and screen.

    Raises:
        RuntimeError: Ours is wrong; nothing is timed then. A rival that is wrong is left out with the reason.
        ValueError: There is no such K screen.
    """
    module, copies = device.implementation(layers[0]), device.copies(layers)
    # Views of an allocation stay views of its copy.
    copied = [*layers, *(deepcopy(inputs) for _ in range(copies - 1) for inputs in layers)]

    def ready(variant: Variant) -> Variant:
        return replace(device.ready(variant), copies=copies)

    dense = [expect(inputs, None, selection) for inputs in layers]
    dense_kernels, left_out = device.rivals(copied)
    rivals = []
    for rival in map(ready, dense_kernels):
        try:
            _check(rival, dense)
        except RuntimeError as wrong:
            left_out[rival.name] = str(wrong)
        else:
            rivals.append(rival)
    keep_all = ready(our_kernel("every row", module, copied, [None] * len(copied), selection))
    dense_error = _check(keep_all, dense)
    screened = {
        name: [
            with_screen(module, inputs, name, transform, screens.margin)
            for inputs, transform in zip(copied, [*transforms] * copies, strict=True)
        ]
        for name in screens.names
    }
    columns: list[_Column] = []
    for target in targets:
        if target.dense:
            counts = count(module, layers, target.thetas, selection)
            columns.append(_Column(keep_all, layers, target, OFF, dense_error, counts, 0.0))
            continue
        expected = [
            expect(inputs, theta, selection) for inputs, theta in zip(layers, target.thetas, strict=True)
        ]
        for name in screens.names:
            label = budget_in_words(target.k) if target.k else f"{target.keep:g} kept"
            title = f"{label}, k_screen {name}"
            variant = ready(our_kernel(title, module, screened[name], target.thetas * copies, selection))
            cases = screened[name][: len(layers)]
            error = _check(
                variant, expected if name == OFF else _screened(expected, cases, target, selection)
            )
            counts = count(module, cases, target.thetas, selection)
            columns.append(_Column(variant, cases, target, name, error, counts, _loss(variant, dense)))
    stream = device.stream(layers[0].memory)
    ours = [column.variant for column in columns if column.variant is not keep_all]
    take_turns([*rivals, keep_all, *ours], seconds, stream, device.measure)
    shared = _shared(rivals, left_out, keep_all, stream)
    return [_record(column, shared, selection) for column in columns]


def _screened(
    expected: Sequence[Expectation], layers: Sequence[Inputs], target: ThetaSet, selection: Selection
) -> list[Expectation]:
    """The expectations of a K screen, which says for itself what is kept: the reference operator's output."""
    return [
        replace(
            entry,
            exact=specified(inputs, theta, selection).double(),
            allowed=entry.allowed + (0.0 if theta is None else ties(inputs, theta, selection)),
        )
        for entry, inputs, theta in zip(expected, layers, target.thetas, strict=True)
    ]


def _loss(variant: Variant, dense: Sequence[Expectation]) -> float:
    """Relative L2 error of the heads' outputs against dense attention, mean over layers; copies add nothing."""
    errors = [
        float((out.double() - entry.exact).norm() / entry.exact.norm())
        for out, entry in zip(variant.outs[: len(dense)], dense, strict=True)
    ]
    return sum(errors) / len(errors)


def _check(variant: Variant, expected: Sequence[Expectation]) -> float:
    """Largest error of any layer.

    Raises:
        RuntimeError: One is larger than rounding explains, or rounding would explain nearly anything.
    """
    for out in variant.outs:
        out.fill_(float("nan"))
    variant.call()
    tied, kept = sum(entry.ties for entry in expected), sum(entry.kept for entry in expected)
    if tied > max(2, kept // 100):
        raise RuntimeError(
            f"{variant.name}: rounding decides about {tied} of {kept} keys, so a check would say little; not timed"
        )
    largest = 0.0
    for index, (out, expectation) in enumerate(zip(variant.outs, [*expected] * variant.copies, strict=True)):
        error = expectation.error(out)
        if not error <= expectation.allowed:
            raise RuntimeError(
                f"{variant.name}: error {error:.3g} against float64 in the call's layer {index % len(expected)}, "
                f"allowed {expectation.allowed:.3g}; not timed"
            )
        largest = max(largest, error)
    return largest


def _bytes_moved(layers: Sequence[Inputs], counts: torch.Tensor, compensated: bool) -> int:
    """Rows of K and V that were read in full, a V sum each, and what a K screen reads (bytes)."""
    shape = layers[0].shape
    row = shape.head_dim * layers[0].cache.key.element_size()
    moved = int(counts[Stat.K_ROWS_READ] + counts[Stat.V_ROWS_READ]) * row
    if compensated:
        reading = sum(n > shape.state_rows for n in shape.lengths)
        moved += len(layers) * reading * shape.kv_heads * shape.head_dim * 4
    return moved + bytes_read(layers[0], counts)


def _shared(
    rivals: Sequence[Variant], left_out: dict[str, str], keep_all: Variant, stream: Variant
) -> dict[str, Any]:
    """What is the same in all records: what ours are compared with."""
    stock = min(rivals, key=lambda rival: rival.median, default=None)
    return {
        "platform": stock.name if stock else None,
        "rivals": {rival.name: rival.median for rival in rivals},
        "left_out": left_out,
        "ms_platform": stock.median if stock else None,
        "ms_platform_p20": stock.quantile(0.2) if stock else None,
        "ms_platform_p80": stock.quantile(0.8) if stock else None,
        "ms_keep_all": keep_all.median,
        "streaming_gbps": stream.outs[0].nbytes / stream.median / 1e6,
    }


def _record(column: _Column, shared: dict[str, Any], selection: Selection) -> dict[str, Any]:
    """What a column was and took, beside what all share."""
    shape, variant, counts = column.layers[0].shape, column.variant, column.counts.sum(dim=0)
    compensated = selection.compensation == "vmean" and not column.target.dense
    ms, moved = variant.median, _bytes_moved(column.layers, counts, compensated)
    return shared | {
        "batch": shape.batch,
        "seq_len": shape.longest,
        "lengths": describe_lengths(shape.lengths),
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "block_size": shape.block_size,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "cache_dtype": str(shape.cache or shape.dtype).removeprefix("torch."),
        "layers": len(column.layers),
        "copies": variant.copies,
        "k": column.target.k,
        "keep_target": column.target.keep,
        "k_screen": column.k_screen,
        "v_rows_read": float(counts[Stat.V_ROWS_READ] / counts[Stat.V_ROWS]),
        "k_rows_read": float(counts[Stat.K_ROWS_READ] / counts[Stat.V_ROWS]),
        "candidates": float(counts[Stat.CANDIDATES] / counts[Stat.V_ROWS]),
        "loss": column.loss,
        "ms": ms,
        "ms_p20": variant.quantile(0.2),
        "ms_p80": variant.quantile(0.8),
        "ratio_platform": shared["ms_platform"] / ms if shared["platform"] else None,
        "ratio_keep_all": shared["ms_keep_all"] / ms,
        "bytes_moved": moved,
        "gbps": moved / ms / 1e6,
        "bandwidth_share": moved / ms / 1e6 / shared["streaming_gbps"],
        "max_error": column.error,
        "rounds": len(variant.seconds),
    }
