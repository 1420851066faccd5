"""How much every layer loses at several budgets, measured: runs with only that layer sparse.

The measure is the divergence of the next token's distribution from dense attention's. It is what the text's own
loss would rise by on average if the model had written the text, and on few rows it is far steadier than that loss.
"""

from collections.abc import Callable

import torch

from topt_vllm.attention.common import Thetas
from topt_vllm.calibration.allocation import Point
from topt_vllm.calibration.model import Subject
from topt_vllm.calibration.quality import ThresholdTally
from topt_vllm.calibration.replay import Replay

SCAN_ROWS = 256
SCAN_LENGTH = 4096
_SMALLEST_K = 8
_BELOW_ANY_SCORE = -1e30


def ladder(largest_k: int) -> tuple[int, ...]:
    """Numbers of keys that a layer may get: ``largest_k`` and every fourth part of it down to 8.

    Few, for each costs a run per layer; with many layers an allocation has fine steps all the same.
    """
    ks = [largest_k]
    while ks[-1] // 4 >= _SMALLEST_K:
        ks.append(ks[-1] // 4)
    return tuple(reversed(ks))


def scan_layer(
    replay: Replay, subject: Subject, layer: int, thetas: dict[int, Thetas], too_much: float
) -> list[Point]:
    """The curve of one layer.

    Args:
        replay: Of calibration text.
        subject: The model.
        layer: Index in the model.
        thetas: Thresholds of the layer by k.
        too_much: Smaller ks are left out once a k has lost this much (nats): no allocation would use them.

    Returns:
        Points by descending rows; dense attention first.
    """
    everything = _everything(next(iter(thetas.values())))
    floor, _ = _measure(replay, subject, layer, everything)
    points = [Point(None, 0.0, 1.0)]
    for k in sorted(thetas, reverse=True):
        loss, rows = _measure(replay, subject, layer, thetas[k])
        # With every row kept, too, the layer is computed another way than in the dense pass: what that loses is
        # rounding, no skipping.
        points.append(Point(k, max(loss - floor, 0.0), rows))
        if points[-1].loss > too_much:
            break
    return points


def scan(
    replay: Replay,
    subject: Subject,
    thetas: dict[int, dict[int, Thetas]],
    too_much: float,
    progress: Callable[[], object],
    done: dict[int, list[Point]],
    save: Callable[[int, list[Point]], None],
) -> dict[int, list[Point]]:
    """Curves of all layers.

    Args:
        replay: Of calibration text.
        subject: The model.
        thetas: Thresholds by layer and k.
        too_much: See :func:`scan_layer`.
        progress: Called after each layer.
        done: Curves known from a run before.
        save: Called with each new curve.
    """
    curves = dict(done)
    for layer, by_k in thetas.items():
        if layer not in curves:
            curves[layer] = scan_layer(replay, subject, layer, by_k, too_much)
            save(layer, curves[layer])
        progress()
    return {layer: curves[layer] for layer in thetas}


def _measure(replay: Replay, subject: Subject, layer: int, thetas: Thetas) -> tuple[float, float]:
    tally = ThresholdTally(subject.identity, {}, {layer: thetas}, replay.rows, subject.window)
    loss = replay.run(tally).kl
    return loss, tally.layer_rows_read()[layer]


def _everything(thetas: Thetas) -> Thetas:
    # Finite: θ between lengths is a weighted mean, which −inf makes NaN.
    return Thetas(
        thetas.lengths, torch.full_like(thetas.theta, _BELOW_ANY_SCORE), torch.zeros_like(thetas.law)
    )
