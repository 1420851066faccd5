"""Records of an evaluation, and their table for people."""

import math
from typing import Any

import torch

from topt_vllm.evaluation.options import NO_SCREEN, OURS
from topt_vllm.replay.attention import Counts
from topt_vllm.replay.predictions import Comparison
from topt_vllm.replay.scores import percentiles
from topt_vllm.table.words import budget_in_words, layers_in_words

_BINS = 8
# Rows whose mean counts as one independent number for the standard error: neighbours are alike.
_BLOCK = 32


def quality(rule: str, compared: Comparison, counts: Counts) -> dict[str, Any]:
    """What a record says about a rule on a text; about K too where Top-Theta reads it in full or has a K screen."""
    dense, loss = compared.dense.double().mean().item(), compared.loss.double().mean().item()
    record: dict[str, Any] = {
        **{name: _rounded(share) for name, share in counts.shares().items()},
        "perplexity_dense": _rounded(math.exp(dense)),
        "perplexity": _rounded(math.exp(loss)),
        "loss_pct": _rounded(100 * math.expm1(loss - dense)),
        "loss_pct_se": known(100 * math.exp(loss - dense) * standard_error(compared.loss - compared.dense)),
        "kl": _rounded(compared.kl.double().mean().item()),
        "agreement": _rounded(compared.agree.double().mean().item()),
        "tokens": len(compared.loss),
    }
    if rule in OURS:
        record["candidates"] = _rounded(counts.candidates)
        record["kv_bytes_read"] = _rounded(counts.kv_bytes_read)
        record["candidates_by_layer"] = list(map(_rounded, counts.candidates_by_layer))
    return record


def standard_error(values: torch.Tensor) -> float:
    """Of the mean of what rows have, [r] in their order."""
    size = min(_BLOCK, max(1, len(values) // 8))
    means = values[: len(values) // size * size].double().view(-1, size).mean(dim=1)
    return (means.std() / math.sqrt(len(means))).item() if len(means) > 1 else math.nan


def spread(kept_over_k: torch.Tensor) -> dict[str, float]:
    """p5, p50 and p95 of keys kept over keys asked for."""
    return dict(zip(("p5", "p50", "p95"), map(_rounded, percentiles(kept_over_k)), strict=True))


def by_head(ratios: list[torch.Tensor]) -> dict[str, float]:
    """How each query head holds its budget.

    Args:
        ratios: Of each layer, keys kept over keys asked for, [H, rows].

    Returns:
        ``mean``, over all; of the medians of all (layer, head) pairs over their rows, p5, p50 and p95, and
        ``within_20pct``, the share of them within a fifth of 1.
    """
    # Head by head, for quantile() refuses more than 16M numbers.
    medians = torch.stack([head.double().quantile(0.5) for layer in ratios for head in layer])
    within = ((medians >= 0.8) & (medians <= 1.2)).double().mean()
    mean = torch.cat(ratios).double().mean()
    return {"mean": _rounded(mean.item()), **spread(medians), "within_20pct": _rounded(within.item())}


def by_position(compared: Comparison, row_contexts: torch.Tensor) -> list[dict[str, Any]]:
    """Loss over dense loss by context length, in equal parts of the decoded rows' range.

    Args:
        compared: The rows.
        row_contexts: int64, their contexts.
    """
    edges = torch.linspace(int(row_contexts.min()), int(row_contexts.max()) + 1, _BINS + 1)
    bins = torch.bucketize(row_contexts.float(), edges, right=True) - 1
    found = []
    for index in range(_BINS):
        inside = bins == index
        if inside.any():
            rise = (compared.loss - compared.dense)[inside].double().mean().item()
            contexts = row_contexts[inside]
            found.append(
                {
                    "from": int(contexts.min()),
                    "to": int(contexts.max()),
                    "loss_pct": _rounded(100 * math.expm1(rise)),
                    "kl": _rounded(compared.kl[inside].double().mean().item()),
                }
            )
    return found


HEADER = (
    f"{'text':<22} {'context':>7} {'target':>10} {'rule':<16} {'parameter':>11} {'V read':>7} {'kept':>7}"
    f" {'perplexity':>10} {'loss':>8} {'±':>6} {'KL':>8} {'agree':>7} {'dropped':>8}  dense layers"
)


def target_of(record: dict[str, Any]) -> str:
    """What a rule was tuned to, or the budget that it is."""
    share = record["rows_target"]
    return f"{100 * share:g}%" if share is not None else budget_in_words(record["k"])


def line(record: dict[str, Any]) -> str:
    """One row of the table."""
    target = target_of(record)
    parameter = "-" if record["parameter"] is None else f"{record['parameter']:.4g}"
    text = (
        f"{record['text'][:22]:<22} {record['context']:>7} {target:>10} {record['rule']:<16} {parameter:>11}"
        f" {record['v_rows_read']:7.2%} {record['elements_kept']:7.2%} {record['perplexity']:10.3f}"
        f" {record['loss_pct']:+7.2f}% {or_nan(record['loss_pct_se']):6.2f}"
        f" {record['kl']:8.4f} {record['agreement']:7.2%} {record['dropped_mass']:8.2%}"
        f"  {layers_in_words(record['dense_layers'])}"
    )
    if record["k_screen"] != NO_SCREEN:
        margin, candidates = record["k_screen_margin"], record["candidates"]
        text += f"; K screen {record['k_screen']} at margin {margin}: {candidates:.2%} candidates"
    if "kv_bytes_read" in record:
        text += f"; {record['kv_bytes_read']:.2%} of K and V read"
    if "kept_over_k" in record:
        text += "; kept/k " + " ".join(f"{name} {value:.2f}" for name, value in record["kept_over_k"].items())
    if "heads_kept_over_k" in record:
        heads = record["heads_kept_over_k"]
        text += f", mean {heads['mean']:.2f}, median of {heads['within_20pct']:.0%} of heads within 20 %"
    if "retrieval" in record:
        text += (
            f"; retrieved {record['retrieval']:.0%} (dense {record['retrieval_dense']:.0%}), "
            f"exact {record['exact']:.0%} ({record['exact_dense']:.0%})"
        )
    if "margin" in record:
        text += f", margin {record['margin']:+.2f} ({record['margin_dense']:+.2f})"
    if "free_perplexity" in record:
        text += (
            f"; its own text: perplexity {record['free_perplexity']:.3f} by dense attention (dense's own "
            f"{record['free_perplexity_dense']:.3f}, ± {or_nan(record['free_loss_pct_se']):.0f} %), "
            f"the same for {record['tokens_until_difference']} tokens"
        )
    return text


def known(number: float) -> float | None:
    """A standard error, or None of too few numbers for one: JSON has no NaN."""
    return None if math.isnan(number) else _rounded(number)


def or_nan(number: float | None) -> float:
    """For people, what :func:`known` has made."""
    return math.nan if number is None else number


def _rounded(number: float) -> float:
    return round(number, 6)
