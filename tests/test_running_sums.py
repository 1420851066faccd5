"""Running V sums: what each implementation writes behind the cache, however rows came, and what a row reads."""

from dataclasses import dataclass, replace

import pytest
import torch
from attention_cases import (
    BYTES,
    GARBAGE_BLOCK,
    NAN,
    Case,
    finish,
    implementation,
    paged_cache,
    random_case,
)
from device import TRITON

from topt_vllm.attention.common import DecodeBatch, PagedCache, Selection, choose_rows_per_state

IMPLS = ["reference", "cpu", TRITON]
every_implementation = pytest.mark.parametrize("impl", IMPLS)
# (block size, T): several states of a block, one, and sizes that are no powers of two.
SIZES = [(64, 16), (64, 32), (64, 64), (128, 64), (16, 16), (48, 16), (48, 48), (48, 3)]
U = 2.0**-24  # rounding of one float32 operation


@dataclass
class Context:
    """One sequence whose V comes row by row.

    Attributes:
        rows: float32 [n, Hkv, D], what is to be written.
        cache: K and V of NaN until they are; V sums likewise.
        table: int32 [1, blocks + 1], shuffled, and behind the blocks no block at all.
    """

    rows: torch.Tensor
    cache: PagedCache
    table: torch.Tensor

    def write(self, begin: int, end: int, impl: str, first_row: int = 0) -> None:
        """Writes rows [begin, end) and has the implementation finish them; they begin a batch at ``first_row``."""
        self.put(begin, self.rows[begin:end])
        starts = torch.tensor([first_row, first_row + end - begin], dtype=torch.int32)
        batch = DecodeBatch(starts, torch.tensor([end], dtype=torch.int32), self.table)
        implementation(impl).finish(self.cache, batch)

    def put(self, begin: int, rows: torch.Tensor) -> None:
        """Writes V rows at positions from ``begin`` on."""
        size = self.cache.value.shape[2]
        coded = rows.to(self.cache.value.dtype)
        for position, row in enumerate(coded, start=begin):
            self.cache.value[self.table[0, position // size], :, position % size] = row

    def states(self, count: int) -> torch.Tensor:
        """The first states, float32 [count, Hkv, D]."""
        size = self.cache.value.shape[2]
        rows = self.cache.rows_per_state
        assert rows is not None
        assert self.cache.value_sums is not None
        places = [(self.table[0, i * rows // size], i * rows % size // rows) for i in range(count)]
        return torch.stack([self.cache.value_sums[block, :, state] for block, state in places])


def context(
    n: int, block_size: int = 64, state_rows: int = 16, dtype: torch.dtype = torch.bfloat16
) -> Context:
    generator = torch.Generator().manual_seed(0)
    blocks = -(-n // block_size)
    rows = torch.randn(n, 2, 32, generator=generator) + 0.3
    key = torch.zeros(blocks + 2, 2, block_size, 32)
    value = torch.full_like(key, NAN)
    table = torch.full((1, blocks + 1), GARBAGE_BLOCK, dtype=torch.int32)
    table[0, :blocks] = torch.randperm(blocks + 2, generator=generator)[:blocks].int()
    cache = paged_cache(key.to(dtype), value.to(dtype), state_rows)
    return Context(rows, cache, table)


def exact(made: Context, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first states in float64, and a bound on the error of those in float32.

    A state adds the sum of its T rows, which has T − 1 roundings of at most u times the sum of magnitudes, to the
    state before it, with a rounding of at most u |S|. Those of all states before stay in it.
    """
    assert made.cache.rows_per_state is not None
    size = made.cache.rows_per_state
    values = made.rows.to(made.cache.value.dtype).double()[: count * size]
    own = values.unflatten(0, (count, size))
    sums = own.sum(dim=1).cumsum(dim=0)
    each = U * (size * own.abs().sum(dim=1) + sums.abs())
    # Products of roundings, and that the float32 state stands for the exact one in the bound.
    return sums, 1.01 * each.cumsum(dim=0)


def check(made: Context, n: int) -> None:
    """The states of n rows are right, and nothing else was written."""
    size = made.cache.rows_per_state
    assert size is not None
    assert made.cache.value_sums is not None
    sums, bound = exact(made, n // size)
    assert ((made.states(n // size).double() - sums).abs() <= bound).all()
    assert int(made.cache.value_sums.isfinite().sum()) == sums.numel()


@every_implementation
@pytest.mark.parametrize(("block_size", "state_rows"), SIZES)
def test_states_are_sums_of_the_prefix(impl: str, block_size: int, state_rows: int):
    made = context(200, block_size, state_rows)
    made.write(0, 200, impl)
    check(made, 200)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *BYTES], ids=str)
def test_sums_are_of_what_is_stored(impl: str, dtype: torch.dtype):
    made = context(100, dtype=dtype)
    made.write(0, 100, impl)
    check(made, 100)


@every_implementation
@pytest.mark.parametrize("chunk", [1, 2, 7, 15, 16, 17, 31, 33, 48, 64, 100, 149])
def test_bits_do_not_depend_on_how_rows_came(impl: str, chunk: int):
    """As prompts of chunks, and decoded rows, come; rows of the batch don't begin at 0."""
    at_once, made = context(150), context(150)
    at_once.write(0, 150, impl)
    for begin in range(0, 150, chunk):
        made.write(begin, min(150, begin + chunk), impl, first_row=3 * begin)
    assert torch.equal(made.states(9), at_once.states(9))


@every_implementation
def test_sequences_of_a_batch_are_finished_beside_each_other(impl: str):
    """A prompt's chunk, a decoded row that ends a state, one that doesn't, no rows, and padding of rows."""
    case = random_case([(1, 128), (1, 64), (1, 71), (1, 96), (1, 40)], block_size=32)
    sums = case.cache.value_sums
    assert sums is not None
    expected = sums.clone()
    table = case.batch.block_table
    written = [(0, torch.arange(3, 8)), (1, torch.tensor([3]))]
    for sequence, states in written:
        sums[table[sequence, states // 2].long(), :, states % 2] = NAN
    padded = torch.cat([table, torch.full_like(table, GARBAGE_BLOCK)])
    batch = DecodeBatch(
        torch.tensor([5, 5 + 80, 86, 87, 87, 88, 90], dtype=torch.int32),
        torch.tensor([128, 64, 71, 96, 0, 0], dtype=torch.int32),
        padded,
    )
    implementation(impl).finish(case.cache, batch)
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-5, equal_nan=True)
    untouched = torch.ones_like(sums, dtype=torch.bool)
    for sequence, states in written:
        untouched[table[sequence, states // 2].long(), :, states % 2] = False
    assert torch.equal(sums[untouched].nan_to_num(7.0), expected[untouched].nan_to_num(7.0))


@every_implementation
def test_rejected_drafts_leave_nothing(impl: str):
    """Drafted rows end a state, are rejected, and are written again with other values: the bits are as without."""
    made, plain = context(100), context(100)
    plain.write(0, 100, impl)
    made.write(0, 60, impl)
    draft = made.rows[60:68] * -3
    made.rows[60:68], kept = draft, made.rows[60:68].clone()
    made.write(60, 68, impl)
    assert not torch.equal(made.states(4), plain.states(4))
    made.rows[60:68] = kept
    # One row is accepted; the next drafts reach the end of the state again, then a row at a time.
    made.write(60, 61, impl)
    made.write(61, 66, impl)
    for n in range(66, 100):
        made.write(n, n + 1, impl)
    assert torch.equal(made.states(6), plain.states(6))


@every_implementation
@pytest.mark.parametrize("left", [NAN, 1e30, torch.inf])
def test_blocks_that_were_used_before_are_written_over(impl: str, left: float):
    made, plain = context(100), context(100)
    plain.write(0, 100, impl)
    made.cache.value.fill_(left)
    assert made.cache.value_sums is not None
    made.cache.value_sums.fill_(left)
    for begin, end in ((0, 40), (40, 41), (41, 90), (90, 100)):
        made.write(begin, end, impl)
    assert torch.equal(made.states(6), plain.states(6))


@every_implementation
def test_sequences_share_the_blocks_of_a_prefix(impl: str):
    """The second has the first's first block from the prefix cache and writes what follows; as if it were alone."""
    made, alone = context(128), context(128)
    alone.write(0, 128, impl)
    made.write(0, 64, impl)
    shared = made.states(4).clone()
    spare = next(i for i in range(4) if i not in made.table[0, :2].tolist())
    made.table = torch.tensor([[int(made.table[0, 0]), spare]], dtype=torch.int32)
    made.write(64, 128, impl)
    assert torch.equal(made.states(8), alone.states(8))
    assert torch.equal(made.states(4), shared)


@every_implementation
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
def test_a_prefix_may_be_another_sequence_s_of_the_same_batch(impl: str, order: list[int]):
    """Found in the prefix cache before it is written: the third's is the second's, whose own is the first's."""
    alone, made = context(320), context(320)
    alone.write(0, 320, impl)
    made.write(0, 20, impl)
    made.put(20, made.rows[20:])
    begins, ends = torch.tensor([20, 64, 192, 0]), torch.tensor([150, 200, 320, 0])
    order_of = torch.tensor(order)
    # Each would have blocks of its own behind its prefix; here all are the same ones and get the same bits.
    batch = DecodeBatch(
        torch.nn.functional.pad((ends - begins)[order_of].cumsum(0), (1, 0)).int(),
        ends[order_of].int(),
        made.table.expand(4, -1).contiguous(),
    )
    implementation(impl).finish(made.cache, batch)
    assert torch.equal(made.states(20), alone.states(20))


@every_implementation
def test_strides_of_the_sums_are_free(impl: str):
    """Between states, heads and blocks lies what belongs to others."""
    made, plain = context(100), context(100)
    plain.write(0, 100, impl)
    assert made.cache.value_sums is not None
    blocks = made.cache.value_sums.shape[0]
    memory = torch.full((4, blocks, 3, 40), NAN)
    sums = memory.permute(1, 2, 0, 3)[:, 1:, :, 4:36]
    made.cache = replace(made.cache, value_sums=sums)
    made.write(0, 100, impl)
    assert torch.equal(made.states(6), plain.states(6))
    assert int(memory.isfinite().sum()) == 6 * 2 * 32


def only_needed_states(case: Case) -> Case:
    """The case with NaN in every state but the one that each row reads: number (n − 1) // T − 1."""
    sums, size = case.cache.value_sums, case.cache.value.shape[2]
    rows = case.cache.rows_per_state
    assert sums is not None
    assert rows is not None
    kept = torch.full_like(sums, NAN)
    for _, sequence, n in case.rows():
        last = (n - 1) // rows * rows - 1
        if last >= 0:
            place = case.batch.block_table[sequence, last // size], slice(None), last % size // rows
            kept[place] = sums[place]
    return replace(case, cache=replace(case.cache, value_sums=kept))


@pytest.mark.parametrize("impl", ["reference", "cpu", TRITON])
@pytest.mark.parametrize(("block_size", "state_rows"), [*SIZES[:-1], (64, 2)])
def test_a_row_reads_one_state(impl: str, block_size: int, state_rows: int):
    """Contexts around the ends of states and blocks, single rows and drafted ones."""
    contexts = [(1, 1), (1, 16), (1, 64), (1, 65), (3, 66), (1, 96), (2, 129), (1, 300), (9, 200)]
    case = random_case(
        contexts, block_size=block_size, state_rows=state_rows, dtype=torch.float32, selection=Selection()
    )
    expected = case.run("reference")
    torch.testing.assert_close(only_needed_states(case).run(impl), expected, rtol=1e-5, atol=3e-6)


@every_implementation
def test_without_compensation_no_state_is_read_and_nothing_more_is_dense(impl: str):
    case = random_case([(1, 100), (2, 70)], dtype=torch.float32, selection=Selection(compensation="none"))
    expected = case.run("reference")
    without = replace(case, cache=replace(case.cache, value_sums=None))
    torch.testing.assert_close(without.run(impl), expected, rtol=1e-5, atol=2e-6)
    implementation(impl).finish(without.cache, without.batch)


@every_implementation
def test_dense_rows_read_no_state(impl: str):
    case = random_case([(1, 100), (1, 70)], dtype=torch.float32, keep=None)
    blank = replace(case, cache=replace(case.cache, value_sums=torch.full_like(case.cache.value_sums, NAN)))
    assert blank.run(impl).isfinite().all()
    short = random_case([(1, 100), (1, 70)], dtype=torch.float32, selection=Selection(min_seq_len=100))
    blank = replace(
        short, cache=replace(short.cache, value_sums=torch.full_like(short.cache.value_sums, NAN))
    )
    assert blank.run(impl).isfinite().all()


@pytest.mark.parametrize("impl", ["cpu", TRITON])
def test_drafted_rows_read_the_state_that_an_earlier_one_ends(impl: str):
    """What the adapter does in a step: write, finish, decode."""
    case = random_case([(5, 98)], dtype=torch.float32)
    sums = case.cache.value_sums
    assert sums is not None
    expected = case.run("reference")
    # Rows of n = 94 .. 98; that of 96 ends state 5, which 97 and 98 read.
    sums[case.batch.block_table[0, 2], :, 1] = NAN
    assert case.run(impl)[3:].isnan().any()
    implementation(impl).finish(case.cache, case.batch)
    torch.testing.assert_close(case.run(impl), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_long_contexts_stay_within_the_bound(impl: str):
    """128k rows: the mean errs by at most the roundings of all states, a few millionths of V."""
    n = 128 * 1024
    made = context(n, 128, 64, torch.bfloat16)
    flat = made.rows.to(torch.bfloat16).unflatten(0, (-1, 128)).transpose(1, 2)
    made.cache.value[made.table[0, : n // 128].long()] = flat
    finish(made.cache, made.table, [n], impl)
    check(made, n)


@pytest.mark.parametrize(
    "shape",
    [(3, 2, 32), (3, 2, 3, 32), (3, 2, 0, 32), (3, 1, 4, 32)],
    ids=["block sums", "no divisor", "no states", "heads"],
)
def test_sums_of_another_shape_are_refused(shape: tuple[int, ...]):
    cache = PagedCache(torch.zeros(3, 2, 64, 32), torch.zeros(3, 2, 64, 32), torch.zeros(shape))
    with pytest.raises(ValueError, match=r"value_sums .* must be \[B=3, Hkv=2, P / T of P=64, Dv=32\]"):
        _ = cache.rows_per_state


def test_states_have_as_many_rows_as_divide_a_block():
    assert [choose_rows_per_state(size) for size in (16, 32, 48, 64, 128, 528, 24)] == [
        16,
        32,
        16,
        64,
        64,
        16,
        24,
    ]
