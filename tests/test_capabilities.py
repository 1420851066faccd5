"""The kernel built for other vector instructions: it compiles, and passes part of its suite."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from topt_vllm.attention.cpu import jit

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent


# All but what this process has, which the suite itself takes.
LESSER = jit.CAPABILITIES[jit.CAPABILITIES.index(jit.capability()) + 1 :]


def check(part: str, *options: str, **environment: str) -> None:
    """Runs this part of the suite in a process of its own."""
    files = [str(FOLDER / name) for name in ("test_operator.py", "test_key_screen.py")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options, *files, "-k", part],
        env=os.environ | environment,
        cwd=FOLDER.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]


@pytest.mark.parametrize("capability", LESSER)
def test_other_vector_instructions(capability: str):
    # What is left out differs in dtypes and shapes only; the whole suite takes minutes without AVX-512.
    part = (
        "(test_groups or test_compensations or test_head_dims or test_softcap or test_codes_are or part_ways "
        "or sinks or many_query_vectors) and not triton"
    )
    check(part, TOPT_CPU_CAPABILITY=capability)


@pytest.mark.skipif(
    jit.capability() not in ("avx2", "avx512"),
    reason="for CPUs with AVX2 that lack AMX; others run the real code",
)
def test_amx_emulated():
    """With AVX-512, for sequences of fewer query vectors than a tile pays for."""
    check("cpu", "--emulate", "amx")
