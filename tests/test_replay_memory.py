"""Memory that replays give back to the system."""

import sys

import psutil
import pytest
import torch

from topt_vllm.replay.memory import give_back

_PART = 2**16


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc that keeps what is freed")
def test_what_lies_free_between_things_in_use_goes_back():
    # Too small for mappings of their own, and full, so that the pages are there.
    parts = [torch.ones(_PART, dtype=torch.uint8) for _ in range(2000)]
    kept = parts[::2]
    del parts
    before = psutil.Process().memory_info().rss
    give_back()
    assert before - psutil.Process().memory_info().rss > 0.8 * len(kept) * _PART
    assert all(bool(part.all()) for part in kept)
