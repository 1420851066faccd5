"""SiftAttention (arXiv 2506.05300): thresholds that each request finds for itself, without a table.

Idea: the τ-quantile of a head's attention changes along a request as a power law. A request's first decoded rows,
its warm-up, are dense and record that quantile of their scores; then the law is fitted and gives each later row
its θ. A power law α·n^β of exp(score) is, in scaled logits,

    θ(n) = c0 + c1·ln n.

Fit: least squares over the warm-up's rows with a penalty STIFFNESS·c1². A share of the keys lies above about the
same score whatever their number, so without evidence the slope is 0. While n grows by a few dozen behind a long
prompt, ln n hardly moves, and the slope of plain least squares is noise, which grows as the answer gets longer.

The paper fits in the number of the decoded row instead of n, and thresholds the probability, which is known only
once all scores are. docs/results.md compares them.

State belongs to a request, not to its place in a batch: it has a slot in tables for as long as it lives, preempted
or not.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from topt_vllm.attention.common import RowThetas

# Variance of a row's quantile over that of slopes between requests, both about (1 logit)².
STIFFNESS = 1.0


@dataclass(frozen=True)
class SiftSettings:
    """Settings of ``policy: sift``.

    Attributes:
        tau: Share of its keys that each query head skips; above 0 and below 1.
        warmup: Rows of each request that are decoded densely first; at least 2.
    """

    tau: float
    warmup: int


@dataclass(frozen=True)
class SiftStep:
    """What the decode rows of one step are to the policy; the same for all layers.

    Attributes:
        capacity: Slots that tables need.
        slots: int64 [R], of each row's request.
        log_lengths: float32 [R], ln n of each row.
        warm: bool [R], rows that are dense because their request is warming up.
        warm_contexts: int64 [any] on the host, context lengths of these rows.
        recording: Indices in the batch of the sequences that are warming up; their first rows are recorded.
        first_rows: Of ``recording``, each with its first row and that row's context length.
        recording_slots: int64 [len(recording)].
        positions: int64 [len(recording)], rows of the warm-up recorded before.
        finished_slots: int64 [any], of ``recording_slots`` those whose warm-up ends with this step.
        recorded_log_lengths: float32 [len(finished_slots), warmup], ln n of their recorded rows.
    """

    capacity: int
    slots: torch.Tensor
    log_lengths: torch.Tensor
    warm: torch.Tensor
    warm_contexts: torch.Tensor
    recording: list[int]
    first_rows: list[tuple[int, int, int]]
    recording_slots: torch.Tensor
    positions: torch.Tensor
    finished_slots: torch.Tensor
    recorded_log_lengths: torch.Tensor

    def moved(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> "SiftStep":
        """The step for tables on a device, to which ``copy`` brings a tensor."""
        moved = {
            name: copy(part)
            for name, part in vars(self).items()
            if isinstance(part, torch.Tensor) and name != "warm_contexts"
        }
        return replace(self, **moved)


class SiftRequests:
    """Which requests are alive, and how far each has come."""

    def __init__(self, settings: SiftSettings) -> None:
        self._warmup = settings.warmup
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._recorded = torch.zeros(0, dtype=torch.int64)
        self._log_lengths = torch.zeros(0, settings.warmup)

    def forget(self, requests: Iterable[str]) -> None:
        """Frees what is held for requests that have ended; others are ignored."""
        for request in requests:
            if (slot := self._slots.pop(request, None)) is not None:
                self._free.append(slot)

    def step(self, requests: Sequence[str], starts: torch.Tensor, contexts: torch.Tensor) -> SiftStep:
        """Takes a step's decode rows.

        Args:
            requests: Identity of each sequence's request.
            starts: int32 [S + 1], first query row of each sequence.
            contexts: int64 [R], context length of each row (tokens).
        """
        slots = torch.tensor([self._slot(request) for request in requests])
        before = self._recorded[slots]
        warming = before < self._warmup
        recording = warming.nonzero().flatten()
        recording_slots, positions = slots[recording], before[recording]
        log_lengths = contexts.float().log()
        first = starts[recording].long()
        self._log_lengths[recording_slots, positions] = log_lengths[first]
        self._recorded[recording_slots] += 1
        finished = recording_slots[positions + 1 == self._warmup]
        rows = (starts[1:] - starts[:-1]).long()
        warm = warming.repeat_interleave(rows)
        return SiftStep(
            capacity=len(self._recorded),
            slots=slots.repeat_interleave(rows),
            log_lengths=log_lengths,
            warm=warm,
            warm_contexts=contexts[warm],
            recording=recording.tolist(),
            first_rows=list(zip(recording.tolist(), first.tolist(), contexts[first].tolist(), strict=True)),
            recording_slots=recording_slots,
            positions=positions,
            finished_slots=finished,
            recorded_log_lengths=self._log_lengths[finished],
        )

    def _slot(self, request: str) -> int:
        if request not in self._slots:
            if not self._free:
                known = len(self._recorded)
                self._recorded = _grown(self._recorded, max(8, 2 * known))
                self._log_lengths = _grown(self._log_lengths, len(self._recorded))
                self._free = list(range(known, len(self._recorded)))
            slot = self._slots[request] = self._free.pop()
            self._recorded[slot] = 0
        return self._slots[request]


class SiftLayer:
    """Recorded quantiles and fitted laws of one layer's query heads, by slot.

    Attributes:
        tau: Which quantile to record.
    """

    def __init__(self, num_heads: int, settings: SiftSettings, device: torch.device | str = "cpu") -> None:
        self.tau = settings.tau
        self._quantiles = torch.zeros(0, settings.warmup, num_heads, device=device)
        self._laws = torch.zeros(0, num_heads, 2, device=device)

    def thetas(self, step: SiftStep) -> RowThetas:
        """θ of the step's rows; −inf during warm-up."""
        self._laws = _grown(self._laws, step.capacity)
        law = self._laws[step.slots]
        theta = law[..., 0] + law[..., 1] * step.log_lengths[:, None]
        return RowThetas(theta.masked_fill(step.warm[:, None], -torch.inf))

    def record(self, step: SiftStep, quantiles: torch.Tensor) -> None:
        """Takes the quantiles of the sequences that warm up, float32 [len(recording), H]; call it once a step."""
        self._quantiles = _grown(self._quantiles, step.capacity)
        self._quantiles[step.recording_slots, step.positions] = quantiles
        finished = step.finished_slots
        if len(finished):
            self._laws = _grown(self._laws, step.capacity)
            self._laws[finished] = fit(step.recorded_log_lengths, self._quantiles[finished])


def fit(x: torch.Tensor, y: torch.Tensor, stiffness: float = STIFFNESS) -> torch.Tensor:
    """Coefficients (c0, c1) of y = c0 + c1·x by least squares with a penalty of c1².

    Args:
        x: [..., rows], ln n.
        y: [..., rows, H], scaled logits.
        stiffness: Factor of the penalty; above 0.

    Returns:
        float32 [..., H, 2].
    """
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(dim=-1, keepdim=True), y.mean(dim=-2)
    offset = x - mean_x
    slope = (offset[..., None] * y).sum(dim=-2) / ((offset**2).sum(dim=-1, keepdim=True) + stiffness)
    return torch.stack([mean_y - slope * mean_x, slope], dim=-1).float()


def _grown(table: torch.Tensor, slots: int) -> torch.Tensor:
    """The table with room for so many slots."""
    if len(table) >= slots:
        return table
    return torch.cat([table, table.new_zeros(slots - len(table), *table.shape[1:])])
