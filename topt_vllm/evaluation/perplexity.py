"""Next-token losses of a model under rules, beside those of the dense model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from topt_vllm.calibration.model import Subject
from topt_vllm.evaluation.attention import Counts, attending
from topt_vllm.evaluation.options import EvaluationError
from topt_vllm.evaluation.rules.base import Rule

# Logits of one chunk: 32 MiB in float32.
_CHUNK_LOGITS = 1 << 23


@dataclass(frozen=True)
class Comparison:
    """Each scored row by itself; row i predicts token i + 1.

    Attributes:
        contexts: int64 [r].
        dense: float32 [r], loss of the dense model, nats.
        loss: float32 [r], loss under the rule.
        kl: float32 [r], divergence of the rule's distribution from the dense one, nats.
        agree: bool [r], whether both like the same token best.
    """

    contexts: torch.Tensor
    dense: torch.Tensor
    loss: torch.Tensor
    kl: torch.Tensor
    agree: torch.Tensor


def joined(parts: list[Comparison]) -> Comparison:
    """The rows of several sequences as one."""
    names = ("contexts", "dense", "loss", "kl", "agree")
    return Comparison(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def hidden_states(
    model: Any, subject: Subject, tokens: list[int], rules: Mapping[int, Rule], first: int
) -> tuple[torch.Tensor, Counts]:
    """What goes into the output head, [n, d], and what was read on the way.

    Args:
        model: A causal language model.
        subject: Its facts.
        tokens: The sequence.
        rules: By layer; {} for dense attention.
        first: Rows with a shorter context are dense and not counted (tokens).
    """
    base = model.base_model
    with torch.inference_mode(), attending(base, subject.identity, rules, first, subject.window) as counts:
        hidden = base(torch.tensor([tokens], device=model.device), use_cache=False).last_hidden_state
    return hidden[0], counts


def log_probabilities(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """float32 [r, vocabulary] from hidden states [r, d]."""
    logits = model.get_output_embeddings()(hidden).float()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if softcap:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits.log_softmax(dim=-1)


def check_head(model: Any, tokens: list[int]) -> None:
    """Makes sure that :func:`log_probabilities` is what the model itself does after its last layer.

    Raises:
        EvaluationError: It isn't.
    """
    with torch.inference_mode():
        few = torch.tensor([tokens[:16]], device=model.device)
        expected = model(few, use_cache=False).logits[0].float().log_softmax(dim=-1)
        found = log_probabilities(model, model.base_model(few, use_cache=False).last_hidden_state[0])
    # Same operations on the same inputs: any difference is another formula, not rounding.
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-2):
        raise EvaluationError(
            f"{type(model).__name__} computes its logits in a way that is not known here "
            "(output embeddings, then final_logit_softcapping); it can't be evaluated"
        )


def compare(model: Any, tokens: list[int], dense: torch.Tensor, ours: torch.Tensor, first: int) -> Comparison:
    """Compares hidden states [n, d] of the dense model with those under rules, on contexts from ``first`` on."""
    rows = torch.arange(first - 1, len(tokens) - 1)
    targets = torch.tensor(tokens)
    step = max(1, _CHUNK_LOGITS // model.config.get_text_config().vocab_size)
    parts = []
    with torch.inference_mode():
        for chunk in rows.split(step):
            p, q = (
                log_probabilities(model, states[chunk.to(states.device)]).cpu() for states in (dense, ours)
            )
            target = targets[chunk + 1][:, None]
            parts.append(
                Comparison(
                    contexts=chunk + 1,
                    dense=-p.gather(1, target)[:, 0],
                    loss=-q.gather(1, target)[:, 0],
                    kl=torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(dim=-1),
                    agree=p.argmax(dim=-1) == q.argmax(dim=-1),
                )
            )
    return joined(parts)
