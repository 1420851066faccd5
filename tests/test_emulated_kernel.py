"""AVX-512 and AMX code of the CPU kernel where the CPU lacks them."""

import subprocess
import sys
from pathlib import Path

import pytest

from topt_vllm.attention.cpu import jit


@pytest.mark.slow
@pytest.mark.skipif(
    jit.capability() not in ("avx2", "avx512"),
    reason="for CPUs with AVX2 that lack AMX; others run the real code",
)
def test_emulated_amx_does_as_the_specification():
    """AVX-512 with it, for sequences of fewer query vectors than a tile pays for."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--emulate", "amx"]
    files = [Path(__file__).parent / name for name in ("test_operator.py", "test_key_screen.py")]
    done = subprocess.run([*command, *files, "-k", "cpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
