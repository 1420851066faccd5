"""Starts and stops a real ``vllm serve`` around a measurement."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from topt_vllm.engines.process import EngineError, environment

# Until /health must answer.
_START_SECONDS = 900
_POLL_SECONDS = 0.5
_STOP_SECONDS = 30


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serve(
    model: str,
    backend: str | None,
    toptheta: dict[str, Any] | None,
    options: Sequence[str],
    log: Path,
) -> Iterator[str]:
    """Runs ``vllm serve`` until the block ends, whatever ends it.

    Args:
        model: Folder or hub id.
        backend: Attention backend; None for the one that vLLM picks unasked.
        toptheta: The plugin's settings; None for none.
        options: More options of ``vllm serve``.
        log: File for the server's output.

    Yields:
        The server's base URL.

    Raises:
        EngineError: It ended or did not answer in time; the message ends with the tail of its log.
    """
    port = free_port()
    command = [str(Path(sys.executable).with_name("vllm")), "serve", model, "--port", str(port)]
    command += ["--host", "127.0.0.1", *options]
    if backend is not None:
        command += ["--attention-backend", backend]
    if toptheta is not None:
        command += ["--additional-config", json.dumps({"toptheta": toptheta})]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(url, process, log)
        yield url
    finally:
        _stop(process)


def picked_backend(log: str) -> str:
    """The attention backend that vLLM picked, from its log; on CPUs it has but one, and says nothing."""
    from vllm.platforms import current_platform

    found = re.search(r"Using (\w+) (?:attention )?backend out of potential backends", log)
    if found:
        return found[1]
    return "CPU_ATTN" if current_platform.is_cpu() else "vLLM's choice"


def is_healthy(url: str, timeout: float) -> bool:
    """Whether a server's /health answers within ``timeout`` seconds."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=timeout):
            return True
    except OSError:  # of which urllib's errors are kinds
        return False


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if is_healthy(url, timeout=5):
            return
        time.sleep(_POLL_SECONDS)
    state = "did not answer in time" if process.poll() is None else f"ended with status {process.returncode}"
    raise EngineError(f"vllm serve {state}; the end of {log}:\n{log.read_text()[-3000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the server's whole process group: its engine and workers are processes of their own."""
    for signal_number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, signal_number)
            process.wait(_STOP_SECONDS)
        # Who interrupts once more wants it gone at once.
        except (ProcessLookupError, subprocess.TimeoutExpired, KeyboardInterrupt):
            continue
