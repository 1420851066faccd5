"""Prompts on vLLM's AMX kernels: what is copied of the cache, when, and that attention is what it was."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from adapter_cases import CLOSE, CPU, BatchSpec, vllm_config
from adapter_engine import make_rig

from topt_vllm.attention import reference
from topt_vllm.attention.common import PagedCache
from topt_vllm.attention.cpu import launcher

if CPU.backend is None:
    pytest.skip("vLLM's build here has no CPU kernels", allow_module_level=True)

from topt_vllm.backend.hosts import amx
from topt_vllm.backend.hosts.amx import Copies, CopyMetadata

__all__ = ["make_rig", "vllm_config"]

amx_only = pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="needs a CPU with AMX")


def vector_cache(
    blocks: int, kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype
) -> PagedCache:
    """Any bits, NaN among them, with other memory between blocks."""
    memory = torch.randint(0, 256, (blocks, 2, kv_heads, 2 * block_size, head_dim * dtype.itemsize))
    key, value = memory.to(torch.uint8).view(dtype)[:, 0].chunk(2, dim=2)
    key = key.as_strided((blocks, kv_heads, block_size, head_dim), (*key.stride()[:2], 1, block_size))
    return PagedCache(key, value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("kv_heads", "block_size", "head_dim"), [(3, 128, 64), (2, 32, 96), (1, 96, 256)])
def test_tiles_pair_channels_of_k_and_tokens_of_v(
    dtype: torch.dtype, kv_heads: int, block_size: int, head_dim: int
):
    cache = vector_cache(6, kv_heads, block_size, head_dim, dtype)
    blocks = torch.tensor([4, 0, 5, 4])
    copy = torch.empty(4, kv_heads, block_size, 2 * head_dim, dtype=dtype)
    launcher.copy_to_amx(cache, blocks, copy)
    bits = torch.int16 if dtype.itemsize == 2 else torch.uint8
    found = copy.view(bits).view(4, kv_heads, 2, -1).unbind(2)
    key, value = (part.view(bits)[blocks] for part in (cache.key, cache.value))
    tokens = key.unflatten(2, (-1, 16)).unflatten(4, (-1, 2)).transpose(3, 4)  # 16 tokens, pairs of channels
    channels = value.unflatten(2, (-1, 2)).unflatten(4, (-1, 16)).permute(0, 1, 4, 2, 5, 3)
    assert torch.equal(found[0], tokens.flatten(2))
    assert torch.equal(found[1], channels.flatten(2))


@pytest.mark.parametrize(
    ("blocks", "copy", "message"),
    [
        ([0, 3], torch.empty(2, 1, 32, 128, dtype=torch.bfloat16), "blocks: expected 0 to 2, got 3"),
        ([-1], torch.empty(1, 1, 32, 128, dtype=torch.bfloat16), "got -1"),
        ([0, 1], torch.empty(1, 1, 32, 128, dtype=torch.bfloat16), "copy: expected 8192 contiguous"),
        ([0], torch.empty(1, 1, 32, 128, dtype=torch.float16), "copy: expected 4096 contiguous elements"),
    ],
)
def test_what_is_not_there_is_not_copied(blocks: list[int], copy: torch.Tensor, message: str):
    cache = vector_cache(3, 1, 32, 64, torch.bfloat16)
    with pytest.raises(RuntimeError, match=message):
        launcher.copy_to_amx(cache, torch.tensor(blocks), copy)


def batch_of(contexts: list[int], rows: list[int]) -> Any:
    starts = torch.nn.functional.pad(torch.tensor(rows).cumsum(0), (1, 0))
    table = torch.arange(100, 100 + 8 * len(contexts), dtype=torch.int32).view(-1, 8).flip(1)
    return SimpleNamespace(
        num_reqs=len(contexts),
        seq_lens=torch.tensor(contexts, dtype=torch.int32),
        query_start_loc_cpu=starts.int(),
        block_table_tensor=table,
    )


def test_a_copy_has_the_blocks_that_contexts_reach():
    copy = Copies(launcher, 32, 2, 1000).of(batch_of([70, 32, 33], [70, 32, 33]))
    assert copy is not None
    assert copy.blocks.tolist() == [107, 106, 105, 115, 123, 122]
    assert copy.block_table.tolist() == [[0, 1, 2], [3, 0, 0], [4, 5, 0]]
    assert copy.block_table.dtype == torch.int32


@pytest.mark.parametrize(
    ("contexts", "rows", "most", "copied"),
    [
        ([200], [32], 200, True),
        ([200], [31], 200, False),  # too few rows read it
        ([200], [32], 199, False),  # too large
        ([200, 100], [1, 100], 300, True),  # on average
        ([0], [1], 100, False),  # padding
    ],
)
def test_a_copy_is_made_where_it_pays(contexts: list[int], rows: list[int], most: int, copied: bool):
    assert (Copies(launcher, 32, 2, most).of(batch_of(contexts, rows)) is not None) == copied


@pytest.mark.parametrize(
    ("implementation", "kv_cache_dtype", "permitted", "reason"),
    [
        (launcher, "fp8", True, "of fp8_e4m3 they are inexact"),
        (reference, "auto", True, "the implementation doesn't copy caches"),
        (launcher, "auto", False, "Linux doesn't let this process use AMX"),
    ],
)
def test_the_log_says_why_prompts_take_vector_kernels(
    monkeypatch: pytest.MonkeyPatch, implementation: Any, kv_cache_dtype: str, permitted: bool, reason: str
):
    said: list[str] = []
    monkeypatch.setattr(amx.logger, "info", lambda text, *values: said.append(text % values))
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: permitted)
    assert not amx.reads(implementation, torch.bfloat16, kv_cache_dtype)
    assert len(said) == 1
    assert said[0].endswith(f"AMX kernels: {reason}")


@amx_only
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_e5m2"])
def test_copies_are_laid_out_as_vllm_writes(monkeypatch: pytest.MonkeyPatch, kv_cache_dtype: str):
    said: list[str] = []
    monkeypatch.setattr(amx.logger, "info", lambda text, *values: said.append(text % values))
    assert amx.reads(launcher, torch.bfloat16, kv_cache_dtype)
    assert not said
    monkeypatch.setattr(launcher, "copy_to_amx", lambda cache, blocks, copy: copy.zero_())
    assert not amx.reads(launcher, torch.bfloat16, kv_cache_dtype)
    assert "this vLLM lays out caches for AMX in another way" in said[0]


@amx_only
@pytest.mark.parametrize(
    ("groups", "kv_cache_dtype"),
    [(1, "auto"), (2, "auto"), (1, "fp8_e5m2")],
    ids=["alone", "beside_windows", "fp8"],
)
def test_prompts_are_attended_to_in_full(make_rig: Any, groups: int, kv_cache_dtype: str):
    """In one piece, in pieces, and beside decode rows; layers with windows have the platform's own layout."""
    rig = make_rig(CPU, None, layers=groups, windows=[None, 64][:groups], kv_cache_dtype=kv_cache_dtype)
    assert [layer.isa for layer in rig.layers] == ["vec", "amx"][:groups]
    # vLLM's AMX kernels round probabilities to bfloat16, of numbers up to 448 in fp8.
    close = CLOSE if kv_cache_dtype == "auto" else {"atol": 5e-2, "rtol": 5e-2}
    batches = [
        BatchSpec("whole", [300, 130], [300, 130]),
        BatchSpec("piece", [410, 240], [110, 110]),
        BatchSpec("beside", [411, 341], [1, 101]),
    ]
    for batch in batches:
        step = rig.step(batch)
        assert isinstance(step.metadata.prefill, CopyMetadata)
        torch.testing.assert_close(step.output.float(), rig.dense(step), **close)
    few = rig.step(BatchSpec("few", [412, 349], [1, 8]))
    assert not isinstance(few.metadata.prefill, CopyMetadata)
    torch.testing.assert_close(few.output.float(), rig.dense(few), **close)


@amx_only
def test_caches_that_layers_share_have_one_layout(make_rig: Any):
    rig = make_rig(CPU, None, layers=2, windows=[None, 64])
    builder = rig.builders[1]
    rig.layers[1].kv_sharing_target_layer_name = rig.layers[0].layer_name
    again = type(builder)(
        builder.kv_cache_spec, [layer.layer_name for layer in rig.layers], rig.config, torch.device("cpu")
    )
    assert again._platform.isa == "vec"
    assert [layer.isa for layer in rig.layers] == ["vec", "vec"]
