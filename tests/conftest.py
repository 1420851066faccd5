"""Fixtures that several test files share: what scripts/prepare_demo.py puts into the cache folder."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import device  # first, for it decides whether Triton's interpreter is used
import emulation
import engine_runs
import pytest

from topt_vllm import envs


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--emulate", choices=emulation.INSTRUCTIONS, help="what the CPU kernel is compiled with")


def pytest_configure(config: pytest.Config) -> None:
    if instructions := config.getoption("--emulate"):
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        emulation.install(instructions, Path(folder.name))


def pytest_report_header(config: pytest.Config) -> list[str]:
    """So that nobody takes a run in the interpreter for one on a GPU."""
    instructions = config.getoption("--emulate")
    return [device.describe(), *([f"CPU kernel: {instructions}, emulated"] if instructions else [])]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start engines come first: what takes minutes must not be left to one process at the end."""
    slowest = {item.path for item in items if item.get_closest_marker("engine")}
    items.sort(key=lambda item: item.path not in slowest)


def prepared(part: str) -> Path:
    """A file or folder of the cache; the test is skipped where it has not been prepared."""
    path = envs.cache_dir() / part
    if not path.exists():
        pytest.skip(
            f"{path} is missing; run: .venv/bin/python scripts/prepare_demo.py --model smollm2 gemma3"
        )
    return path


@pytest.fixture(scope="session", autouse=True)
def shared_engine_runs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """pytest-xdist gives each of its processes a folder in the session's own."""
    base = tmp_path_factory.getbasetemp()
    engine_runs.folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture
def screens_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """K screens for rows of any length, also where reading K would be faster: made contexts are short."""
    from topt_vllm.attention.common import ScreenLimits
    from topt_vllm.attention.cpu import launcher

    offered = replace(launcher.capabilities, screens={"int4+4": ScreenLimits()})
    monkeypatch.setattr(launcher, "capabilities", offered)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Checkpoint of SmolLM2-135M-Instruct."""
    return prepared("models/SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Checkpoint of Gemma 3 270M."""
    return prepared("models/gemma-3-270m")


@pytest.fixture(scope="session")
def texts() -> Path:
    """Folder of plays (NAME.txt) and code (human_eval.txt, human_eval.jsonl)."""
    return prepared("texts")


@pytest.fixture(scope="session")
def unseen_play(texts: Path) -> Path:
    """A play that no shipped table was calibrated on."""
    return texts / "romeo_and_juliet.txt"
