"""The kernel built for lesser vector instructions: it compiles, and passes part of its suite."""

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


@pytest.mark.parametrize("capability", LESSER)
def test_other_vector_instructions(capability: str):
    # What is left out differs in dtypes and shapes only; the whole suite takes minutes without AVX-512.
    part = (
        "(test_groups or test_compensations or test_head_dims or test_softcap or test_codes_are or part_ways "
        "or sinks or many_query_vectors) and not triton"
    )
    files = [str(FOLDER / name) for name in ("test_operator.py", "test_key_screen.py")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", part],
        env=os.environ | {"TOPT_CPU_CAPABILITY": capability},
        cwd=FOLDER.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout[-3000:]
