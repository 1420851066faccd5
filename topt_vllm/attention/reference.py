"""Top-Theta attention in eager PyTorch with fp32 accumulation: the specification of every other implementation.

For one query row of one head, with scaled (and softcapped) scores s_j over its context of n keys:

1. a key is kept when s_j >= θ(n), or it is a sink token, or a recent token, or n <= min_seq_len;
   with ``vmean`` also when j >= (n − 1) // T · T, where V sums of T rows end;
2. a V row is read when any query head of the GQA group keeps it; ``group_keep: union`` lets all of them use it;
3. p_j = exp(s_j − max s) / Σ exp(s − max s) over **all** keys, dropped ones too, and over the head's sink, if any;
4. out = Σ_kept p_j v_j + c, where c is 0 (``none``) or (Σ_dropped p) · mean(v_0 .. v_{n−1}) (``vmean``).

A score equal to θ is kept. θ = −inf keeps everything and gives dense attention. A NaN score is never kept by its
own rule, and makes the row NaN through the denominator, as dense attention would.
Source: Top-Theta attention, arXiv 2502.08363, section 3 (thresholds) and its exact-denominator compensation.
"""

from itertools import pairwise

import torch

from topt_vllm.attention import posit
from topt_vllm.attention.common import (
    Capabilities,
    DecodeBatch,
    PagedCache,
    RowThetas,
    Selection,
    Stat,
    Thetas,
)
from topt_vllm.attention.common import new_statistics as new_statistics

capabilities = Capabilities(sinks=True, narrow_values=True)


def prepare(device_type: str) -> None:
    """Nothing: it runs wherever torch does."""


def scaled_scores(query: torch.Tensor, key: torch.Tensor, scale: float, softcap: float = 0.0) -> torch.Tensor:
    """Scores of one row: query [H, D] against key [Hkv, n, D], float32 [H, n]."""
    num_kv_heads, _, head_dim = key.shape
    grouped = query.float().view(num_kv_heads, -1, head_dim)
    scores = (grouped @ key.float().transpose(1, 2)).flatten(0, 1) * scale
    return softcap * torch.tanh(scores / softcap) if softcap > 0 else scores


def select(
    scores: torch.Tensor, theta: torch.Tensor | None, selection: Selection, dense_from: int
) -> torch.Tensor:
    """Each head's own rule.

    Args:
        scores: float32 [H, n].
        theta: float32 [H], or None for θ = −inf.
        selection: What is kept whatever its score.
        dense_from: Keys from here on are kept.

    Returns:
        bool [H, n].
    """
    n = scores.shape[1]
    if theta is None or n <= selection.min_seq_len:
        return torch.ones_like(scores, dtype=torch.bool)
    keep = scores >= theta[:, None]
    # A NaN score is not >= −inf, but dense attention would read the row.
    keep |= torch.isneginf(theta)[:, None]
    keep[:, : selection.sink_tokens] = True
    keep[:, max(0, n - selection.recent_tokens) :] = True
    keep[:, dense_from:] = True
    return keep


def attend_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    theta: torch.Tensor | None,
    selection: Selection,
    scale: float,
    softcap: float = 0.0,
    dense_from: int | None = None,
    statistics: torch.Tensor | None = None,
    reached: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One query row over plain tensors.

    Args:
        query: [H, D].
        key: [Hkv, n, D].
        value: [Hkv, n, Dv].
        theta: float32 [H] at this n, or None for θ = −inf.
        selection: Selection and compensation.
        scale: Factor of q·k.
        softcap: Logits softcap, 0 for none.
        dense_from: Keys from here on are kept; None where there are no V sums.
        statistics: Accumulators [7] to add to, indexed by :class:`Stat`.
        reached: int64 [H], counters of keys with s_j >= θ(n) to add to; none where θ is −inf.
        sinks: float32 [H], logits of attention sinks; None for none.

    Returns:
        float32 [H, Dv].
    """
    num_kv_heads, n, _ = key.shape
    group = query.shape[0] // num_kv_heads
    scores = scaled_scores(query, key, scale, softcap)
    kept = select(scores, theta, selection, n if dense_from is None else dense_from)
    read = kept.view(num_kv_heads, group, n).any(dim=1)
    used = read.repeat_interleave(group, dim=0) if selection.group_keep == "union" else kept

    logits = scores if sinks is None else torch.cat([scores, sinks[:, None]], dim=1)
    probabilities = torch.softmax(logits, dim=-1)[:, :n]
    # where, not a product: a dropped V row is never touched, so a NaN in it must not spread.
    weights = torch.where(used, probabilities, 0.0).view(num_kv_heads, group, n)
    rows = torch.where(read[:, :, None], value.float(), 0.0)
    out = (weights @ rows).flatten(0, 1)
    dropped = torch.where(used, 0.0, probabilities).sum(dim=-1)
    if selection.compensation == "vmean" and not bool(used.all()):
        mean = value.float().mean(dim=1).repeat_interleave(group, dim=0)
        out += dropped[:, None] * mean

    if statistics is not None:
        statistics[Stat.ROWS] += 1
        statistics[Stat.ELEMENTS] += kept.numel()
        statistics[Stat.KEPT_ELEMENTS] += kept.sum()
        statistics[Stat.V_ROWS] += read.numel()
        statistics[Stat.V_ROWS_READ] += read.sum()
        statistics[Stat.DROPPED_MASS] += dropped.sum()
        statistics[Stat.K_ROWS_READ] += read.numel()
    if reached is not None and theta is not None and n > selection.min_seq_len:
        reached += ((scores >= theta[:, None]) & ~torch.isneginf(theta)[:, None]).sum(dim=-1)
    return out


def decode(
    query: torch.Tensor,
    cache: PagedCache,
    batch: DecodeBatch,
    thetas: Thetas | RowThetas | None,
    selection: Selection,
    scale: float,
    softcap: float,
    out: torch.Tensor,
    statistics: torch.Tensor | None,
    reached: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Every row of a batch over the paged cache; arguments as :func:`topt_vllm.attention.api.decode`."""
    block_size = cache.value.shape[2]
    # Where nothing is compensated, nothing is kept for where sums end.
    state_rows = cache.rows_per_state if selection.compensation == "vmean" else None
    starts = batch.query_start_loc.tolist()
    for sequence, last_len in enumerate(batch.seq_lens.tolist()):
        first, end = starts[sequence], starts[sequence + 1]
        blocks = batch.block_table[sequence, : -(-last_len // block_size)].long()
        key = gather(cache.key, blocks, cache.key_scale, cache.posit8)
        value = gather(cache.value, blocks, cache.value_scale, cache.posit8)
        for row in range(first, end):
            n = last_len - (end - 1 - row)
            out[row] = attend_row(
                query[row],
                key[:, :n],
                value[:, :n],
                _theta(thetas, row, n),
                selection,
                scale,
                softcap,
                dense_from=None if state_rows is None else (n - 1) // state_rows * state_rows,
                statistics=None if statistics is None else statistics[0],
                reached=None if reached is None else reached[row],
                sinks=sinks,
            ).to(out.dtype)


def finish(cache: PagedCache, batch: DecodeBatch) -> None:
    """Writes the V sums that end in rows of a batch; :class:`topt_vllm.attention.api.Implementation` has the rule.

    One row after the other is added to a state's own sum, and that to the state before it. So the bits of a state
    are the same however the rows were cut into batches.
    """
    state_rows = cache.rows_per_state
    if state_rows is None:
        return
    written = []
    rows = zip(pairwise(batch.query_start_loc.tolist()), batch.seq_lens.tolist(), strict=True)
    for sequence, ((first, end), length) in enumerate(rows):
        written.append((max(0, length - (end - first)), length, sequence))
    # Blocks of a prefix may be another sequence's, which writes them in this batch: its rows begin before.
    for begin, length, sequence in sorted(written):
        for state in range(begin // state_rows, length // state_rows):
            _write_state(cache, batch.block_table[sequence], state, state_rows)


def _write_state(cache: PagedCache, table: torch.Tensor, state: int, state_rows: int) -> None:
    assert cache.value_sums is not None
    block_size = cache.value.shape[2]
    block, slot = table[state * state_rows // block_size], state * state_rows % block_size
    rows = cache.value[block, :, slot : slot + state_rows]
    total = torch.zeros_like(cache.value_sums[0, :, 0])
    for row in (posit.decode(rows) if cache.posit8 else rows.float()).unbind(dim=1):
        total += row
    if state > 0:
        before = state * state_rows - 1
        total += cache.value_sums[table[before // block_size], :, before % block_size // state_rows]
    cache.value_sums[block, :, slot // state_rows] = total


def _theta(thetas: Thetas | RowThetas | None, row: int, n: int) -> torch.Tensor | None:
    if isinstance(thetas, RowThetas):
        return thetas.theta[row]
    return None if thetas is None else thetas.at(n)


def gather(
    part: torch.Tensor, blocks: torch.Tensor, scale: torch.Tensor | None, posit8: bool
) -> torch.Tensor:
    """K or V of a sequence's blocks, [Hkv, n, D]; posits as float32, and what has a scale as float32 times it."""
    rows = part[blocks].transpose(0, 1).flatten(1, 2)
    rows = posit.decode(rows) if posit8 else rows
    return rows if scale is None else rows.float() * scale
