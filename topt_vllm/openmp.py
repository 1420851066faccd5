"""How long OpenMP's threads look for work before they sleep, in vLLM's CPU workers.

libgomp's look for milliseconds (300,000 turns), longer than vLLM is busy between two steps. Where all cores decode,
one of theirs is then taken from the process that has to see a step's end and begin the next, which waits for its
turn: 4 ms of 32 with SmolLM2 on two cores. 10,000 turns are a fraction of a millisecond, so that threads stay awake
through a step.
"""

import os

_TURNS = "GOMP_SPINCOUNT"
_POLICY = "OMP_WAIT_POLICY"


def wait_briefly() -> None:
    """Has libgomp's threads do so in processes that start from now on, where the environment doesn't say it."""
    if _POLICY not in os.environ:
        os.environ.setdefault(_TURNS, "10000")
