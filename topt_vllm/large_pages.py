"""Large pages, of 2 MiB, for what torch allocates on CPUs.

Skipping reads rows here and there in gigabytes: with pages of 4 KiB nearly each of them misses the TLB. Linux
gives large pages to memory that asks for them (transparent huge pages, "madvise"). Asking is free before the memory
is first written; later each page is copied, which takes seconds a gigabyte. vLLM allocates its cache and fills
it at once, so it is torch that has to ask, and torch does where its own variable says so.
"""

import os
from pathlib import Path

_VARIABLE = "THP_MEM_ALLOC_ENABLE"
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def ask() -> None:
    """Has torch ask for them in processes that start from now on, and in this one if torch hasn't allocated yet.

    torch looks at the variable once, when it first allocates. A value that is there already stays.
    """
    os.environ.setdefault(_VARIABLE, "1")


def given() -> bool:
    """Whether the kernel gives large pages to who asks."""
    try:
        return "[never]" not in _KERNEL.read_text(encoding="ascii")
    except OSError:
        return False
