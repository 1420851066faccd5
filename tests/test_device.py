"""What takes cases to a GPU, with copies on the CPU in the GPU's place."""

import pytest
import torch
from attention_cases import Case, random_case
from device import Mover, on_device

from topt_vllm.attention import reference
from topt_vllm.attention.common import DecodeArguments, Selection, new_statistics

CPU = torch.device("cpu")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Numbers that are equal where NaNs are the same NaN."""
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.uint8], ids=str)
def test_a_case_is_moved_as_it_lies(dtype: torch.dtype):
    case = random_case([(1, 100), (0, 0), (2, 33)], dtype=dtype, query_dtype=torch.bfloat16)
    moved: Case = Mover(CPU).move(case)
    pairs = [
        (case.query, moved.query),
        (case.cache.key, moved.cache.key),
        (case.cache.value, moved.cache.value),
        (case.cache.value_sums, moved.cache.value_sums),
        (case.batch.block_table, moved.batch.block_table),
    ]
    for original, copy in pairs:
        assert copy.dtype == original.dtype
        assert copy.stride() == original.stride()
        assert copy.storage_offset() == original.storage_offset()
        assert copy.data_ptr() != original.data_ptr()
        assert torch.equal(bits(copy), bits(original))
    # K and V lie in one piece of memory, and what is between rows of the query came along.
    assert moved.cache.key.untyped_storage().data_ptr() == moved.cache.value.untyped_storage().data_ptr()
    assert moved.query.untyped_storage().nbytes() == case.query.untyped_storage().nbytes()
    assert (moved.selection, moved.scale, moved.cache.key_screen) == (case.selection, case.scale, None)


def test_tensors_that_overlap_still_do():
    memory = torch.arange(12.0)
    windows = memory.as_strided((5, 4), (2, 1))
    mover = Mover(CPU)
    moved, whole = mover.move(windows), mover.move(memory)
    moved[0, 2] = 77.0
    assert moved[1, 0] == whole[2] == 77.0
    assert memory[2] == 2.0
    whole[11] = 99.0
    mover.copy_back()
    assert memory.tolist() == [0.0, 1.0, 77.0, *range(3, 11), 99.0]


def test_tensors_without_elements_are_moved():
    moved = Mover(CPU).move(torch.empty(0, 4, dtype=torch.int32))
    assert (moved.shape, moved.dtype) == ((0, 4), torch.int32)


def test_results_come_back_with_what_was_written_beside_them(monkeypatch: pytest.MonkeyPatch):
    """As a kernel that counts, and strays by one element behind its output."""
    monkeypatch.setattr("device.ON_GPU", True)
    monkeypatch.setattr("device.DEVICE", CPU)
    case = random_case([(1, 40), (2, 33)], selection=Selection(compensation="none"))
    step = (case.query, case.cache, case.batch, case.thetas, case.selection, case.scale, case.softcap)

    def stray(given: DecodeArguments) -> None:
        reference.decode(given)
        out = given.out
        out.as_strided((1,), (1,), out.storage_offset() + out.shape[2]).fill_(5.0)

    memory, counted = torch.full((3, 4, 80), torch.nan, dtype=torch.bfloat16), new_statistics()
    on_device(stray)(DecodeArguments(*step, memory[..., :64], counted))
    expected, statistics = torch.empty_like(case.query).contiguous(), new_statistics()
    reference.decode(DecodeArguments(*step, expected, statistics))
    assert torch.equal(memory[..., :64], expected)
    assert torch.equal(counted, statistics)
    assert memory[0, 0, 64] == 5.0
    assert memory[0, 0, 65:].isnan().all()
