"""Large pages: what torch and the kernel are told; tests/test_engine_parallel.py looks at an engine's cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from topt_vllm import large_pages

VARIABLE = "THP_MEM_ALLOC_ENABLE"


def test_a_value_of_the_user_s_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "0")
    large_pages.ask()
    assert os.environ[VARIABLE] == "0"
    monkeypatch.delenv(VARIABLE)
    large_pages.ask()
    assert os.environ[VARIABLE] == "1"


@pytest.mark.parametrize(
    ("setting", "given"),
    [
        ("always [madvise] never", True),
        ("[always] madvise never", True),
        ("always madvise [never]", False),
        (None, False),
    ],
)
def test_the_kernel_is_asked_what_it_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str | None, given: bool
):
    file = tmp_path / "enabled"
    if setting is not None:
        file.write_text(setting + "\n")
    monkeypatch.setattr(large_pages, "_KERNEL", file)
    assert large_pages.given() == given


@pytest.mark.parametrize("given", [True, False])
def test_start_up_says_once_where_there_are_none(monkeypatch: pytest.MonkeyPatch, given: bool):
    from topt_vllm.backend.hosts import cpu_platform

    said: list[str] = []
    monkeypatch.setattr(cpu_platform.logger, "info", said.append)
    monkeypatch.setattr(large_pages, "given", lambda: given)
    cpu_platform.note_small_pages.cache_clear()
    for _ in range(2):
        cpu_platform.note_small_pages()
    cpu_platform.note_small_pages.cache_clear()
    assert len(said) == (not given)


# What torch allocates behind the benchmark tells whether it had allocated before it was told.
_BENCH = """
from pathlib import Path
from topt_vllm.cli.main import main

main("bench decode --batch 1 --seq-lens 64 --heads 1 --kv-heads 1 --keep 1.0 --seconds 0".split())

import torch

kept = torch.ones(2**26, dtype=torch.int8)
lines = Path("/proc/self/smaps").read_text().splitlines()
print(sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:")))
"""


@pytest.mark.skipif(not large_pages.given(), reason="this kernel gives no large pages")
def test_benchmarks_of_decode_calls_have_them():
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    said = subprocess.run(
        [sys.executable, "-c", _BENCH], env=environment, capture_output=True, text=True, check=True
    )
    assert int(said.stdout.splitlines()[-1]) > 2**15, "kibibytes"
