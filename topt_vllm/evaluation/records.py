"""Records of an evaluation, and their table for people."""

import math
from typing import Any

import torch

from topt_vllm.evaluation.attention import Counts
from topt_vllm.evaluation.perplexity import Comparison

_BINS = 8


def quality(compared: Comparison, counts: Counts) -> dict[str, Any]:
    """What a record says about a rule on a text."""
    dense, loss = compared.dense.double().mean().item(), compared.loss.double().mean().item()
    return {
        **{name: _rounded(share) for name, share in counts.shares().items()},
        "perplexity_dense": _rounded(math.exp(dense)),
        "perplexity": _rounded(math.exp(loss)),
        "loss_pct": _rounded(100 * math.expm1(loss - dense)),
        "kl": _rounded(compared.kl.double().mean().item()),
        "agreement": _rounded(compared.agree.double().mean().item()),
        "tokens": len(compared.loss),
    }


def by_position(compared: Comparison) -> list[dict[str, Any]]:
    """Loss over dense loss by context length, in equal parts of the range."""
    edges = torch.linspace(int(compared.contexts.min()), int(compared.contexts.max()) + 1, _BINS + 1)
    bins = torch.bucketize(compared.contexts.float(), edges, right=True) - 1
    found = []
    for index in range(_BINS):
        inside = bins == index
        if inside.any():
            rise = (compared.loss - compared.dense)[inside].double().mean().item()
            contexts = compared.contexts[inside]
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
    f"{'text':<22} {'rows':>6} {'rule':<16} {'parameter':>11} {'V read':>7} {'kept':>7} {'perplexity':>10}"
    f" {'loss':>8} {'KL':>8} {'agree':>7} {'dropped':>8}  dense layers"
)


def line(record: dict[str, Any]) -> str:
    """One row of the table."""
    target = f"{record['rows_target']:.0%}" if record["rows_target"] is not None else f"k={record['k']}"
    parameter = "-" if record["parameter"] is None else f"{record['parameter']:.4g}"
    text = (
        f"{record['text'][:22]:<22} {target:>6} {record['rule']:<16} {parameter:>11} {record['v_rows_read']:7.2%}"
        f" {record['elements_kept']:7.2%} {record['perplexity']:10.3f} {record['loss_pct']:+7.2f}%"
        f" {record['kl']:8.4f} {record['agreement']:7.2%} {record['dropped_mass']:8.2%}"
        f"  {', '.join(map(str, record['dense_layers'])) or 'none'}"
    )
    if "retrieval" in record:
        text += (
            f"; retrieved {record['retrieval']:.0%} (dense {record['retrieval_dense']:.0%}), "
            f"exact {record['exact']:.0%} ({record['exact_dense']:.0%})"
        )
    return text


def _rounded(number: float) -> float:
    return round(number, 6)
