"""Random cases with a K screen, and what its results must be."""

from dataclasses import replace

import torch
from attention_cases import Case, finish, implementation

from topt_vllm.attention.common import KeyScreen
from topt_vllm.attention.screen import ScreenFormat, ScreenTransform, rotation_signs


def transform_of(case: Case) -> ScreenTransform:
    """Mean and scale of the case's own keys, as the calibrator takes them."""
    kv_heads, head_dim = case.cache.key.shape[1], case.cache.key.shape[3]
    mean, variance = [], []
    for head in range(kv_heads):
        keys = torch.cat(
            [case.gather(sequence, n)[0][head].float() for _, sequence, n in case.rows()]
            or [torch.zeros(1, head_dim)]
        )
        keys = keys[keys.isfinite().all(dim=-1)]
        mean.append(keys.mean(dim=0))
        variance.append(keys.var(dim=0, correction=0).clamp(min=1e-4))
    scale = torch.stack(variance) ** 0.25
    return ScreenTransform(torch.stack(mean), scale.contiguous(), rotation_signs(0, head_dim))


def with_screen(case: Case, name: str, format: ScreenFormat = "int4", margin: float | None = 2.5) -> Case:
    """The case with a K screen that an implementation has written; codes of other rows are garbage."""
    blocks, kv_heads, block_size, head_dim = case.cache.value.shape
    size = implementation(name).screen_bytes(format, head_dim, block_size)
    codes = torch.randint(0, 256, (blocks, kv_heads, size), dtype=torch.uint8)
    screen = KeyScreen(format, transform_of(case), codes, margin)
    screened = replace(case, cache=replace(case.cache, key_screen=screen))
    finish(screened.cache, case.batch.block_table, case.batch.seq_lens.tolist(), name)
    return screened
