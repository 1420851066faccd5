"""Random paged caches in vLLM's CPU layout, hostile where an implementation must not look, and an fp64 oracle."""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from device import DEVICE, triton_implementation

from topt_vllm.attention import api
from topt_vllm.attention.common import DecodeArguments, DecodeBatch, PagedCache, RowThetas, Selection, Thetas

NAN = float("nan")
GARBAGE_BLOCK = 2**31 - 1
# What a cache of one byte an element may hold, by the code of a NaN.
BYTES = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7F}
SCALES = 0.037, 0.021  # of K and V in such a cache: no powers of two


def implementation(name: str) -> api.Implementation:
    """An implementation, for tensors on the CPU: ``triton`` takes them to the GPU where there is one."""
    if name == "triton":
        module = api.load_implementation(name, DEVICE.type)[1]
        return triton_implementation(module.decode, module.finish, module.screen_bytes)
    return api.load_implementation(name, "cpu")[1]


@dataclass(frozen=True)
class Case:
    """One decode call.

    Attributes:
        query: [R, H, D].
        cache: Blocks of K stored [D, P].
        batch: Rows and block table.
        thetas: Thresholds or None.
        selection: Selection and compensation.
        scale: Factor of q·k.
        softcap: 0 for none.
        sinks: float32 [H], or None for none.
    """

    query: torch.Tensor
    cache: PagedCache
    batch: DecodeBatch
    thetas: Thetas | RowThetas | None
    selection: Selection
    scale: float
    softcap: float = 0.0
    sinks: torch.Tensor | None = None

    def run(
        self,
        by: str | api.Implementation,
        statistics: torch.Tensor | None = None,
        reached: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Output of an implementation, or of the one with a name, written into a buffer full of NaN."""
        if out is None:
            out = self.query.new_full((*self.query.shape[:2], self.cache.value.shape[3]), NAN)
        step = self.query, self.cache, self.batch, self.thetas, self.selection, self.scale, self.softcap
        given = DecodeArguments(*step, out, statistics, reached, self.sinks)
        api.decode(implementation(by) if isinstance(by, str) else by, given)
        return out

    def rows(self) -> list[tuple[int, int, int]]:
        """(row, sequence, n) of every query row."""
        starts = self.batch.query_start_loc.tolist()
        found = []
        for sequence, last in enumerate(self.batch.seq_lens.tolist()):
            end = starts[sequence + 1]
            found += [(row, sequence, last - (end - 1 - row)) for row in range(starts[sequence], end)]
        return found

    def gather(self, sequence: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the first n tokens, each [Hkv, n, D]; those of a scaled cache in float64."""
        blocks = self.batch.block_table[sequence, : -(-n // self.cache.value.shape[2])].long()
        parts = []
        for part, scale in (
            (self.cache.key, self.cache.key_scale),
            (self.cache.value, self.cache.value_scale),
        ):
            rows = part[blocks].transpose(0, 1).flatten(1, 2)[:, :n]
            parts.append(rows if scale is None else rows.double() * scale.double())
        return parts[0], parts[1]

    def scores64(self, row: int, sequence: int, n: int) -> torch.Tensor:
        """float64 [H, n]."""
        key, _ = self.gather(sequence, n)
        query = self.query[row].double().view(key.shape[0], -1, key.shape[2])
        scores = (query @ key.double().transpose(1, 2)).flatten(0, 1) * self.scale
        return self.softcap * torch.tanh(scores / self.softcap) if self.softcap else scores

    def probabilities(self, scores: torch.Tensor) -> torch.Tensor:
        """Of the keys, [H, n]: beside a sink they sum to less than 1."""
        if self.sinks is None:
            return scores.softmax(dim=-1)
        return torch.cat([scores, self.sinks.to(scores.dtype)[:, None]], dim=1).softmax(dim=-1)[:, :-1]


def paged_cache(key: torch.Tensor, value: torch.Tensor, state_rows: int = 16) -> PagedCache:
    """A cache in the CPU layout, its V sums NaN.

    Args:
        key: [B, Hkv, P, D].
        value: [B, Hkv, P, D].
        state_rows: T.
    """
    blocks, heads, size, dim = key.shape
    memory = torch.empty(blocks, heads, 2, size * dim, dtype=key.dtype)
    cache = PagedCache(
        memory[:, :, 0].unflatten(2, (dim, size)).transpose(2, 3),
        memory[:, :, 1].unflatten(2, (size, dim)),
        torch.full((blocks, heads, size // state_rows, dim), NAN),
    )
    cache.key.copy_(key)
    cache.value.copy_(value)
    return cache


def random_case(
    contexts: list[tuple[int, int]],
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    query_dtype: torch.dtype | None = None,
    selection: Selection | None = None,
    keep: float | None = 0.15,
    softcap: float = 0.0,
    seed: int = 0,
    state_rows: int = 16,
    sinks: torch.Tensor | None = None,
) -> Case:
    """Sequences scattered over a block table; whatever lies outside them is NaN or an absurd block number.

    Args:
        contexts: (query rows, context length of the last row) of each sequence.
        heads: Query heads.
        kv_heads: KV heads.
        head_dim: D.
        block_size: P.
        dtype: Of the cache; one of ``BYTES`` gives it scales.
        query_dtype: Of query and output; the cache's when None, which must then be no byte.
        selection: Default: the operator's defaults.
        keep: Share of scores above θ, which lies in a gap between scores; None for no thresholds.
        softcap: 0 for none.
        seed: Of the generator.
        state_rows: T.
        sinks: float32 [H], or None for none.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-context // block_size) for _, context in contexts]
    total = sum(counts) + 3
    order = torch.randperm(total, generator=generator)[: sum(counts)]
    table = torch.full((len(contexts), max(counts, default=0) + 2), GARBAGE_BLOCK, dtype=torch.int32)
    shape = (total, kv_heads, block_size, head_dim)
    key, value = torch.full(shape, NAN), torch.full(shape, NAN)
    for sequence, ((_, context), blocks) in enumerate(zip(contexts, order.split(counts), strict=True)):
        table[sequence, : len(blocks)] = blocks.int()
        for block, start in zip(blocks.tolist(), range(0, context, block_size), strict=True):
            used = min(block_size, context - start)
            key[block, :, :used] = torch.randn(kv_heads, used, head_dim, generator=generator)
            value[block, :, :used] = torch.randn(kv_heads, used, head_dim, generator=generator) + 0.3
    if dtype in BYTES:
        key, value = key / SCALES[0], value / SCALES[1]
    cache = paged_cache(key.to(dtype), value.to(dtype), state_rows)
    if dtype in BYTES:
        scales = [torch.tensor([scale]) for scale in SCALES]
        cache = replace(cache, key_scale=scales[0], value_scale=scales[1])
    finish(cache, table, [context for _, context in contexts])
    rows = [rows for rows, _ in contexts]
    starts = torch.tensor([0, *torch.tensor(rows).cumsum(0).tolist()], dtype=torch.int32)
    # Rows, heads and dimensions of the query are all strided.
    packed = 1.5 * torch.randn(sum(rows), heads + 1, head_dim + 16, generator=generator)
    case = Case(
        packed.to(query_dtype or dtype)[:, 1:, :head_dim],
        cache,
        DecodeBatch(starts, torch.tensor([n for _, n in contexts], dtype=torch.int32), table),
        None,
        selection or Selection(),
        head_dim**-0.5,
        softcap,
        sinks,
    )
    return case if keep is None else replace(case, thetas=thetas_in_gaps(case, keep))


def finish(cache: PagedCache, table: torch.Tensor, lengths: list[int], name: str = "reference") -> None:
    """Has an implementation write the V sums, and the K screen, of whole contexts."""
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    batch = DecodeBatch(starts, torch.tensor(lengths, dtype=torch.int32), table)
    implementation(name).finish(cache, batch)


def thetas_in_gaps(case: Case, keep: float) -> Thetas:
    """θ per head and context length, in the widest gap between the scores near a quantile."""
    by_length: dict[int, list[torch.Tensor]] = {}
    for row, sequence, n in case.rows():
        by_length.setdefault(n, []).append(case.scores64(row, sequence, n))
    lengths = sorted(by_length)
    columns = []
    for n in lengths:
        scores = torch.cat(by_length[n], dim=1).sort(dim=1).values
        count = scores.shape[1]
        low, high = int((1 - keep) * 0.95 * count), min(count, int((1 - keep) * 1.05 * count) + 2)
        window = scores[:, low:high]
        if window.shape[1] < 2:
            columns.append(window[:, 0] - 0.5)
            continue
        gap = window.diff(dim=1)
        widest = gap.argmax(dim=1, keepdim=True)
        columns.append((window.gather(1, widest) + gap.gather(1, widest) / 2).flatten())
    theta = torch.stack(columns, dim=1).float()
    return Thetas(torch.tensor(lengths, dtype=torch.int32), theta, torch.zeros(theta.shape[0], 2))


def kept_sets(case: Case) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """fp64 oracle of selection: (kept by each head [H, n], used by each head [H, n]) of every row."""
    found = []
    selection, state_rows = case.selection, case.cache.rows_per_state
    for row, sequence, n in case.rows():
        scores = case.scores64(row, sequence, n)
        position = torch.arange(n)
        always = (
            (position < selection.sink_tokens)
            | (position >= n - selection.recent_tokens)
            | (n <= selection.min_seq_len)
        )
        if selection.compensation == "vmean" and state_rows is not None:
            always = always | (position >= (n - 1) // state_rows * state_rows)
        theta = torch.full((scores.shape[0],), -torch.inf) if case.thetas is None else case.thetas.at(n)
        kept = (scores >= theta.double()[:, None]) | always
        group = scores.shape[0] // case.cache.value.shape[1]
        read = kept.unflatten(0, (-1, group)).any(dim=1).repeat_interleave(group, dim=0)
        found.append((kept, read if selection.group_keep == "union" else kept))
    return found


def attend(case: Case, dtype: torch.dtype) -> torch.Tensor:
    """The operator on the oracle's kept set with every operation in ``dtype``: [R, H, D].

    float64 is the oracle; the cache's own dtype is the eager error that a kernel may have, too.
    """
    out = torch.empty(case.query.shape, dtype=dtype)
    for (row, sequence, n), (_, used) in zip(case.rows(), kept_sets(case), strict=True):
        key, value = (part.to(dtype) for part in case.gather(sequence, n))
        group = used.shape[0] // key.shape[0]
        query = case.query[row].to(dtype).view(key.shape[0], group, -1)
        scores = (query @ key.transpose(1, 2)) * case.scale
        scores = case.softcap * torch.tanh(scores / case.softcap) if case.softcap else scores
        probabilities = case.probabilities(scores.flatten(0, 1))
        weights = (probabilities * used).to(dtype).view(key.shape[0], group, n)
        result = (weights @ value).flatten(0, 1)
        if case.selection.compensation == "vmean" and not bool(used.all()):
            dropped = (probabilities * ~used).sum(dim=-1, keepdim=True)
            result = result + dropped * value.mean(dim=1).repeat_interleave(group, dim=0)
        out[row] = result
    return out


def poison_unread_values(case: Case) -> Case:
    """A copy whose V rows are NaN where no head of any row needs them; V sums stay those of the real rows."""
    value = case.cache.value.clone()
    size = value.shape[2]
    needed = torch.zeros(value.shape[:3], dtype=torch.bool)
    for (_, sequence, n), (kept, _) in zip(case.rows(), kept_sets(case), strict=True):
        read = kept.unflatten(0, (value.shape[1], -1)).any(dim=1)
        blocks = case.batch.block_table[sequence].long()
        for start in range(0, n, size):
            part = read[:, start : start + size]
            needed[blocks[start // size], :, : part.shape[1]] |= part
    nan = BYTES.get(value.dtype)
    (value if nan is None else value.view(torch.uint8))[~needed] = NAN if nan is None else nan
    poisoned = paged_cache(case.cache.key, value)
    return replace(case, cache=replace(case.cache, key=poisoned.key, value=poisoned.value))
