"""A KV cache captured from a real model, as one safetensors file.

Tensors ``layer.N.query`` [H, D], ``layer.N.key`` and ``layer.N.value`` [Hkv, n, D], bfloat16, as the attention
function sees them (after the rotary embedding); the header says which model and text they came from.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from topt_vllm.errors import UserError
from topt_vllm.output import in_one_step
from topt_vllm.table.identity import ModelIdentity

FORMAT = "topt-vllm-cache-1"
_PARTS = ("query", "key", "value")


class CacheFileError(UserError):
    """A file that can't be used; the message names it and says what is wrong."""


@dataclass(frozen=True)
class CapturedLayer:
    """One attention layer at the last token of the text.

    Attributes:
        query: [H, D], of the last token.
        key: [Hkv, n, D].
        value: [Hkv, n, D].
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True)
class CapturedCache:
    """Every full-attention layer of one model over one text.

    Attributes:
        identity: Of the model.
        text: Names of the text files.
        seq_len: n, tokens.
        scale: Factor of q·k.
        softcap: Logits softcap, 0 for none.
        layers: By index in the model, ascending.
    """

    identity: ModelIdentity
    text: str
    seq_len: int
    scale: float
    softcap: float
    layers: dict[int, CapturedLayer]

    def save(self, path: Path) -> None:
        """Writes the file in one step.

        Raises:
            OSError: It exists, or can't be written.
        """
        from safetensors.torch import save_file

        tensors = {
            f"layer.{index}.{part}": getattr(layer, part).contiguous()
            for index, layer in self.layers.items()
            for part in _PARTS
        }
        facts = {
            "format": FORMAT,
            "model": self.identity.model_dump_json(),
            "text": self.text,
            "seq_len": str(self.seq_len),
            "scale": repr(self.scale),
            "softcap": repr(self.softcap),
            "layers": json.dumps(list(self.layers)),
        }
        with in_one_step(path) as temporary:
            save_file(tensors, temporary, metadata=facts)


def load(path: Path) -> CapturedCache:
    """Reads a file that :meth:`CapturedCache.save` wrote.

    Raises:
        CacheFileError: It is missing, isn't such a file, or doesn't hold what its header says.
    """
    from safetensors import SafetensorError, safe_open

    # A device or a pipe may never end.
    if not path.is_file():
        raise CacheFileError(f"{path}: not a captured cache: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            if facts.get("format") != FORMAT:
                raise ValueError(
                    f"format is {facts.get('format')!r:.100}, {FORMAT!r} expected; make it with "
                    "`topt-vllm bench capture`"
                )
            cache = CapturedCache(
                identity=ModelIdentity.model_validate_json(facts["model"]),
                text=facts["text"],
                seq_len=int(facts["seq_len"]),
                scale=float(facts["scale"]),
                softcap=float(facts["softcap"]),
                layers={index: _layer(file, index) for index in json.loads(facts["layers"])},
            )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = str(error).replace("\n", " ")[:300]
        raise CacheFileError(f"{path}: not a captured cache: {reason}") from error
    _check(cache, path)
    return cache


def _layer(file: Any, index: int) -> CapturedLayer:
    return CapturedLayer(*(file.get_tensor(f"layer.{index}.{part}") for part in _PARTS))


def _check(cache: CapturedCache, path: Path) -> None:
    identity = cache.identity
    cached = (identity.num_kv_heads, cache.seq_len, identity.head_dim)
    shapes = {"query": (identity.num_query_heads, identity.head_dim), "key": cached, "value": cached}
    for index, layer in cache.layers.items():
        for part, shape in shapes.items():
            tensor = getattr(layer, part)
            if tensor.shape != shape or tensor.dtype != torch.bfloat16:
                raise CacheFileError(
                    f"{path}: layer.{index}.{part} is {tensor.dtype} {tuple(tensor.shape)}, "
                    f"the header says torch.bfloat16 {shape}"
                )
