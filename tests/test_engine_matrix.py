"""Features of vLLM's engine on real models, through TOPTHETA: stock's tokens at θ = −inf, and sparse with a table.

One engine per model and backend runs all features, one after the other, in a cache that is just large enough.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from engine_runs import assert_same_tokens
from matrix_scenarios import CHUNK, SCHEMA, SHARED, gemma3_run, smollm2_run
from scenario_runs import DENSE, SPARSE, SPARSE_BY_HEAD, STOCK, sparse_rows

from topt_vllm.verify.near_ties import compare

pytestmark = pytest.mark.engine

FEATURES = [
    "continuous_batching",
    "chunked_prefill",
    "prefix_caching",
    "abort",
    "parallel_sampling",
    "beam_search",
    "structured_output",
    "preemption",
]
# Windows matter to how prefixes are cached and batches built.
GEMMA_FEATURES = ["continuous_batching", "chunked_prefill", "prefix_caching"]
GEMMA_FULL, GEMMA_WINDOWED = 3, 15


def assert_stock_answers(ours: dict[str, Any], stock: dict[str, Any], feature: str) -> None:
    """Equal up to near ties where an answer is greedy; others have no logits that a tie could be read off."""
    assert stock[feature]["toptheta"] is None, "TOPTHETA's code ran although it was not chosen"
    if feature in ("parallel_sampling", "beam_search", "structured_output"):
        assert ours[feature]["tokens"] == stock[feature]["tokens"]
    else:
        assert_same_tokens(ours[feature]["tokens"], stock[feature], stock["dtype"])


@pytest.mark.parametrize("feature", FEATURES)
def test_theta_minus_infinity_gives_stock_tokens(smollm2: Path, unseen_play: Path, feature: str):
    stock, ours = (smollm2_run(smollm2, unseen_play, backend) for backend in (STOCK, DENSE))
    assert_stock_answers(ours, stock, feature)
    counted = ours[feature]["toptheta"]
    assert counted["toptheta:v_rows_read_total"] == counted["toptheta:v_rows_total"] > 0
    assert counted["dense_rows:no_thresholds"] == counted["toptheta:decode_rows_total"]


@pytest.mark.parametrize("feature", FEATURES)
def test_a_table_stays_sparse(smollm2: Path, unseen_play: Path, feature: str):
    counted = smollm2_run(smollm2, unseen_play, SPARSE)[feature]["toptheta"]
    short = feature == "continuous_batching"
    assert sparse_rows(counted, allowed=["short_context"] if short else []) > 0
    assert 0 < counted["toptheta:v_rows_read_total"] < 0.6 * counted["toptheta:v_rows_total"]


@pytest.mark.parametrize("feature", GEMMA_FEATURES)
def test_theta_minus_infinity_gives_stock_tokens_beside_windows(
    gemma3: Path, unseen_play: Path, feature: str
):
    stock, ours = (gemma3_run(gemma3, unseen_play, backend) for backend in (STOCK, DENSE))
    assert_stock_answers(ours, stock, feature)
    counted = ours[feature]["toptheta"]
    windowed, full = counted["dense_rows:sliding_window"], counted["dense_rows:no_thresholds"]
    assert windowed * GEMMA_FULL == full * GEMMA_WINDOWED > 0


@pytest.mark.parametrize("feature", GEMMA_FEATURES)
def test_a_table_stays_sparse_beside_windows(gemma3: Path, unseen_play: Path, feature: str):
    counted = gemma3_run(gemma3, unseen_play, SPARSE_BY_HEAD)[feature]["toptheta"]
    assert sparse_rows(counted, allowed=["short_context", "sliding_window"]) > 0
    assert counted["dense_rows:sliding_window"] * (GEMMA_FULL + GEMMA_WINDOWED) == (
        counted["toptheta:decode_rows_total"] * GEMMA_WINDOWED
    )
    assert 0 < counted["toptheta:v_rows_read_total"] < counted["toptheta:v_rows_total"]


def test_decode_rows_stay_sparse_while_another_request_prefills(smollm2: Path, unseen_play: Path):
    mixed = smollm2_run(smollm2, unseen_play, SPARSE)["chunked_prefill"]["mixed"]
    assert mixed["steps"] >= 1000 // CHUNK
    assert sparse_rows(mixed["toptheta"], allowed=[]) == mixed["toptheta"]["toptheta:decode_rows_total"] > 0
    assert mixed["toptheta"]["toptheta:decode_rows_total"] >= 30 * mixed["steps"]


@pytest.mark.parametrize("backend", [STOCK, DENSE, SPARSE], ids=["stock", "dense", "sparse"])
def test_a_cached_prefix_gives_the_tokens_of_a_cold_cache(
    smollm2: Path, unseen_play: Path, backend: dict[str, Any]
):
    outcome = smollm2_run(smollm2, unseen_play, backend)
    warm, cold = outcome["prefix_caching"], outcome["prefix_cold"]
    assert warm["vllm"]["vllm:prefix_cache_hits"] == SHARED
    assert cold["vllm"]["vllm:prefix_cache_hits"] == 0
    assert not compare(warm["tokens"], cold["tokens"], cold["logits"], outcome["dtype"]).wrong


@pytest.mark.parametrize("backend", [STOCK, DENSE, SPARSE], ids=["stock", "dense", "sparse"])
def test_aborted_requests_leave_the_others_alone(smollm2: Path, unseen_play: Path, backend: dict[str, Any]):
    outcome = smollm2_run(smollm2, unseen_play, backend)
    others, alone = outcome["abort"], outcome["not_aborted"]
    assert others["finished"] == [False, True, True, False]
    assert not compare(others["tokens"], alone["tokens"], alone["logits"], outcome["dtype"]).wrong


@pytest.mark.parametrize("backend", [STOCK, DENSE, SPARSE], ids=["stock", "dense", "sparse"])
def test_a_preempted_request_answers_as_if_it_were_alone(
    smollm2: Path, unseen_play: Path, backend: dict[str, Any]
):
    outcome = smollm2_run(smollm2, unseen_play, backend)
    preempted, alone = outcome["preemption"], outcome["not_preempted"]
    assert preempted["vllm"]["vllm:num_preemptions"] > 0
    assert alone["vllm"]["vllm:num_preemptions"] == 0
    # vLLM preempts the last that came.
    assert not compare(preempted["tokens"][-1:], alone["tokens"], alone["logits"], outcome["dtype"]).wrong


@pytest.mark.parametrize("backend", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_samples_and_beams_differ_and_structure_is_kept(
    smollm2: Path, unseen_play: Path, backend: dict[str, Any]
):
    outcome = smollm2_run(smollm2, unseen_play, backend)
    for feature, several in (("parallel_sampling", 3), ("beam_search", 2)):
        assert len({tuple(tokens) for tokens in outcome[feature]["tokens"]}) == several
    answer = json.loads(outcome["structured_output"]["texts"][0])
    assert answer["hero"] in SCHEMA["properties"]["hero"]["enum"]
    assert 1 <= answer["act"] <= 5
