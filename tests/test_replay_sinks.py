"""Attention sinks in a replay: one more score in each head's softmax, which has no value."""

import torch

from topt_vllm.attention.common import Thetas
from topt_vllm.calibration.head_errors import head_errors
from topt_vllm.evaluation.rules.sparsev import SparseV
from topt_vllm.evaluation.rules.topk import TopK
from topt_vllm.replay.rule import Outcome, Rule, attend
from topt_vllm.replay.scores import LayerCall
from topt_vllm.replay.top_theta import TopTheta

HEADS, KV_HEADS, N, DIM = 4, 2, 37, 8
SINKS = torch.tensor([-2.0, 0.0, 2.0, 30.0])
THETAS = Thetas(
    torch.tensor([1], dtype=torch.int32), torch.full((HEADS, 1), 0.5), torch.tensor([[0.5, 0.0]] * HEADS)
)


def made(sinks: torch.Tensor | None = SINKS) -> LayerCall:
    source = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(h, N, DIM, generator=source) for h in (HEADS, KV_HEADS, KV_HEADS))
    return LayerCall(0, query, key, value, DIM**-0.5, sinks=sinks)


def expected_probabilities(call: LayerCall) -> torch.Tensor:
    """Of the keys, float64 [H, N, N]: softmax over them and the sink, as the operator's specification has it."""
    scores = call.scores(torch.arange(N)).double()
    column = SINKS.double()[:, None, None].expand(HEADS, N, 1)
    return torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]


def attended(call: LayerCall, rule: Rule | None) -> tuple[torch.Tensor, float]:
    found: list[Outcome] = []
    out = attend(call, rule, lambda _, outcome: found.append(outcome))
    return out, sum(outcome.dropped for outcome in found)


def values(call: LayerCall) -> torch.Tensor:
    return call.value.double().repeat_interleave(HEADS // KV_HEADS, dim=0)


def test_dense_rows_give_the_sink_its_share():
    call = made()
    out, _ = attended(call, None)
    torch.testing.assert_close(
        out.double(), expected_probabilities(call) @ values(call), rtol=1e-5, atol=1e-6
    )
    assert out[3].abs().max() < 1e-6  # nothing is left beside a sink of 30


def test_what_the_sink_takes_is_neither_dropped_nor_compensated():
    call, probabilities = made(), expected_probabilities(made())
    scores = call.scores(torch.arange(N))
    kept = (scores >= 0.5) | torch.eye(N, dtype=torch.bool)
    used = kept.unflatten(0, (KV_HEADS, -1)).any(dim=1).repeat_interleave(HEADS // KV_HEADS, dim=0)
    mass = (probabilities * ~used).sum(dim=-1, keepdim=True)
    expected = (probabilities * used) @ values(call) + mass * call.means.double().repeat_interleave(2, dim=0)
    out, dropped = attended(call, TopTheta({0: THETAS}))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dropped, float(mass.sum()), rtol=1e-5, atol=1e-5)


def test_a_softmax_over_the_kept_keys_keeps_the_sink():
    call = made()
    out, _ = attended(call, TopK(N))
    torch.testing.assert_close(out, attended(call, None)[0])
    newest = torch.arange(N)
    call, scores = made(), made().scores(newest)
    best = scores.amax(dim=-1)
    share = torch.sigmoid(best - SINKS[:, None])
    expected = (
        share[..., None]
        * values(call).gather(1, scores.argmax(dim=-1)[..., None].expand(-1, -1, DIM)).float()
    )
    torch.testing.assert_close(attended(call, TopK(1))[0], expected, rtol=1e-5, atol=1e-6)


def test_constant_probabilities_are_those_beside_the_sink():
    """A head whose sink takes everything keeps no key."""
    kept: list[torch.Tensor] = []
    attend(made(), SparseV(1e-3), lambda _, outcome: kept.append(outcome.kept))
    assert torch.cat(kept, dim=1)[3].sum() == 0
    assert torch.cat(kept, dim=1)[:3].sum() > 0


def test_errors_of_heads_count_probabilities_beside_the_sink():
    rows = torch.arange(N)
    found, without = (head_errors(made(sinks), rows, [THETAS], None) for sinks in (SINKS, None))
    call = made()
    skipped = call.scores(rows) < 0.5
    skipped.diagonal(dim1=1, dim2=2).fill_(False)
    weights, means = expected_probabilities(call) * skipped, call.means.double().repeat_interleave(2, dim=0)
    errors = weights @ values(call) - weights.sum(dim=-1, keepdim=True) * means
    expected = errors.square().sum(dim=-1).mean(dim=1)
    torch.testing.assert_close(found.energy[:, 0], expected, rtol=1e-4, atol=1e-7)
    assert found.energy[3, 0] < 1e-6 < without.energy[3, 0]
    torch.testing.assert_close(found.rows, without.rows)
