"""Hand-made records as ``topt-vllm evaluate`` and ``bench`` write them, for the table of ``table_factory.py``."""

from typing import Any

from table_factory import make_identity

ORIGIN: dict[str, Any] = {
    "cpu": "abacus",
    "threads": 2,
    "capability": "AVX2",
    "gpu": None,
    "torch": "2.0",
    "vllm": "0.32",
    "topt_vllm": "0.1",
    "commit": "abc1234",
    "command": "topt-vllm evaluate --model tiny",
}
OF_TINY = ORIGIN | {
    "dtype": "float32",
    "model": "tiny",
    "fingerprint": make_identity().fingerprint,
    "table": "t.yaml",
    "table_sha256": "ab" * 32,
}


def evaluated(rule: str, loss: float, target: float | None = 0.1, **changes: Any) -> dict[str, Any]:
    """A record on a text."""
    return {
        "text": "unseen.txt",
        "context": 1024,
        "rule": rule,
        "rows_target": target,
        "k": None if target is not None else 64,
        "parameter": 0.5,
        "v_rows_read": 0.1021,
        "loss_pct": loss,
        "loss_pct_se": 0.31,
        "kl": 0.0123,
        "agreement": 0.954,
        "tokens": 256,
        "provenance": OF_TINY,
    } | changes


def needle_cell(length: int, depth: float, found: bool = True) -> dict[str, Any]:
    """One hidden fact, which dense attention finds."""
    return {
        "length": length,
        "depth": depth,
        "retrieved": found,
        "exact": False,
        "margin": 3.25 if found else -1.75,
        "retrieved_dense": True,
        "exact_dense": True,
        "margin_dense": 9.5,
    }


def task(length: int, exact: float, dense: float) -> dict[str, Any]:
    """A task under the table's budget."""
    scored = {"exact": exact, "exact_dense": dense, "margin": -0.75, "margin_dense": -0.5}
    scored["judged_by"] = "exact" if dense >= 0.3 else "margin"
    return evaluated("toptheta", 0.5, None, text="multikey", task="multikey", context=length, **scored)


def needles() -> dict[str, Any]:
    """A grid of two lengths and two depths, one of which is missed."""
    cells = [
        needle_cell(512, 0.0),
        needle_cell(512, 1.0),
        needle_cell(1024, 0.0),
        needle_cell(1024, 1.0, False),
    ]
    return evaluated("toptheta", 5.0, None, text="needles", cells=cells)


def decoded(**changes: Any) -> dict[str, Any]:
    """A synthetic decode call: 3.39 times as fast, 1.88 from the kernel and 1.80 from skipping."""
    return {
        "batch": 8,
        "seq_len": 8192,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "layers": 1,
        "cache_dtype": "bfloat16",
        "k": None,
        "keep_target": 0.1,
        "k_screen": "off",
        "v_rows_read": 0.1,
        "ms": 1.221,
        "ms_p20": 1.2,
        "ms_p80": 1.3,
        "platform": "CPU_ATTN",
        "ms_platform": 4.14,
        "ratio_platform": 3.39,
        "ratio_keep_all": 1.80,
        "provenance": ORIGIN,
    } | changes


def served(**changes: Any) -> dict[str, Any]:
    """The whole engine, 2.85 times as fast."""
    return {
        "platform": {"decode_tokens_per_second": 31.8, "itl_ms_median": 250.0, "ttft_ms_median": 9000.0},
        "toptheta": {"decode_tokens_per_second": 90.6, "itl_ms_median": 88.0, "ttft_ms_median": 9100.0},
        "ratio_decode": 2.85,
        "settings": {
            "model": "tiny",
            "concurrency": 8,
            "prompt_tokens": 7000,
            "max_tokens": 128,
            "rounds": 1,
            "toptheta": {"k": 64},
            "platform_backend": "CPU_ATTN",
        },
        "provenance": ORIGIN,
    } | changes
