"""What the engines' answers say about tokens, rows and loss."""

import math
from statistics import fmean, stdev
from typing import Any

from topt_vllm.table.schema import Quality
from topt_vllm.verify.checks import CheckError
from topt_vllm.verify.near_ties import compare

# Percentage points of perplexity on top of the promise: the table's was measured on another text.
_TOLERANCE = 1.0
# Of the measurement's own noise; a loss that is all noise is no pass.
_MOST_NOISE = 2.0
# Assumed for tables that state no loss (percent).
_UNSTATED = 5.0
# Reasons for dense rows (docs/operations.md).
_NO_THRESHOLDS, _WINDOW = "no_thresholds", "sliding_window"


def tokens(ours: dict[str, Any], stock: dict[str, Any]) -> str:
    """θ = −inf gives stock vLLM's tokens, up to near ties, and our kernel decoded and read every row.

    Raises:
        CheckError: It doesn't.
    """
    found = compare(ours["tokens"], stock["tokens"], stock["logits"], stock["dtype"])
    prompts, steps = len(ours["tokens"]), len(ours["tokens"][0])
    if found.wrong:
        raise CheckError(f"θ = −inf differs from stock vLLM: {'; '.join(found.wrong)}")
    if not found.equal:
        raise CheckError(f"all {prompts} prompts ended in a near tie; nothing was compared to the end")
    if stock["totals"] is not None:
        raise CheckError("TOPTHETA ran although stock vLLM was asked for")
    _every_row_in_our_kernel(ours["totals"])
    ties = f", {found.ties} up to a near tie" if found.ties else ""
    return f"θ = −inf gives stock vLLM's tokens: {prompts} prompts, {steps} steps each, {found.equal} equal{ties}"


def _every_row_in_our_kernel(totals: dict[str, float] | None) -> None:
    if not totals or totals["toptheta:v_rows_read_total"] != totals["toptheta:v_rows_total"]:
        raise CheckError(f"θ = −inf must read every V row; the counters say {totals}")
    dense, platform = _by_reason(totals, "dense_rows"), _by_reason(totals, "platform_rows")
    wrong = {reason for reason, rows in dense.items() if rows} - {_NO_THRESHOLDS, _WINDOW}
    if wrong:
        raise CheckError(f"rows are dense for another reason than θ = −inf: {', '.join(sorted(wrong))}")
    elsewhere = {reason for reason, rows in platform.items() if rows} - {_WINDOW}
    if elsewhere:
        raise CheckError(
            "stock vLLM was compared with itself: its own kernel decoded for TOPTHETA too, reason: "
            f"{', '.join(sorted(elsewhere))}"
        )
    if not dense.get(_NO_THRESHOLDS):
        raise CheckError(f"TOPTHETA's kernel decoded no row; the counters say {totals}")


def _by_reason(totals: dict[str, float], counter: str) -> dict[str, float]:
    prefix = f"{counter}:"
    return {name.removeprefix(prefix): rows for name, rows in totals.items() if name.startswith(prefix)}


def rows_skipped(totals: dict[str, float], quality: Quality | None) -> str:
    """Decoding read fewer V rows than there are.

    Raises:
        CheckError: It didn't.
    """
    read, total = totals["toptheta:v_rows_read_total"], totals["toptheta:v_rows_total"]
    rows = totals["toptheta:decode_rows_total"]
    if not rows:
        raise CheckError("TOPTHETA counted no decoded row")
    dense = _by_reason(totals, "dense_rows")
    reasons = ", ".join(f"{reason} {count / rows:.1%}" for reason, count in dense.items())
    if not 0 < read < total:
        raise CheckError(f"{read:.0f} of {total:.0f} V rows were read; dense rows: {reasons or 'none'}")
    table = ""
    if quality is not None:
        table = f" (the table's own text: {quality.v_rows_read:.1%} at up to {quality.tokens} tokens"
        table += "; the share falls as contexts grow)"
    return f"{read / total:.1%} of V rows read{table}; dense rows: {reasons or 'none'}"


def loss(decoded: list[float], prefilled: list[float], promised: float | None) -> str:
    """Decoding with the table raises perplexity by no more than it promises.

    Args:
        decoded: Log-probability of each token of the text, decoded with the table.
        prefilled: The same by dense prefill.
        promised: Rise of perplexity by the table (percent); None where it doesn't say.

    Raises:
        CheckError: It raises it by more.
    """
    rises = [dense - sparse for dense, sparse in zip(prefilled, decoded, strict=True)]
    if not all(map(math.isfinite, rises)):
        raise CheckError("some tokens of the text have no finite log-probability")
    mean = fmean(rises)
    measured = 100 * math.expm1(mean)
    error = 100 * math.exp(mean) * stdev(rises) / math.sqrt(len(rises))
    stated = f"{promised} % promised" if promised is not None else f"{_UNSTATED} %, for the table states none"
    limit = (promised if promised is not None else _UNSTATED) + _TOLERANCE + min(2 * error, _MOST_NOISE)
    detail = (
        f"perplexity {measured:+.2f} % ± {error:.2f} over {len(rises)} decoded tokens; "
        f"limit {limit:.2f} % ({stated}, {_TOLERANCE} for another text, "
        f"two standard errors up to {_MOST_NOISE})"
    )
    if not measured <= limit:
        raise CheckError(
            f"{detail}. Calibrate again on texts like those that you serve, or take a larger budget"
        )
    return detail
