"""How a batch falls into decode rows and prefill rows."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from topt_vllm.backend.rows import row_lengths, rows_after, split


def batch(requests: Sequence[tuple[int, int]], first: int = 0, **options: Any) -> CommonAttentionMetadata:
    """A step of requests (context length, query rows), the first of which has the number ``first``."""
    seq_lens, query_lens = (torch.tensor(column, dtype=torch.int32) for column in zip(*requests, strict=True))
    numbers = torch.arange(first, first + len(requests), dtype=torch.int32)
    starts = torch.cat([torch.zeros(1), query_lens.cumsum(0)]).int()
    positions = [torch.arange(n - rows, n) for n, rows in zip(seq_lens, query_lens, strict=True)]
    slots = [1000 * number + place for number, place in zip(numbers, positions, strict=True)]
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=seq_lens,
        num_reqs=len(requests),
        num_actual_tokens=int(starts[-1]),
        max_query_len=64,
        max_seq_len=512,
        block_table_tensor=numbers[:, None].expand(-1, 4).clone(),
        slot_mapping=torch.cat(slots),
        seq_lens_cpu_upper_bound=seq_lens.clone(),
        is_prefilling=seq_lens == query_lens,
        req_idx=numbers.numpy().copy(),
        **options,
    )


def test_rows_after_the_decode_rows_are_a_batch_of_their_own():
    decoding, rest = [(300, 1), (77, 3)], [(40, 40), (130, 2)]
    known = {"_num_computed_tokens_cache": torch.zeros(4), "_token_to_req_indices_cache": torch.zeros(46)}
    found = rows_after(batch([*decoding, *rest], **known), len(decoding), 4)
    expected = batch(rest, first=len(decoding))
    for field in fields(CommonAttentionMetadata):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        assert type(ours) is type(theirs), field.name
        assert np.array_equal(ours, theirs), field.name


@pytest.mark.parametrize("decoding", [1, 2, 3, 4])
def test_what_platforms_take_is_at_multiples_of_16_bytes(decoding: int):
    """Triton attention was compiled anew while serving, at most numbers of decode rows before a prompt."""
    whole = batch([*[(300, 1)] * decoding, (40, 40), (50, 50)])
    whole = whole.replace(block_table_tensor=whole.block_table_tensor[:, :3].contiguous())
    found = rows_after(whole, decoding, decoding)
    for name in ("query_start_loc", "seq_lens", "block_table_tensor"):
        tensor, before = getattr(found, name), getattr(whole, name)
        assert tensor.data_ptr() % 16 == 0, name
        assert name == "query_start_loc" or torch.equal(tensor, before[decoding:])


def test_a_batch_without_decode_rows_is_left_as_it_is():
    whole = batch([(40, 40)])
    assert rows_after(whole, 0, 0) is whole


def test_each_row_sees_the_tokens_up_to_its_own():
    starts, seq_lens = torch.tensor([0, 1, 4]), torch.tensor([9, 20])
    assert row_lengths(starts, seq_lens).tolist() == [9, 18, 19, 20]


@pytest.mark.parametrize(
    ("threshold", "decoding", "expected"),
    [(1, True, (1, 1, True)), (4, True, (2, 4, True)), (1, False, (1, 1, True))],
)
def test_requests_with_few_rows_decode(threshold: int, decoding: bool, expected: tuple[int, int, bool]):
    common = batch([(300, 1), (77, 3), (40, 40)])
    assert split(common, threshold, ends_of_prompts_decode=decoding) == expected


def test_ends_of_prompts_decode_where_they_may():
    # The last token of a prompt whose earlier ones are known.
    common = batch([(300, 1), (41, 1), (40, 40)]).replace(is_prefilling=torch.tensor([False, True, True]))
    assert split(common, 1, ends_of_prompts_decode=True) == (2, 2, True)
    assert split(common, 1, ends_of_prompts_decode=False) == (1, 1, True)


def test_what_is_not_causal_is_prefill():
    assert split(batch([(300, 1), (41, 1)], causal=False), 1, ends_of_prompts_decode=True) == (0, 0, True)
