"""The Triton kernels with a K screen: codes to the bit, decoding against the reference operator."""

from dataclasses import replace
from typing import Any

import pytest
import screen_cases
import torch
from attention_cases import NAN, Case, finish, implementation, poison_unread_values, random_case
from device import DEVICE, triton_implementation
from screen_cases import transform_of, with_screen
from test_triton import short_programs, with_programs

from topt_vllm.attention import api, reference
from topt_vllm.attention.common import LargestBatch, RowThetas, Selection, Stat, Thetas, new_statistics
from topt_vllm.attention.screen import EncodedKeys
from topt_vllm.attention.triton import launch, launcher

__all__ = ["short_programs"]

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.usefixtures("short_programs")]


def stored_codes(case: Case, sequence: int, n: int) -> EncodedKeys:
    """What the writer left of the first n rows; only the upper half of codes."""
    screen = case.cache.key_screen
    assert screen is not None
    block_size, head_dim = case.cache.key.shape[2:]
    blocks = case.batch.block_table[sequence, : -(-n // block_size)].long()
    part = screen.codes[blocks].transpose(0, 1)
    packed = part[..., : block_size * head_dim // 2].unflatten(-1, (block_size, -1)).flatten(1, 2)[:, :n]
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).to(torch.int8) - 8
    words = part[..., block_size * head_dim // 2 :].contiguous().view(torch.float16)
    words = words.unflatten(-1, (block_size, 2)).flatten(1, 2)[:, :n]
    return EncodedKeys(codes * 16, words[..., 0], words[..., 1])


def assert_codes(case: Case) -> None:
    """Those of every sequence are the specification's, to the bit; the error norm's sum has another order."""
    screen = case.cache.key_screen
    assert screen is not None
    for sequence, n in enumerate(case.batch.seq_lens.tolist()):
        got, key = stored_codes(case, sequence, n), case.gather(sequence, n)[0]
        expected = screen.transform.encode(key.float())
        assert torch.equal(got.plane_one, expected.plane_one)
        assert torch.equal(got.step.view(torch.int16), expected.step.view(torch.int16))
        steps = got.error.view(torch.int16) - expected.error.view(torch.int16)
        assert (steps.abs() <= 1).all()


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256])
def test_codes_are_the_specification_s(head_dim: int):
    case = random_case([(1, 70), (2, 33), (0, 0)], 2, 2, head_dim)
    key = case.cache.key
    block = case.batch.block_table[0, 0]
    for slot, value in enumerate([NAN, torch.inf, 1e30, 0.0]):
        key[block, 0, slot, 3] = value
    key[block, 1, 5] = transform_of(case).mean[1]
    assert_codes(with_screen(case, "triton"))


def test_codes_of_fp8_are_those_of_scaled_keys():
    case = random_case([(1, 40)], 2, 1, dtype=torch.float8_e4m3fn, query_dtype=torch.float32)
    key = case.gather(0, 40)[0].float()
    screened = with_screen(case, "triton")
    expected = screened.cache.key_screen.transform.encode(key)
    assert torch.equal(stored_codes(screened, 0, 40).plane_one, expected.plane_one)


def test_rows_are_encoded_as_they_come():
    """A prompt's part, then one row after the other, beside padding: the same codes, and nothing beside them."""
    case = random_case([(1, 50), (1, 37)], 2, 2, block_size=16)
    whole = with_screen(case, "triton")
    assert whole.cache.key_screen is not None
    parts = replace(whole.cache.key_screen, codes=torch.full_like(whole.cache.key_screen.codes, 99))
    cache = replace(whole.cache, key_screen=parts)
    finish(cache, case.batch.block_table, [30, 36], "triton")
    for length in range(31, 51):
        starts = torch.tensor([7, 8, 9, 12], dtype=torch.int32)
        lengths = torch.tensor([length, 37, 0], dtype=torch.int32)
        table = torch.cat([case.batch.block_table, case.batch.block_table[:1] * 0 + 2**31 - 1])
        implementation("triton").finish(cache, api.DecodeBatch(starts, lengths, table))
    assert_codes(replace(whole, cache=cache))
    used = case.batch.block_table[0, :4].tolist() + case.batch.block_table[1, :3].tolist()
    others = [block for block in range(len(parts.codes)) if block not in used]
    assert (parts.codes[others] == 99).all()


def run(case: Case, by: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Output, counters and keys that reach θ."""
    statistics, reached = new_statistics(), torch.zeros(case.query.shape[:2], dtype=torch.int64)
    if isinstance(case.thetas, RowThetas):
        reached = None
    return case.run(by, statistics, reached), statistics, reached


def assert_same(case: Case) -> torch.Tensor:
    """The kernel does as the reference operator; gives the counters."""
    got, expected = run(case, with_programs(3)), run(case, "reference")
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-4)
    if got[2] is not None:
        assert torch.equal(got[2], expected[2])
    return got[1][0]


@pytest.mark.parametrize("margin", [2.5, None], ids=["margin", "hard"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(2, 2, 64), (6, 2, 96), (4, 1, 128), (8, 1, 256)], ids=str
)
def test_decode_is_the_reference_s(heads: int, kv_heads: int, head_dim: int, margin: float | None):
    case = random_case([(1, 300), (0, 0), (1, 33)], heads, kv_heads, head_dim, dtype=torch.float32, keep=0.05)
    case = replace(case, batch=replace(case.batch, max_query_rows=1))
    counted = assert_same(with_screen(case, "triton", margin=margin))
    assert 0 < counted[Stat.CANDIDATES] == counted[Stat.K_ROWS_READ] < counted[Stat.V_ROWS]


@pytest.mark.parametrize(
    ("selection", "softcap"),
    [
        (Selection(sink_tokens=3, recent_tokens=5, group_keep="head"), 0.0),
        (Selection(sink_tokens=2, compensation="none"), 5.0),
        (Selection(min_seq_len=100, group_keep="head", compensation="none"), 0.0),
    ],
    ids=["head", "softcap", "min_seq_len"],
)
def test_selections(selection: Selection, softcap: float):
    case = random_case(
        [(1, 280), (1, 90)], 4, 2, dtype=torch.float32, selection=selection, softcap=softcap, keep=0.05
    )
    case = replace(case, batch=replace(case.batch, max_query_rows=1), sinks=torch.randn(4))
    assert_same(with_screen(case, "triton"))


def test_heads_and_lengths_without_a_threshold_are_exact():
    """θ = −inf for one head of a group, and for all below the first length of the table."""
    case = random_case([(1, 280), (1, 200)], 4, 2, dtype=torch.float32, keep=0.05)
    case = replace(case, batch=replace(case.batch, max_query_rows=1))
    theta = torch.full((4, 1), 1.2)
    theta[1] = -torch.inf
    mixed = Thetas(torch.tensor([250], dtype=torch.int32), theta, torch.zeros(4, 2))
    counted = assert_same(with_screen(replace(case, thetas=mixed), "triton"))
    assert counted[Stat.CANDIDATES] > 2 * 200 + 280
    by_row = RowThetas(torch.tensor([[1.2, 1.5, -torch.inf, 1.0], [torch.inf, 1.0, 1.2, 0.9]]))
    assert_same(with_screen(replace(case, thetas=by_row), "triton"))
    without = with_screen(replace(case, thetas=None), "triton")
    counted = assert_same(without)
    assert counted[Stat.CANDIDATES] == counted[Stat.K_ROWS_READ] == counted[Stat.V_ROWS]


@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_scores_may_lie_far_from_that_of_the_mean(monkeypatch: pytest.MonkeyPatch, shift: float):
    """Hundreds of units above and below, where exponentials are beyond float32."""
    case = random_case([(1, 280), (1, 90)], 4, 2, dtype=torch.float32, keep=0.05)
    own = transform_of(case)
    transform = replace(own, mean=own.mean + shift)
    monkeypatch.setattr(screen_cases, "transform_of", lambda case: transform)
    batch = replace(case.batch, max_query_rows=1)
    case = replace(case, batch=batch, scale=1.0, query=case.query.abs())
    for theta in (40.0, torch.inf):
        thetas = RowThetas(torch.full((2, 4), theta))
        counted = assert_same(with_screen(replace(case, thetas=thetas), "triton"))
        assert counted[Stat.CANDIDATES] < counted[Stat.V_ROWS]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_many_sequences_have_programs_of_their_own_kind(head_dim: int):
    contexts = [(1, 40 + 9 * sequence) for sequence in range(16)]
    case = random_case(contexts, 4, 2, head_dim, block_size=64, dtype=torch.float32, keep=0.05)
    case = replace(case, batch=replace(case.batch, max_query_rows=1))
    assert_same(with_screen(case, "triton"))
    assert_same(case)


@pytest.mark.parametrize("group_keep", ["head", "union"])
def test_drafted_rows(group_keep: Any):
    """Each row counts its own candidates; what they hold of the others' is exact, so outputs differ a little."""
    selection = Selection(group_keep=group_keep)
    case = random_case([(3, 200), (1, 280)], 6, 2, dtype=torch.float32, selection=selection, keep=0.05)
    case = with_screen(case, "triton", margin=None)
    got, expected = run(case, with_programs(3)), run(case, "reference")
    torch.testing.assert_close(got[0], expected[0], rtol=0.02, atol=0.01)
    counts = [stat for stat in Stat if stat != Stat.DROPPED_MASS]
    assert torch.equal(got[1][0, counts], expected[1][0, counts])
    assert torch.equal(got[2], expected[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_caches_of_fewer_bits(dtype: torch.dtype):
    case = random_case([(1, 200), (1, 66)], dtype=dtype, query_dtype=torch.float32, keep=0.05)
    assert_same(with_screen(replace(case, batch=replace(case.batch, max_query_rows=1)), "triton"))


def test_k_is_read_of_candidates_only_and_garbage_behind_the_context_is_not_seen(
    monkeypatch: pytest.MonkeyPatch,
):
    """Whatever the programs, and with lists that are filled again."""
    monkeypatch.setattr(launch, "_LIST_BYTES", 1)
    case = with_screen(random_case([(1, 447)], 4, 1, dtype=torch.float32, keep=0.05), "triton")
    expected = run(case, "reference")
    screen, key = case.cache.key_screen, case.gather(0, 447)[0]
    assert screen is not None
    scores = reference.scaled_scores(case.query[0], key, case.scale)
    always = reference.forced(447, case.selection, 446 // 16 * 16, key.device)
    _, candidates, _ = reference.screened(
        scores, case.query[0], key, screen, case.thetas.at(447), always, case.scale, 0.0
    )
    hidden = case.cache.key.clone()
    for position in (~candidates[0]).nonzero().flatten().tolist():
        hidden[case.batch.block_table[0, position // 32], 0, position % 32] = NAN
    case = poison_unread_values(replace(case, cache=replace(case.cache, key=hidden)))
    for programs in (1, 3):
        out, statistics, reached = run(case, with_programs(programs))
        torch.testing.assert_close(out, expected[0], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(statistics, expected[1], rtol=1e-5, atol=1e-4)
        assert torch.equal(reached, expected[2])


def test_a_row_that_cannot_be_stored_is_a_candidate():
    """Its K decides: with a NaN in it, the row's head is NaN, as dense attention would be."""
    case = random_case([(1, 100)], 2, 2, dtype=torch.float32, keep=0.05)
    case.cache.key[case.batch.block_table[0, 1], 0, 3, 5] = NAN
    out = run(with_screen(case, "triton"), with_programs(1))[0]
    assert out[0, 0].isnan().all()
    assert out[0, 1].isfinite().all()


def test_a_workspace_serves_screens():
    case = with_screen(random_case([(1, 200), (2, 65)]), "triton")
    case = replace(case, batch=replace(case.batch, max_query_rows=2))
    bound = launcher.allocate(LargestBatch(4, 3, 4, 2, 64, DEVICE), programs=3)
    bound.memory.fill_(NAN)
    assert bound.screen_bytes("int4", 64, 16) == 16 * (32 + 4)
    kernel = triton_implementation(bound.decode, bound.finish, bound.screen_bytes)
    for got, expected in zip(run(case, kernel), run(case, with_programs(3)), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_what_cannot_be_screened_is_refused():
    with pytest.raises(ValueError, match="multiples of 8, got 36"):
        launcher.screen_bytes("int4", 36, 16)
    case = with_screen(random_case([(1, 100)]), "triton")
    assert case.cache.key_screen is not None
    screen = replace(case.cache.key_screen, codes=case.cache.key_screen.codes[:, :, :-4])
    with pytest.raises(RuntimeError, match=r"key_screen: codes: expected torch.uint8 \[7, 2, 1152\], got"):
        replace(case, cache=replace(case.cache, key_screen=screen)).run("triton")
