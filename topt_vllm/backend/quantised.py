"""CPU caches in fp8: which format vLLM's writer stores under which name, and the scales of a layer."""

from dataclasses import dataclass
from typing import Any

import torch

from topt_vllm.backend import compat


@dataclass(frozen=True)
class Quantisation:
    """How one layer's cache is stored; vLLM shows it as bytes.

    Attributes:
        dtype: What the bytes are.
        key_scale: float32 [1], K is what is stored times this.
        value_scale: float32 [1], the same for V.
    """

    dtype: torch.dtype
    key_scale: torch.Tensor
    value_scale: torch.Tensor


def quantisation_of(layer: Any) -> Quantisation | None:
    """That of a vLLM attention layer, whose weights are loaded; None for a cache in a dtype of its own."""
    dtype = compat.CPU_FP8_DTYPES.get(layer.impl.kv_cache_dtype)
    if dtype is None:
        return None
    scales = (torch.tensor([scale]) for scale in (layer._k_scale_float, layer._v_scale_float))
    return Quantisation(dtype, *scales)
