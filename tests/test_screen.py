"""The K screen's numerics, and what the reference operator makes of them."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import Case, random_case
from screen_cases import transform_of, with_screen

from topt_vllm.attention.common import KeyScreen, Selection, Stat, new_statistics
from topt_vllm.attention.screen import (
    NOISE,
    ScreenTransform,
    hadamard_block,
    refined_scores,
    rotate,
    rotation_signs,
    rounded_up,
    screen_scores,
)

DIMS = [64, 80, 96, 128, 256]


def layer(head_dim: int, heads: int = 6, kv_heads: int = 2, n: int = 2000) -> tuple[Any, ...]:
    """(query [H, D], key [Hkv, n, D], its transform, exact scores [H, n])."""
    torch.manual_seed(head_dim)
    mean, scale = 3 * torch.randn(kv_heads, head_dim), torch.rand(kv_heads, head_dim) + 0.2
    key = (mean[:, None] + torch.randn(kv_heads, n, head_dim) * scale[:, None]).bfloat16()
    query = torch.randn(heads, head_dim)
    exact = (query.view(kv_heads, -1, head_dim) @ key.float().transpose(1, 2)).flatten(0, 1)
    return query, key, ScreenTransform(mean, scale, rotation_signs(0, head_dim)), exact


@pytest.mark.parametrize("head_dim", DIMS)
def test_rotation_keeps_products(head_dim: int) -> None:
    x, y = torch.randn(2, 5, head_dim)
    signs = rotation_signs(3, head_dim)
    product = (rotate(x, signs) * rotate(y, signs)).sum(-1) / hadamard_block(head_dim)
    torch.testing.assert_close(product, (x * y).sum(-1), rtol=1e-4, atol=1e-4)


def test_signs_are_the_same_everywhere() -> None:
    assert rotation_signs(0, 8).tolist() == [1.0, 1.0, 1.0, -1.0, -1.0, 1.0, -1.0, -1.0]
    assert not torch.equal(rotation_signs(0, 64), rotation_signs(1, 64))


@pytest.mark.parametrize("value", [0.0, 1e-9, 0.1, 1.0, 1.0001, 60000.0, 65519.0, 65521.0, math.inf])
def test_steps_are_rounded_up(value: float) -> None:
    rounded = rounded_up(torch.tensor([value]))
    assert float(rounded) >= value
    assert float(rounded) == value or float(rounded) <= max(value * 1.001, 6e-8) or value > 65504


@pytest.mark.parametrize("head_dim", DIMS)
def test_codes_are_within_half_a_step(head_dim: int) -> None:
    _, key, transform, _ = layer(head_dim)
    keys = transform.encode(key)
    z = rotate((key.float() - transform.mean[:, None]) / transform.scale[:, None], transform.signs)
    step = keys.step.float()[..., None]
    assert ((z - (keys.plane_one + 0.5) * step).abs() <= 0.501 * step).all()
    # The largest one may be a step's end.
    assert ((z - (keys.codes.float() + 0.5) * step / 16).abs() <= 0.51 * step / 16).all()
    error = (z - (keys.plane_one + 0.5) * step).norm(dim=-1)
    assert (keys.error.float() >= error).all()
    assert (keys.error.float() <= 1.02 * error).all()


@pytest.mark.parametrize("head_dim", DIMS)
def test_margins_are_standard_deviations(head_dim: int) -> None:
    query, key, transform, exact = layer(head_dim)
    keys, queries = transform.encode(key), transform.queries(query)
    scores, upper = screen_scores(queries, keys, 1.0, 1.0)
    deviations = (exact - scores) / (upper - scores)
    assert 0.93 < float(deviations.std()) < 1.07
    refined = refined_scores(queries, keys, 1.0)
    # A sixteenth, and the rounding of bfloat16 isn't in it: the codes are those of the rounded K.
    assert float((exact - refined).std() / (exact - scores).std()) == pytest.approx(1 / 16, rel=0.1)


@pytest.mark.parametrize("head_dim", DIMS)
def test_the_hard_bound_holds(head_dim: int) -> None:
    query, key, transform, exact = layer(head_dim)
    _, upper = screen_scores(transform.queries(query), transform.encode(key), None, 0.7)
    assert (0.7 * exact <= upper).all()


def test_zeros_and_constant_channels() -> None:
    key = torch.zeros(1, 3, 64)
    transform = ScreenTransform(torch.zeros(1, 64), torch.ones(1, 64), rotation_signs(0, 64))
    keys = transform.encode(key)
    assert keys.step.tolist() == [[0.0, 0.0, 0.0]]
    queries = transform.queries(torch.zeros(2, 64))
    assert refined_scores(queries, keys, 1.0).tolist() == [[0.0] * 3] * 2
    assert screen_scores(queries, keys, None, 1.0)[1].tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e30])
def test_rows_that_cannot_be_stored_have_no_score(value: float) -> None:
    query, key, transform, _ = layer(64)
    key[0, 7, 3] = value
    keys = transform.encode(key)
    assert keys.step.isnan().nonzero().tolist() == [[0, 7]]
    scores, upper = screen_scores(transform.queries(query), keys, 2.5, 1.0)
    assert scores[:3, 7].isnan().all()
    assert upper[:3, 7].isnan().all()
    assert not scores[3:].isnan().any()


def run(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    statistics = new_statistics()
    return case.run("reference", statistics), statistics[0]


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("group_keep", ["head", "union"])
def test_a_hard_bound_keeps_the_same_keys(group_keep: Any, softcap: float) -> None:
    selection = Selection(sink_tokens=3, recent_tokens=5, group_keep=group_keep)
    case = random_case([(3, 400), (1, 257)], 6, 2, selection=selection, softcap=softcap, keep=0.05)
    plain, counted = run(case)
    screened, screened_counts = run(with_screen(case, "reference", margin=None))
    kept = [Stat.ROWS, Stat.ELEMENTS, Stat.KEPT_ELEMENTS, Stat.V_ROWS, Stat.V_ROWS_READ]
    assert screened_counts[kept].tolist() == counted[kept].tolist()
    torch.testing.assert_close(screened, plain, rtol=0.02, atol=0.01)
    assert screened_counts[Stat.K_ROWS_READ] == screened_counts[Stat.CANDIDATES] < counted[Stat.CANDIDATES]


def test_two_planes_read_no_keys() -> None:
    case = random_case([(1, 900), (2, 300)], keep=0.05)
    plain, counted = run(case)
    screened, screened_counts = run(with_screen(case, "reference", "int4+4"))
    assert screened_counts[Stat.K_ROWS_READ] == 0
    assert 0 < screened_counts[Stat.CANDIDATES] < 0.5 * counted[Stat.CANDIDATES]
    torch.testing.assert_close(screened, plain, rtol=0.05, atol=0.03)


@pytest.mark.parametrize("format", ["int4", "int4+4"])
def test_rows_without_thresholds_are_exact(format: Any) -> None:
    case = random_case([(1, 200), (2, 300)], selection=Selection(min_seq_len=1000))
    plain, counted = run(case)
    screened, screened_counts = run(with_screen(case, "reference", format))
    assert torch.equal(plain, screened)
    assert counted.tolist() == screened_counts.tolist()
    assert counted[Stat.CANDIDATES] == counted[Stat.K_ROWS_READ] == counted[Stat.V_ROWS]


def test_bad_screens_are_refused() -> None:
    case = random_case([(1, 100)])
    transform, codes = transform_of(case), torch.empty(0, dtype=torch.uint8)
    with pytest.raises(ValueError, match="format is 'int3'; it must be one of int4, int4"):
        KeyScreen("int3", transform, codes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="margin is -1"):
        KeyScreen("int4", transform, codes, -1.0)
    narrow = ScreenTransform(transform.mean[:1], transform.scale, transform.signs)
    cache = with_screen(case, "reference").cache
    screen = replace(cache.key_screen, transform=narrow)
    with pytest.raises(ValueError, match=r"key_screen: mean \(1, 64\)"):
        replace(case, cache=replace(cache, key_screen=screen)).run("reference")


def test_noise_is_that_of_a_floor_code() -> None:
    assert pytest.approx(1 / math.sqrt(12), rel=1e-3) == NOISE
