#!/usr/bin/env python3
"""Serves every tiny model of tests/support/model_families.py with vLLM on this CPU, and writes down what came.

For each family: stock vLLM answers; TOPTHETA at θ = −inf gives its tokens; TOPTHETA with a table that was
calibrated for it skips V rows. What is refused is asked for its reason. About a minute for a family.

Usage: scripts/serve_families.py [FAMILY ...]    all families without one; the others' outcomes are kept
"""

import argparse
import json
import math
import random
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib import metadata
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parent.parent
OUTCOMES = ROOT / "docs" / "model_families.json"
sys.path.insert(0, str(ROOT / "tests" / "support"))

import engine_forks  # noqa: E402
from model_families import REFUSED, SERVED, Family, served_config  # noqa: E402
from tiny_models import save_model, save_text  # noqa: E402

from topt_vllm.cli.main import main as topt_vllm  # noqa: E402
from topt_vllm.engines.process import EngineError  # noqa: E402
from topt_vllm.replay.model import examine  # noqa: E402
from topt_vllm.replay.options import ReplayError  # noqa: E402
from topt_vllm.verify.engine import Request  # noqa: E402
from topt_vllm.verify.near_ties import compare, is_near_tie  # noqa: E402

# Greedy answers agree by chance where a model says the same whatever it is told.
_ANSWER, _KINDS_OF_TOKENS = 16, 4
_ENGINE_SECONDS = 600.0


def outcome(name: str, family: Family) -> dict[str, str]:
    """What each step came to, by column of the table."""
    found = {"architecture": "", "vllm": metadata.version("vllm")}
    with TemporaryDirectory() as folder:
        model = save_model(Path(folder) / "model", served_config(name))
        found["architecture"] = json.loads((model / "config.json").read_text())["architectures"][0]
        found["calibrate"], found["evaluate"] = calibrated(model)
        dtype = "bfloat16" if family.free else "float32"
        engines: dict[str, dict[str, Any]] = {}
        for column, settings in (
            ("stock", None),
            ("dense", {"thresholds": "none"}),
            ("sparse", {"thresholds": str(model / "toptheta.yaml")}),
        ):
            try:
                engines[column] = engine_forks.run(
                    request(model, dtype, settings, family.engine), _ENGINE_SECONDS
                )
                found[column] = _VERDICTS[column](engines)
            except EngineError as error:
                found[column] = f"fails: {reason(str(error))}"
            print(f"{name}: {column}: {found[column]}", flush=True)
    return found


def calibrated(model: Path) -> tuple[str, str]:
    """Makes a table and evaluates it; ``yes``, or what the command said."""
    text = save_text(model / "text.txt", 3000)
    alike = ["--model", str(model), "--dataset", str(text), "--device", "cpu", "--max-seq-length", "600"]
    made = command("calibrate", *alike, "--num-samples", "2", "--k", "16", "--dense-layers")
    asked = ["--rules", "toptheta", "--rows", "--budget", "16", "--decode-rows", "40"]
    return made, command("evaluate", *alike, *asked)


def command(*arguments: str) -> str:
    """``yes``, or the last line that the command wrote."""
    said = StringIO()
    with redirect_stdout(StringIO()), redirect_stderr(said):
        status = topt_vllm(list(arguments))
    return "yes" if status == 0 else said.getvalue().strip().splitlines()[-1]


def request(model: Path, dtype: str, settings: dict[str, Any] | None, engine: dict[str, Any]) -> Request:
    """Prompts of random bytes, for TOPTHETA with these settings or for stock, with more arguments of the engine."""
    source = random.Random(0)
    prompts = [source.choices(range(256), k=length) for length in (1, 100, 400, 700)]
    backend: dict[str, Any] = {"attention_backend": "CPU_ATTN"}
    if settings is not None:
        backend = {"attention_backend": "TOPTHETA", "additional_config": {"toptheta": settings}}
    arguments = {
        "model": str(model),
        "dtype": dtype,
        "max_model_len": 1024,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": 1 << 28,
        "enforce_eager": True,
        "logprobs_mode": "raw_logits",
        "language_model_only": True,
    }
    return Request(arguments | backend | engine, prompts, _ANSWER, separate_core=False)


def stock_verdict(engines: dict[str, dict[str, Any]]) -> str:
    """``yes``, unless its answers could agree with any others by chance."""
    stock = engines["stock"]
    kinds = len({token for answer in stock["tokens"] for token in answer})
    if kinds < _KINDS_OF_TOKENS:
        return f"yes, but its answers have {kinds} different tokens"
    steps = [step for answer in stock["logits"] for step in answer]
    if not all(math.isfinite(logit) for step in steps for logit in step):
        del engines["stock"]
        return "answers with logits that are no numbers"
    ties = sum(is_near_tie(first, second, stock["dtype"]) for first, second in steps)
    return "yes" if ties <= len(steps) // 10 else f"yes, but {ties} of {len(steps)} tokens are near ties"


def dense_verdict(engines: dict[str, dict[str, Any]]) -> str:
    """``equal`` where TOPTHETA's tokens are stock's, up to near ties, which are said."""
    if "stock" not in engines:
        return "answers, with nothing to compare"
    ours, stock = engines["dense"], engines["stock"]
    found = compare(ours["tokens"], stock["tokens"], stock["logits"], stock["dtype"])
    if found.wrong:
        return f"differs: {found.wrong[0]}"
    return "equal" if not found.ties else f"equal, {found.ties} of {len(ours['tokens'])} up to a near tie"


def sparse_verdict(engines: dict[str, dict[str, Any]]) -> str:
    """Share of V rows that were read, all layers counted."""
    totals = engines["sparse"]["totals"]
    read, there = (totals[f"toptheta:v_rows{part}_total"] for part in ("_read", ""))
    return f"{read / there:.0%} of V rows read" if read < there else "skips nothing"


_VERDICTS: dict[str, Callable[[dict[str, dict[str, Any]]], str]] = {
    "stock": stock_verdict,
    "dense": dense_verdict,
    "sparse": sparse_verdict,
}


def reason(words: str) -> str:
    """The error that ended an engine, in its log."""
    found = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception)\b: (.+(?:\n  .+)?)$", words, re.MULTILINE)
    message = " ".join((found[-1] if found else words[-300:]).split())
    # Behind them pydantic and TOPTHETA show everything that they were given.
    return re.split(r" \[type=|\. Use another --attention-backend", message)[0]


def refusal(config: Any) -> str:
    """What calibrate says of a model."""
    with TemporaryDirectory() as folder:
        model = str(Path(folder) / "MODEL")
        config.save_pretrained(model)
        try:
            examine(model)
        except ReplayError as error:
            return str(error).removeprefix(f"{model}: ")
    raise RuntimeError(f"{type(config).__name__} isn't refused")


def main() -> None:
    """Runs the families that are named, and stores what came of them beside what is stored of the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("family", nargs="*", help=f"out of: {', '.join(SERVED)}; default: all")
    names = parser.parse_args().family or list(SERVED)
    if unknown := set(names) - set(SERVED):
        parser.error(f"family {', '.join(sorted(unknown))} is not out of: {', '.join(SERVED)}")
    stored = json.loads(OUTCOMES.read_text(encoding="utf-8")) if OUTCOMES.exists() else {"families": {}}
    for name in names:
        stored["families"][name] = outcome(name, SERVED[name])
        stored["families"] = {name: stored["families"][name] for name in SERVED if name in stored["families"]}
        store(stored)
    stored["refused"] = {name: refusal(config) for name, (config, _) in REFUSED.items()}
    store(stored)


def store(outcomes: dict[str, Any]) -> None:
    """After each family, for all of them take long."""
    OUTCOMES.write_text(json.dumps(outcomes, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
