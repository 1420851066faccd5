"""A program that runs one vLLM engine in a process of its own, so that its crash or hang is an answer too."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import psutil

# Of the command line of a process that multiprocessing starts, which outlives all that have shared memory.
_TRACKER = "multiprocessing.resource_tracker"
# Of a group that is killed.
_LONGEST_END, _POLL_SECONDS = 10.0, 0.05


class EngineError(RuntimeError):
    """An engine that gave no result; the message has its own words."""


def environment(**more: str) -> dict[str, str]:
    """This process's, for an engine of its own: its counters belong in no running server's folder."""
    return {name: value for name, value in os.environ.items() if name != "PROMETHEUS_MULTIPROC_DIR"} | more


def ask(
    program: Sequence[str], request: dict[str, Any], separate_core: bool, timeout: float
) -> dict[str, Any]:
    """Runs a Python program that reads a request as JSON and prints ``RESULT {...}``.

    Args:
        program: Arguments of Python.
        request: What the program reads from its standard input.
        separate_core: Whether the engine's core is a process of its own, as under ``vllm serve``; it is slower to
            start.
        timeout: After which it is killed, with all that it started (seconds).

    Raises:
        EngineError: It failed or took too long.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, *program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment(VLLM_ENABLE_V1_MULTIPROCESSING=str(int(separate_core))),
            start_new_session=True,
        )
        late = threading.Event()
        timer = threading.Timer(timeout, _expire, (process, late))
        timer.start()
        try:
            output, result = _converse(process, json.dumps(request))
        finally:
            timer.cancel()
            # The engine's own processes survive a parent that was killed, and take seconds to leave by themselves.
            _kill_group(process)
        log.seek(0)
        words = output + log.read()
    if result is not None:
        return result
    if late.is_set():
        raise EngineError(f"gave no result within {timeout:.0f} s")
    raise EngineError(f"exit status {process.returncode}: {_reason(words)}")


def _converse(process: subprocess.Popen[str], request: str) -> tuple[str, dict[str, Any] | None]:
    """Sends the request, and reads up to the result: what was said before it, and the result if there is one."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError), process.stdin:
        process.stdin.write(request)
    said: list[str] = []
    with process.stdout:
        for line in process.stdout:
            if line.startswith("RESULT "):
                return "".join(said), json.loads(line.removeprefix("RESULT "))
            said.append(line)
    process.wait()
    return "".join(said), None


def _expire(process: subprocess.Popen[str], late: threading.Event) -> None:
    late.set()
    _kill_group(process)


def _kill_group(process: subprocess.Popen[str]) -> None:
    """Kills what the program started; multiprocessing's trackers remove its shared memory then, and leave."""
    deadline = time.monotonic() + _LONGEST_END
    while (found := _group(process.pid)) and time.monotonic() < deadline:
        for each in found:
            with suppress(psutil.NoSuchProcess):
                if _TRACKER not in " ".join(each.cmdline()):
                    each.kill()
        time.sleep(_POLL_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _group(leader: int) -> list[psutil.Process]:
    """Processes of a group that haven't ended."""
    found = []
    for each in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(each.pid) == leader and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
    return found


def _reason(words: str) -> str:
    """The first error in a log; later ones are mostly its echoes, and those in warnings didn't end it."""
    found = re.search(r"^(?!.*\bWARNING\b).*?((?:\w+\.)*\w*(?:Error|Exception): .+)$", words, re.MULTILINE)
    return found[1] if found else words.strip()[-500:] or "no output"
