"""What skipping does to a layer's output, for every query head and many thresholds at once, from one dense pass.

With the mean of V in place of what is skipped, a head that skips the keys D errs by e = Σ_{j∈D} p_j (v_j − v̄), and
its slice W of the layer's output projection carries ‖W e‖² of that into the residual stream. One pass over the
scores gives it for all thresholds: each key falls into the bucket of the smallest budget that keeps it, and the
error of a budget is the sum over the buckets above it.

Errors of heads add up as if they were independent, and a head that skips a key that another head of its group reads
is charged for it all the same; how a layer's own error turns into loss is measured (``sensitivity.py``).
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from topt_vllm.attention.common import Thetas
from topt_vllm.replay.scores import LayerCall, ones_and_zeros, probabilities

# Names of the projection behind the heads in transformers' models.
_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")


@dataclass(frozen=True)
class HeadErrors:
    """Means over the sampled rows of one layer; columns are budgets, by ascending keys.

    Attributes:
        energy: float64 [H, K], ‖W e‖² when the head uses only the keys that it keeps itself.
        rows: float64 [H, K], share of its KV head's V rows that a head causes to be read, a row being split evenly
            among the heads that keep it.
        layer_energy: float64 [K], of all heads together at the same budget, each using what its group reads.
    """

    energy: torch.Tensor
    rows: torch.Tensor
    layer_energy: torch.Tensor


def head_errors(
    call: LayerCall, rows: torch.Tensor, thetas: list[Thetas], projection: torch.Tensor | None
) -> HeadErrors:
    """Errors of one layer.

    Args:
        call: The layer under dense attention.
        rows: int64 [R], ascending query rows to look at.
        thetas: By ascending keys; θ must not rise with them.
        projection: [hidden size, H · Dv], the output projection's weight; None leaves errors as they are.
    """
    num_heads, num_kv_heads, value_dim = call.query.shape[0], call.key.shape[0], call.value.shape[2]
    count = len(thetas)
    slices = gram = None
    if projection is not None:
        slices = projection.float().view(-1, num_heads, value_dim).transpose(0, 1)
        gram = slices.transpose(1, 2) @ slices
    energy = torch.zeros(num_heads, count, dtype=torch.float64)
    read = torch.zeros(num_heads, count, dtype=torch.float64)
    together = torch.zeros(count, dtype=torch.float64)
    rows = rows.to(call.query.device)
    means = call.value.float().cumsum(dim=1)[:, rows] / (rows + 1)[:, None]
    for part in call.chunks(rows):
        scores = call.scores(rows[part])
        bucket = _buckets(scores, rows[part], thetas)
        shared = bucket.unflatten(0, (num_kv_heads, -1)).amin(dim=1)
        shared = shared.repeat_interleave(num_heads // num_kv_heads, dim=0)
        weights = probabilities(scores, call.sinks)
        own = _errors(weights, bucket, call.value, means[:, part], count)
        union = _errors(weights, shared, call.value, means[:, part], count)
        if slices is None:
            energy += own.square().sum(dim=(2, 3)).T.double().cpu()
            together += union.square().sum(dim=(1, 2, 3)).double().cpu()
        else:
            energy += ((own @ gram) * own).sum(dim=(2, 3)).T.double().cpu()
            together += torch.einsum("khrd,hod->kro", union, slices).square().sum(dim=(1, 2)).double().cpu()
        read += _rows_caused(bucket, num_kv_heads, rows[part], count)
    return HeadErrors(*(total / len(rows) for total in (energy, read, together)))


def mean_errors(found: list[HeadErrors]) -> HeadErrors:
    """Over several sequences."""
    return HeadErrors(
        *(torch.stack([getattr(part, f.name) for part in found]).mean(dim=0) for f in fields(HeadErrors))
    )


def output_projection(model: Any, layer: int, width: int) -> torch.Tensor | None:
    """The weight [hidden size, width] behind a layer's heads; None where the model doesn't name it as usual."""
    # An encoder's layers have indices of their own.
    for module in model.get_decoder().modules():
        if getattr(module, "layer_idx", None) == layer:
            for name in _PROJECTIONS:
                found = getattr(module, name, None)
                weight = _weight(found)
                # Packed weights of a compressed checkpoint can't be taken for what they stand for.
                if isinstance(weight, torch.Tensor) and weight.dim() == 2 and weight.is_floating_point():
                    weight = weight.detach().T if isinstance(found, Conv1D) else weight.detach()
                    return weight if weight.shape[1] == width else None
    return None


def _weight(module: Any) -> Any:
    """A module's weight, also where accelerate keeps it elsewhere between forward passes."""
    weight = getattr(module, "weight", None)
    if not (isinstance(weight, torch.Tensor) and weight.is_meta):
        return weight
    from accelerate.utils import align_module_device

    with align_module_device(module):
        return module.weight.clone()


def _buckets(scores: torch.Tensor, rows: torch.Tensor, thetas: list[Thetas]) -> torch.Tensor:
    """Which is the smallest budget that keeps a key: int16 [H, r, m], K where none does."""
    theta = torch.stack([entry.to(scores.device).at_each(rows + 1) for entry in thetas], dim=-1)
    ascending = theta.flip(-1).cummax(dim=-1).values.contiguous()
    reached = torch.searchsorted(ascending, scores, right=True)
    bucket = (len(thetas) - reached).to(torch.int16)
    # The newest token is always kept.
    newest = torch.arange(scores.shape[-1], device=scores.device) == rows[:, None]
    bucket.masked_fill_(newest, 0)
    return bucket.masked_fill_(torch.isneginf(scores), len(thetas))


def _errors(
    weights: torch.Tensor, bucket: torch.Tensor, value: torch.Tensor, means: torch.Tensor, count: int
) -> torch.Tensor:
    """e of every budget, float32 [K, H, r, Dv]."""
    num_kv_heads, m = value.shape[0], weights.shape[-1]
    values = value[:, :m].float()
    errors = []
    for index in range(1, count + 1):
        inside = (weights * ones_and_zeros(bucket == index)).unflatten(0, (num_kv_heads, -1))
        mass = inside.sum(dim=-1, keepdim=True)
        used = (inside.flatten(1, 2) @ values).unflatten(1, inside.shape[1:3])
        errors.append((used - mass * means[:, None]).flatten(0, 1))
    # Budget k skips what only larger ones keep, and what none does: the buckets from k's on.
    return torch.stack(errors).flip(0).cumsum(dim=0).flip(0)


def _rows_caused(bucket: torch.Tensor, num_kv_heads: int, rows: torch.Tensor, count: int) -> torch.Tensor:
    """Sum over rows of the shares in :class:`HeadErrors`, float64 [H, K]."""
    by_group = bucket.unflatten(0, (num_kv_heads, -1))
    contexts = (rows + 1).double()
    found = []
    for index in range(count):
        kept = ones_and_zeros(by_group <= index)
        among = kept.sum(dim=1, keepdim=True).clamp_(min=1).reciprocal_()
        found.append(((kept * among).sum(dim=-1) / contexts.to(among.device)).sum(dim=-1).flatten())
    return torch.stack(found, dim=1).double().cpu()
