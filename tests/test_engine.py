"""Real vLLM engines on the real SmolLM2 in bfloat16: θ = −inf against stock, a table, thresholds by request.

Eager engines with a core of their own at θ = −inf are what `topt-vllm verify` runs (test_verify.py).
"""

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import engine_forks
import pytest
from engine_runs import assert_same_tokens, once

from topt_vllm.verify import engine as engines

pytestmark = pytest.mark.engine
MAX_TOKENS = 24
QUESTION = "\n\nWho are the main characters of this text?"


@cache
def tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


@cache
def prompts(model: Path, text: Path) -> list[list[int]]:
    """Token ids of mixed lengths in one batch, the last one a question about some 2500 tokens of text."""
    ids = tokenizer(model)(text.read_text(), truncation=True, max_length=6000)["input_ids"]
    plain = [ids[:1], ids[10:40], ids[100:228], ids[1000:1700]]
    if not tokenizer(model).chat_template:
        return [*plain, ids[2000:4500]]
    message = [{"role": "user", "content": tokenizer(model).decode(ids[:2500]) + QUESTION}]
    question = tokenizer(model).apply_chat_template(message, add_generation_prompt=True, return_dict=True)
    return [*plain, question["input_ids"]]


def run_engine(
    model: Path,
    text: Path,
    backend: str,
    settings: str,
    separate_core: bool = False,
    asked_again: int = 0,
    **engine: Any,
) -> dict[str, Any]:
    """Outcome of one engine (see engine_main.py), all in one process unless its core is to be separate, as a
    server's is; each configuration runs once. The last prompts may be asked again, behind their cached prefixes.
    """
    arguments = {
        "model": str(model),
        "dtype": "bfloat16",
        "max_model_len": 4096,
        "kv_cache_memory_bytes": 1 << 30,
        "logprobs_mode": "raw_logits",
        "attention_backend": backend,
        "additional_config": {"toptheta": json.loads(settings)} if backend == "TOPTHETA" else {},
        "seed": 0,
    }
    asked = prompts(model, text)
    asked = asked + asked[len(asked) - asked_again :]
    request = engines.Request(arguments | engine, asked, MAX_TOKENS, separate_core=separate_core)
    return once(asdict(request), lambda: engine_forks.run(request, timeout=1200))


def test_theta_minus_infinity_gives_stock_tokens_when_compiled(smollm2: Path, unseen_play: Path):
    stock = run_engine(smollm2, unseen_play, "CPU_ATTN", "{}", enforce_eager=True)
    ours = run_engine(
        smollm2,
        unseen_play,
        "TOPTHETA",
        '{"thresholds": "none"}',
        separate_core=True,
        enforce_eager=False,
    )
    assert stock["totals"] is None, "TOPTHETA's code ran although it was not chosen"
    assert_same_tokens(ours["tokens"], stock, stock["dtype"])
    layers = 30
    assert ours["totals"]["toptheta:decode_rows_total"] == ours["totals"]["dense_rows:no_thresholds"]
    # The one-token prompt is a decode row too; the last sampled token is never fed back.
    decoded = len(ours["tokens"]) * (MAX_TOKENS - 1) + 1
    assert ours["totals"]["toptheta:decode_rows_total"] == layers * decoded
    assert ours["totals"]["toptheta:v_rows_read_total"] == ours["totals"]["toptheta:v_rows_total"] > 0


def test_calibrated_table_skips_rows_and_answers(smollm2: Path, unseen_play: Path):
    """The shipped table is found by its fingerprint; the answer is still about the text."""
    ours = run_engine(smollm2, unseen_play, "TOPTHETA", '{"budget": 64}', enforce_eager=True)
    totals = ours["totals"]
    assert 0.01 < totals["toptheta:v_rows_read_total"] / totals["toptheta:v_rows_total"] < 0.3
    assert totals["toptheta:attention_elements_kept_total"] < totals["toptheta:attention_elements_total"]
    assert 0 < totals["toptheta:dropped_mass_sum"] < 0.5 * 9 * totals["toptheta:decode_rows_total"]
    # The prompt asks for no name, so one of these can only come from the text.
    assert any(name in ours["texts"][-1] for name in ("Romeo", "Juliet", "Montague", "Capulet"))


def test_a_k_screen_reads_less_of_k_and_answers_alike(smollm2: Path, unseen_play: Path):
    """Unasked. With prefix caching: the question is asked twice, and codes of its prefix lie in its blocks."""
    plain = run_engine(
        smollm2, unseen_play, "TOPTHETA", '{"budget": 64, "k_screen": "off"}', enforce_eager=True
    )
    settings = '{"budget": 64}'
    screened = run_engine(
        smollm2,
        unseen_play,
        "TOPTHETA",
        settings,
        asked_again=1,
        enforce_eager=True,
        enable_prefix_caching=True,
    )
    totals = screened["totals"]
    k_rows, candidates, v_rows, v_rows_read = (
        totals[f"toptheta:{name}_total"] for name in ("k_rows_read", "k_candidates", "v_rows", "v_rows_read")
    )
    assert plain["totals"]["toptheta:k_rows_read_total"] == plain["totals"]["toptheta:k_candidates_total"]
    assert plain["totals"]["toptheta:k_rows_read_total"] == plain["totals"]["toptheta:v_rows_total"]
    # Layer 0 is dense, and contexts of up to 1024 tokens have no screen; of the others no K is read.
    assert 1 / 30 < k_rows / v_rows < 0.25
    assert k_rows < candidates < 0.4 * v_rows
    assert v_rows_read < candidates
    # Greedy texts part for good at a near tie.
    same = [ours == plain for ours, plain in zip(screened["tokens"], plain["tokens"], strict=False)]
    assert sum(same) >= len(same) - 2
    for text in screened["texts"][-2:]:
        assert any(name in text for name in ("Romeo", "Juliet", "Montague", "Capulet"))


def test_sift_warms_up_each_request_and_then_skips(smollm2: Path, unseen_play: Path):
    """Without a table; under torch.compile, and with a worker of its own that knows requests by name."""
    warmup = 6
    settings = json.dumps({"policy": "sift", "sift_tau": 0.9, "sift_warmup": warmup})
    ours = run_engine(smollm2, unseen_play, "TOPTHETA", settings, enforce_eager=False)
    totals = ours["totals"]
    assert totals["dense_rows:sift_warmup"] == 30 * len(ours["tokens"]) * warmup
    assert set(name for name in totals if name.startswith("dense_rows:")) == {"dense_rows:sift_warmup"}
    # A quarter of the rows is warm-up; the others read a tenth and what their group adds.
    assert 0.3 < totals["toptheta:v_rows_read_total"] / totals["toptheta:v_rows_total"] < 0.65
    assert any(name in ours["texts"][-1] for name in ("Romeo", "Juliet", "Montague", "Capulet"))
