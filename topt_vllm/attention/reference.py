"""Top-Theta attention in eager PyTorch with fp32 accumulation: the specification of every other implementation.

For one query row of one head, with scaled (and softcapped) scores s_j over its context of n keys:

1. a key is kept when s_j >= θ(n), or it is a sink token, or a recent token, or n <= min_seq_len;
   with ``vmean`` also when j >= (n − 1) // T · T, where V sums of T rows end;
2. a V row is read when any query head of the GQA group keeps it; ``group_keep: union`` lets all of them use it;
3. p_j = exp(s_j − max s) / Σ exp(s − max s) over **all** keys, dropped ones too, and over the head's sink, if any;
4. out = Σ_kept p_j v_j + c, where c is 0 (``none``) or (Σ_dropped p) · mean(v_0 .. v_{n−1}) (``vmean``).

With a K screen, where every head of a group has a θ above −inf and n > min_seq_len, s_j is what plane one of K's
copy says (:mod:`topt_vllm.attention.screen`), unless that plus the margin reaches θ for some head of the group, or
the key is kept whatever its score: then it is a candidate, and s_j is its exact score (``int4``) or what both
planes say (``int4+4``). Only candidates can be kept. Where an implementation decodes several rows of a sequence at
once, it may take the candidates of each for all of them; and it may multiply V rows that not all of them use by 0,
which spreads a NaN or an infinity there, as vLLM's own kernels do.

A score equal to θ is kept. θ = −inf keeps everything and gives dense attention. A NaN score is never kept by its
own rule, and makes the row NaN through the denominator, as dense attention would.
Source: Top-Theta attention, arXiv 2502.08363, section 3 (thresholds) and its exact-denominator compensation.
"""

from itertools import pairwise

import torch

from topt_vllm.attention.common import (
    Capabilities,
    DecodeArguments,
    DecodeBatch,
    KeyScreen,
    PagedCache,
    RowThetas,
    ScreenLimits,
    Selection,
    Stat,
    Thetas,
)
from topt_vllm.attention.common import new_statistics as new_statistics
from topt_vllm.attention.screen import ScreenFormat, refined_scores, screen_scores

capabilities = Capabilities(narrow_values=True, screens={"int4": ScreenLimits(), "int4+4": ScreenLimits()})


def prepare(device_type: str) -> None:
    """Nothing: it runs wherever torch does."""


def scaled_scores(query: torch.Tensor, key: torch.Tensor, scale: float, softcap: float = 0.0) -> torch.Tensor:
    """Scores of one row: query [H, D] against key [Hkv, n, D], float32 [H, n]."""
    num_kv_heads, _, head_dim = key.shape
    grouped = query.float().view(num_kv_heads, -1, head_dim)
    return softcapped((grouped @ key.float().transpose(1, 2)).flatten(0, 1) * scale, softcap)


def softcapped(scores: torch.Tensor, softcap: float) -> torch.Tensor:
    """Scaled scores under a logits softcap, 0 for none."""
    return softcap * torch.tanh(scores / softcap) if softcap > 0 else scores


def forced(n: int, selection: Selection, dense_from: int, device: torch.device) -> torch.Tensor:
    """Keys that are kept whatever their score: bool [n]; those from ``dense_from`` on are."""
    keys = torch.arange(n, device=device)
    first = min(n - selection.recent_tokens, dense_from)
    return (keys < selection.sink_tokens) | (keys >= first) | (n <= selection.min_seq_len)


def select(scores: torch.Tensor, theta: torch.Tensor | None, always: torch.Tensor) -> torch.Tensor:
    """Each head's own rule.

    Args:
        scores: float32 [H, n].
        theta: float32 [H], or None for θ = −inf.
        always: bool [n], keys that are kept whatever their score.

    Returns:
        bool [H, n].
    """
    if theta is None:
        return torch.ones_like(scores, dtype=torch.bool)
    # A NaN score is not >= −inf, but dense attention would read the row.
    return (scores >= theta[:, None]) | torch.isneginf(theta)[:, None] | always


def screened(
    scores: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    screen: KeyScreen,
    theta: torch.Tensor,
    always: torch.Tensor,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One row's scores as a K screen lets them be seen.

    Args:
        scores: float32 [H, n], exact.
        query: [H, D].
        key: [Hkv, n, D].
        screen: Of the layer.
        theta: float32 [H].
        always: bool [n], keys that are kept whatever their score.
        scale: Factor of q·k.
        softcap: Logits softcap, 0 for none.

    Returns:
        Scores float32 [H, n], candidates bool [Hkv, n], and keys whose K is read bool [Hkv, n].
    """
    num_kv_heads, n, _ = key.shape
    group = query.shape[0] // num_kv_heads
    keys, queries = screen.transform.encode(key), screen.transform.queries(query)
    seen, upper = (softcapped(part, softcap) for part in screen_scores(queries, keys, screen.margin, scale))
    # Keys that can't be told, whose upper end is NaN, are candidates.
    candidates = ~(upper < theta[:, None]).view(num_kv_heads, group, n).all(dim=1) | always
    unscreened = torch.isneginf(theta).view(num_kv_heads, group).any(dim=1) | always.all()
    candidates |= unscreened[:, None]
    exact = candidates
    if screen.format == "int4+4":
        exact = unscreened[:, None].expand(-1, n)
        refined = softcapped(refined_scores(queries, keys, scale), softcap)
        seen = torch.where(candidates.repeat_interleave(group, dim=0), refined, seen)
    return torch.where(exact.repeat_interleave(group, dim=0), scores, seen), candidates, exact


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
    key_screen: KeyScreen | None = None,
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
        statistics: Accumulators [8] to add to, indexed by :class:`Stat`.
        reached: int64 [H], counters of keys with s_j >= θ(n) to add to; none where θ is −inf.
        sinks: [H], logits of attention sinks; None for none.
        key_screen: Of the layer; its codes are made of ``key`` here. None for none.

    Returns:
        float32 [H, Dv].
    """
    num_kv_heads, n, _ = key.shape
    group = query.shape[0] // num_kv_heads
    scores = scaled_scores(query, key, scale, softcap)
    always = forced(n, selection, n if dense_from is None else dense_from, key.device)
    candidates = exact = torch.ones(num_kv_heads, n, dtype=torch.bool, device=key.device)
    if key_screen is not None and theta is not None and len(always) > key_screen.min_seq_len:
        scores, candidates, exact = screened(scores, query, key, key_screen, theta, always, scale, softcap)
    kept = select(scores, theta, always)
    # A margin of 0 or so lets rounding tell a survivor from a candidate.
    kept &= candidates.repeat_interleave(group, dim=0)
    read = kept.view(num_kv_heads, group, n).any(dim=1)
    used = read.repeat_interleave(group, dim=0) if selection.group_keep == "union" else kept

    logits = scores if sinks is None else torch.cat([scores, sinks.to(scores.dtype)[:, None]], dim=1)
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
        # A row of NaN would make the sum NaN for good.
        statistics[Stat.DROPPED_MASS] += dropped.nan_to_num(0.0).sum()
        statistics[Stat.K_ROWS_READ] += exact.sum()
        statistics[Stat.CANDIDATES] += candidates.sum()
    if reached is not None and theta is not None and n > selection.min_seq_len:
        met = (scores >= theta[:, None]) & ~torch.isneginf(theta)[:, None]
        reached += (met & candidates.repeat_interleave(group, dim=0)).sum(dim=-1)
    return out


def decode(given: DecodeArguments) -> None:
    """Every row of a batch over the paged cache."""
    cache, batch, selection, out = given.cache, given.batch, given.selection, given.out
    statistics, reached = given.statistics, given.reached
    block_size = cache.value.shape[2]
    # Where nothing is compensated, nothing is kept for where sums end.
    state_rows = cache.rows_per_state if selection.compensation == "vmean" else None
    starts = batch.query_start_loc.tolist()
    for sequence, last_len in enumerate(batch.seq_lens.tolist()):
        first, end = starts[sequence], starts[sequence + 1]
        blocks = batch.block_table[sequence, : -(-last_len // block_size)].long()
        key = gather(cache.key, blocks, cache.key_scale)
        value = gather(cache.value, blocks, cache.value_scale)
        for row in range(first, end):
            n = last_len - (end - 1 - row)
            out[row] = attend_row(
                given.query[row],
                key[:, :n],
                value[:, :n],
                _theta(given.thetas, row, n),
                selection,
                given.scale,
                given.softcap,
                dense_from=None if state_rows is None else (n - 1) // state_rows * state_rows,
                statistics=None if statistics is None else statistics[0],
                reached=None if reached is None else reached[row],
                sinks=given.sinks,
                key_screen=cache.key_screen,
            ).to(out.dtype)


def finish(cache: PagedCache, batch: DecodeBatch) -> None:
    """Writes the V sums that end in rows of a batch; :class:`topt_vllm.attention.api.Implementation` has the rule.

    No K screen: its codes are made where they are read.

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


def screen_unasked(heads_per_kv: int) -> ScreenFormat | None:
    """None: it reads all of K whatever it is told."""
    return None


def screen_bytes(format: ScreenFormat, head_dim: int, block_size: int) -> int:
    """None: codes are made of K whenever they are needed."""
    return 0


def _write_state(cache: PagedCache, table: torch.Tensor, state: int, state_rows: int) -> None:
    assert cache.value_sums is not None
    block_size = cache.value.shape[2]
    block, slot = table[state * state_rows // block_size], state * state_rows % block_size
    rows = cache.value[block, :, slot : slot + state_rows]
    total = torch.zeros_like(cache.value_sums[0, :, 0])
    for row in rows.float().unbind(dim=1):
        total += row
    if state > 0:
        before = state * state_rows - 1
        total += cache.value_sums[table[before // block_size], :, before % block_size // state_rows]
    cache.value_sums[block, :, slot // state_rows] = total


def _theta(thetas: Thetas | RowThetas | None, row: int, n: int) -> torch.Tensor | None:
    if isinstance(thetas, RowThetas):
        return thetas.theta[row]
    return None if thetas is None else thetas.at(n)


def gather(part: torch.Tensor, blocks: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """K or V of a sequence's blocks, [Hkv, n, D]; what has a scale as float32 times it."""
    rows = part[blocks].transpose(0, 1).flatten(1, 2)
    return rows if scale is None else rows.float() * scale
