"""Several ranks on one machine: one rank's tokens and rows, whether heads or requests are spread over them."""

import os
import shlex
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from engine_runs import assert_same_tokens
from matrix_scenarios import ENGINE, MAX_TOKENS, batch, gemma3_run, ragged, smollm2_run
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from scenario_runs import DENSE, SPARSE, SPARSE_BY_HEAD, STOCK, run, sparse_rows, tokens_of

from topt_vllm import large_pages
from topt_vllm.benchmarks.server import serve
from topt_vllm.engines.process import EngineError

pytestmark = pytest.mark.engine

FEATURE = "continuous_batching"
# SmolLM2 has nine query heads and three KV heads, one for each of three ranks. Gemma 3 has four and one, which both
# of two ranks hold. There may be two cores only.
RANKS = {"smollm2": "0|1|0", "gemma3": "0|1"}
ONE_RANK = {"smollm2": smollm2_run, "gemma3": gemma3_run}
# Ranks that share a KV head have a part of its group each: what any head of it keeps is not what one rank keeps.
SELECTING = {"smollm2": SPARSE, "gemma3": SPARSE_BY_HEAD}
ALLOWED = {"smollm2": ["short_context"], "gemma3": ["short_context", "sliding_window"]}


def spread(model: Path, text: Path, backend: dict[str, Any], cpus: str) -> dict[str, Any]:
    """Ragged requests with tensor parallelism over as many ranks as ``cpus`` names, and the pages of the ranks."""
    engine = ENGINE | {"tensor_parallel_size": len(cpus.split("|"))}
    scenarios = {FEATURE: batch(*ragged(tokens_of(model, text))), "pages": {"run": "large_pages"}}
    return run(model, backend, engine, scenarios, cpus)


@pytest.fixture(params=["smollm2", "gemma3"], ids=["smollm2_3_ranks", "gemma3_2_ranks"])
def name(request: pytest.FixtureRequest) -> str:
    """A model."""
    return request.param


@pytest.fixture
def model(name: str, request: pytest.FixtureRequest) -> Path:
    """Its folder."""
    return request.getfixturevalue(name)


def test_tensor_parallel_at_theta_minus_infinity_gives_stock_tokens(gemma3: Path, unseen_play: Path):
    """On ranks that share a KV head; where they don't, thresholds leave the tokens of one rank (below)."""
    stock = gemma3_run(gemma3, unseen_play, STOCK)
    ours = spread(gemma3, unseen_play, DENSE, RANKS["gemma3"])[FEATURE]
    assert_same_tokens(ours["tokens"], stock[FEATURE], stock["dtype"])
    assert ours["toptheta"]["toptheta:v_rows_read_total"] == ours["toptheta"]["toptheta:v_rows_total"] > 0


def test_tensor_parallel_ranks_have_their_heads_thresholds(name: str, model: Path, unseen_play: Path):
    alone = ONE_RANK[name](model, unseen_play, SELECTING[name])[FEATURE]
    ours = spread(model, unseen_play, SELECTING[name], RANKS[name])[FEATURE]
    assert ours["tokens"] == alone["tokens"]
    counted, expected = ours["toptheta"], alone["toptheta"]
    assert sparse_rows(counted, ALLOWED[name]) == sparse_rows(expected, ALLOWED[name]) > 0
    for exact in ("decode_rows", "v_rows", "attention_elements"):
        assert counted[f"toptheta:{exact}_total"] == expected[f"toptheta:{exact}_total"]
    # Sums over ranks are added up in another order, which moves a key over its threshold now and then.
    kept, read = "toptheta:attention_elements_kept_total", "toptheta:v_rows_read_total"
    assert counted[kept] == pytest.approx(expected[kept], rel=1e-3)
    assert 0 < counted[read] < counted["toptheta:v_rows_total"]
    if name == "smollm2":
        assert counted[read] == pytest.approx(expected[read], rel=1e-3)
    else:
        assert counted[read] < expected[read], "a rank reads what its own heads keep"


@pytest.mark.skipif(not large_pages.given(), reason="this kernel gives no large pages")
@pytest.mark.skipif(
    "THP_MEM_ALLOC_ENABLE" in os.environ, reason="the environment says whether to use large pages"
)
def test_the_cache_of_each_rank_lies_in_large_pages(gemma3: Path, unseen_play: Path):
    shares = spread(gemma3, unseen_play, DENSE, RANKS["gemma3"])["pages"]["shares"]
    # Fragmented memory has fewer of them.
    assert len([share for share in shares if share > 0.5]) == len(RANKS["gemma3"].split("|")), shares


def ask(url: str, model: Path, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Tokens of greedy answers to prompts that are sent at the same time."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")

    def one(prompt: list[int]) -> list[int]:
        options = {"ignore_eos": True, "return_token_ids": True}
        answer = client.completions.create(
            model=str(model), prompt=prompt, max_tokens=MAX_TOKENS, temperature=0, extra_body=options
        )
        return answer.choices[0].token_ids  # type: ignore[attr-defined]

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(one, prompts))


def scrape(url: str) -> Counter[str]:
    """Counters of /metrics: vLLM's finished requests by engine, the plugin's by name, dense rows by reason."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    found: Counter[str] = Counter()
    for sample in (sample for family in families for sample in family.samples):
        if sample.name == "vllm:request_success_total":
            found[f"engine {sample.labels['engine']}"] += sample.value
        elif sample.name == "toptheta:decode_rows_total":
            found[f"{sample.labels['mode']}:{sample.labels['reason']}"] += sample.value
        if sample.name.startswith("toptheta:"):
            found[sample.name] += sample.value
    return found


def test_data_parallel_engines_share_the_requests(
    smollm2: Path, unseen_play: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each engine is one by itself, so what thresholds leave of the tokens says enough."""
    reference = smollm2_run(smollm2, unseen_play, SPARSE)
    alone = reference[FEATURE]
    (tmp_path / "counters").mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "counters"))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    options = shlex.split("--data-parallel-size 2 --dtype float32 --enforce-eager --max-model-len 1152")
    options += ["--kv-cache-memory-bytes", str(1 << 28), "--max-num-batched-tokens", "256"]
    settings = SPARSE["additional_config"]["toptheta"]
    with serve(str(smollm2), "TOPTHETA", settings, options, tmp_path / "log") as url:
        tokens = ask(url, smollm2, [*ragged(tokens_of(smollm2, unseen_play))] * 2)
        # The counters of a worker are at most a second old.
        time.sleep(3)
        counted = scrape(url)
    expected = {part: alone[part] * 2 for part in ("tokens", "logits")}
    assert_same_tokens(tokens, expected, reference["dtype"])
    assert counted["engine 0"] > 0
    assert counted["engine 1"] > 0
    layers, prompts = 30, 8
    # The last token is never fed back. A chunk of one token is a decode row where no longer one stands before it.
    assert counted["toptheta:decode_rows_total"] >= layers * prompts * (MAX_TOKENS - 1)
    assert 0 < counted["toptheta:v_rows_read_total"] < counted["toptheta:v_rows_total"]


def test_stock_vllm_cannot_run_pipeline_stages_here(smollm2: Path):
    """An AssertionError in the second stage's worker (0.32). When this fails, stages can be tested like ranks."""
    stages = ENGINE | {"pipeline_parallel_size": 2}
    with pytest.raises(EngineError, match="KeyError"):
        run(smollm2, STOCK, stages, {FEATURE: batch([1, 2, 3])}, "0|1")
