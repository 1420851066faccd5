"""The 8-bit K screen of the CPU kernel: the same keys as without it, and a bounded error of what is dropped."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import Case, finish, implementation, paged_cache, random_case

from topt_vllm.attention import api
from topt_vllm.attention.common import (
    DecodeBatch,
    KeyScreen,
    PagedCache,
    Policy,
    Stat,
    Thetas,
    new_statistics,
)

EXACT = [Stat.ROWS, Stat.ELEMENTS, Stat.KEPT_ELEMENTS, Stat.V_ROWS, Stat.V_ROWS_READ]


def with_screen(case: Case) -> Case:
    """The case with 8-bit copies of the blocks that lie wholly inside a context; the others hold garbage."""
    blocks, kv_heads, block_size, head_dim = case.cache.value.shape
    size = implementation("cpu").screen_bytes("int8", head_dim, block_size)
    codes = torch.randint(0, 256, (blocks, kv_heads, size), dtype=torch.uint8)
    cache = replace(case.cache, key_screen=KeyScreen("int8", codes))
    finish(cache, case.batch.block_table, case.batch.seq_lens.tolist(), "cpu")
    return replace(case, cache=cache)


def both(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(output without, output with, statistics without, statistics with)."""
    plain, screened = new_statistics(), new_statistics()
    return case.run("cpu", plain), with_screen(case).run("cpu", screened), plain[0], screened[0]


def largest_bound(case: Case) -> float:
    """Largest bound on the error of a screened, scaled score; see attention/cpu/README.md for the derivation."""
    width = 64 if case.query.shape[2] % 64 == 0 else case.query.shape[2]
    key = case.cache.key[case.cache.key.isfinite().all(dim=-1)].float()
    scale = key.unflatten(-1, (-1, width)).abs().amax(dim=-1).max() / 127
    query = case.query.float().abs()
    norm = key.abs().sum(dim=-1).max()
    bound = scale / 2 * query.sum(dim=-1).max() + query.max() / 254 * norm
    return float(1.05 * bound * case.scale)


def check(case: Case) -> torch.Tensor:
    """Same kept set; dropped mass and output within the bound. Returns the screened statistics."""
    without, screened, plain, counted = both(case)
    assert counted[EXACT].tolist() == plain[EXACT].tolist()
    # Each dropped score is off by e at most, so each head's dropped mass is off by a factor of exp(±e).
    factor = torch.tensor(largest_bound(case)).expm1()
    dropped = plain[Stat.DROPPED_MASS]
    assert abs(counted[Stat.DROPPED_MASS] - dropped) <= factor * dropped + 1e-4
    spread = case.cache.value[case.cache.value.isfinite()].abs().max()
    torch.testing.assert_close(screened, without, rtol=0.02, atol=float(factor * spread) * 0.2 + 1e-3)
    return counted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
def test_keeps_the_same_keys(head_dim: int, dtype: torch.dtype) -> None:
    case = random_case(
        [(1, 700), (1, 128), (1, 31)], head_dim=head_dim, dtype=dtype, keep=0.02, block_size=64
    )
    assert check(case)[Stat.K_ROWS_READ] < check(replace(case, thetas=None))[Stat.K_ROWS_READ]


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (9, 3), (8, 1), (16, 1)])
@pytest.mark.parametrize("group_keep", ["head", "union"])
@pytest.mark.parametrize("compensation", ["none", "vmean"])
def test_groups_and_policies(heads: int, kv_heads: int, group_keep: Any, compensation: Any) -> None:
    policy = Policy(sink_tokens=3, recent_tokens=70, group_keep=group_keep, compensation=compensation)
    check(random_case([(1, 1000), (1, 300)], heads, kv_heads, policy=policy, keep=0.01, block_size=128))


@pytest.mark.parametrize("rows", [2, 8, 11])
def test_multi_row_queries(rows: int) -> None:
    check(random_case([(rows, 400), (1, 257)], 3, 1, keep=0.02, block_size=64))


def test_softcap_is_taken_back_from_theta() -> None:
    check(random_case([(1, 900)], softcap=2.0, keep=0.02))


def test_short_contexts_and_dense_rows_are_exact() -> None:
    case = random_case([(1, 200), (1, 900)], policy=Policy(min_seq_len=1000))
    without, screened, plain, counted = both(case)
    assert torch.equal(without, screened)
    assert counted.tolist() == plain.tolist()
    assert counted[Stat.K_ROWS_READ] == counted[Stat.V_ROWS]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_keys_that_are_not_numbers_are_read_in_full(value: float) -> None:
    case = random_case([(1, 512)], heads=1, kv_heads=1, keep=0.01)
    block = int(case.batch.block_table[0, 3])
    case.cache.key[block, 0, 5, 7] = value
    without, screened, plain, counted = both(case)
    assert counted[EXACT].tolist() == plain[EXACT].tolist()
    torch.testing.assert_close(screened, without, equal_nan=True, rtol=0.02, atol=0.02)


def test_zero_keys_and_queries() -> None:
    case = random_case([(1, 512)], keep=0.01)
    case.cache.key.zero_()
    check(replace(case, query=torch.zeros_like(case.query)))


def test_reference_has_no_screen() -> None:
    with pytest.raises(ValueError, match="no K screen 'int8'; of those here, cpu has one"):
        api.require(implementation("reference"), screen="int8")
    with pytest.raises(ValueError, match="no K screen 'int8'; of those here, cpu has one"):
        with_screen(random_case([(1, 100)])).run("reference")


def test_formats_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="the cpu kernel has no K screen 'int4'; it has: int8"):
        implementation("cpu").screen_bytes("int4", 64, 32)


def replayed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, k: int) -> Case:
    """A decode call of the last token over a layer's K and V [Hkv, n, D], θ being each head's k-th best score."""
    kv_heads, n, head_dim = key.shape
    block_size = 128
    blocks = n // block_size
    pages = [part.unflatten(1, (blocks, block_size)).transpose(0, 1) for part in (key, value)]
    cache: PagedCache = paged_cache(*pages, state_rows=64)
    scores = (query.float().view(kv_heads, -1, head_dim) @ key.float().transpose(1, 2)).flatten(0, 1) * scale
    theta = scores.topk(k, dim=-1).values[:, -1:].contiguous()
    thetas = Thetas(torch.tensor([n], dtype=torch.int32), theta, torch.zeros(len(theta), 2))
    rows = DecodeBatch(
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([n], dtype=torch.int32),
        torch.arange(blocks, dtype=torch.int32)[None],
    )
    finish(cache, rows.block_table, [n])
    return Case(query[None], cache, rows, thetas, Policy(), scale)


@pytest.mark.engine
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_caches(name: str, request: pytest.FixtureRequest, unseen_play: Path) -> None:
    """Every full-attention layer of a real model over a real text: the same kept set."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from topt_vllm.replay.capture import captured
    from topt_vllm.replay.scores import LayerCall
    from topt_vllm.table.identity import identify

    folder = request.getfixturevalue(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokens = AutoTokenizer.from_pretrained(folder)(
        unseen_play.read_text(), truncation=True, max_length=2048, return_tensors="pt"
    )
    shares = []

    def observe(call: LayerCall) -> None:
        case = replayed(call.query[:, -1], call.key, call.value, call.scale, k=32)
        counted = check(case)
        shares.append(float(counted[Stat.K_ROWS_READ] / counted[Stat.V_ROWS]))

    with torch.inference_mode(), captured(model, identify(model.config, name), observe):
        model(input_ids=tokens["input_ids"], use_cache=False)
    # Gemma 3's keys have outlier channels, so the bound spares nearly nothing.
    layers, most = {"smollm2": (30, 0.7), "gemma3": (3, 1.0)}[name]
    assert len(shares) == layers
    assert sum(shares) / len(shares) < most
