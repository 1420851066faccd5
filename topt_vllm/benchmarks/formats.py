"""What formats of one byte an element cost on a captured cache: errors of K, of V and of the attention output."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from topt_vllm.attention import posit
from topt_vllm.attention.common import Selection
from topt_vllm.attention.reference import attend_row
from topt_vllm.benchmarks.cache_file import CapturedCache

Rounding = Callable[[torch.Tensor], torch.Tensor]


def rounded(dtype: torch.dtype) -> Rounding:
    """To the nearest number of an fp8 format, saturating."""
    largest = torch.finfo(dtype).max
    return lambda values: values.float().clamp(-largest, largest).to(dtype).float()


def cut_off(dtype: torch.dtype) -> Rounding:
    """To the next number of an fp8 format towards zero, as vLLM's CPU cache writer does (0.32)."""

    def cut(values: torch.Tensor) -> torch.Tensor:
        nearest = rounded(dtype)(values).to(dtype)
        beyond = nearest.float().abs() > values.float().abs()
        # The codes of one sign rise with the magnitude.
        return (nearest.view(torch.uint8) - beyond.to(torch.uint8)).view(dtype).float()

    return cut


FORMATS: dict[str, Rounding] = {
    "fp8_e4m3": rounded(torch.float8_e4m3fn),
    "fp8_e4m3, cut off": cut_off(torch.float8_e4m3fn),
    "fp8_e5m2": rounded(torch.float8_e5m2),
    "fp8_e5m2, cut off": cut_off(torch.float8_e5m2),
    "posit8": lambda values: posit.decode(posit.encode(values)),
}


@dataclass(frozen=True)
class FormatError:
    """Root mean square errors of one format, as shares of the root mean square of what is stored, over all layers.

    Attributes:
        name: Key of ``FORMATS``.
        key: Of K.
        value: Of V.
        output: Of the last token's dense attention, K and V both in the format.
    """

    name: str
    key: float
    value: float
    output: float


def format_errors(captured: CapturedCache) -> list[FormatError]:
    """Every format on every layer of a capture, stored without scales."""
    return [_errors(captured, name, store) for name, store in FORMATS.items()]


def _errors(captured: CapturedCache, name: str, store: Rounding) -> FormatError:
    # [K, V, output], sums of squares of the error and of the exact numbers.
    squares = torch.zeros(3, 2, dtype=torch.float64)
    for layer in captured.layers.values():
        key, value = store(layer.key), store(layer.value)
        how = None, Selection(), captured.scale, captured.softcap
        exact = attend_row(layer.query, layer.key, layer.value, *how)
        pairs = (key, layer.key), (value, layer.value), (attend_row(layer.query, key, value, *how), exact)
        for index, (found, true) in enumerate(pairs):
            error = found.double() - true.double()
            squares[index] += torch.stack([error.square().sum(), true.double().square().sum()])
    return FormatError(name, *(squares[:, 0] / squares[:, 1]).sqrt().tolist())
