"""Memory: what is no longer needed, and running out of it, which has a remedy."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from topt_vllm.replay.options import ReplayError


@contextmanager
def explained(tokens: int, error: type[ReplayError], more: str = "") -> Iterator[None]:
    """Within it, running out of memory raises an error that says what takes less.

    Args:
        tokens: Of the longest sequence.
        error: What is raised.
        more: Said at the end.
    """
    message = (
        f"out of memory with sequences of {tokens} tokens; lower --max-seq-length, use a narrower --dtype, or "
        f"spread the model with --device auto{more}"
    )
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as cause:
        raise error(message) from cause
    except RuntimeError as cause:
        # What torch's CPU allocator raises has no class of its own.
        if "not enough memory" not in str(cause) and "can't allocate memory" not in str(cause):
            raise
        raise error(message) from cause


def give_back() -> None:
    """Gives what was freed back to the system, where the C library can.

    glibc keeps it for what comes next, which finds holes of other sizes and takes new memory beside them: a third
    more in a calibration, whose passes keep K and V.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
