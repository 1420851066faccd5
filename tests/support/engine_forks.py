"""Engines forked from a process that has imported vLLM: importing it takes longer than most of them run.

Engines with processes of their own, such as ranks or a separate core, still import it in each of those.
"""

import importlib
import io
import json
import os
import signal
import sys
from contextlib import redirect_stdout, suppress
from dataclasses import asdict
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

from topt_vllm.engines.process import EngineError
from topt_vllm.verify.engine import Request

_context = get_context("forkserver")
_context.set_forkserver_preload(
    [
        "vllm.entrypoints.llm",
        "vllm.v1.engine.core",
        "vllm.v1.worker.cpu_worker",
        "vllm.model_executor.models.llama",
    ]
)


def ask(program: str, request: dict[str, Any], separate_core: bool, timeout: float) -> dict[str, Any]:
    """As :func:`topt_vllm.engines.process.ask`, of a module with ``main`` in place of a program.

    Raises:
        EngineError: It failed or took too long.
    """
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(separate_core))}
    receiver, sender = _context.Pipe(duplex=False)
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = _context.Process(target=_answer, args=(program, request, environment, log, sender))
        process.start()
        sender.close()
        try:
            if not receiver.poll(timeout):
                raise EngineError(f"gave no result within {timeout:.0f} s")
            output: str = receiver.recv()
        except EOFError:
            raise EngineError(log.read_text(errors="replace")[-10_000:]) from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()
    result = next(line for line in output.splitlines() if line.startswith("RESULT "))
    found: dict[str, Any] = json.loads(result.removeprefix("RESULT "))
    return found


def _answer(
    program: str, request: dict[str, Any], environment: dict[str, str], log: Path, sender: Connection
) -> None:
    """In the fork: what the program prints, through the pipe."""
    os.setsid()
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin = io.StringIO(json.dumps(request))
    # A file, for vLLM (0.31) silences the descriptor of sys.stdout.
    with TemporaryFile("w+") as said:
        with redirect_stdout(said):
            importlib.import_module(program).main()
        said.seek(0)
        sender.send(said.read())


def run(request: Request, timeout: float) -> dict[str, Any]:
    """As :func:`topt_vllm.verify.engine.run`."""
    return ask("topt_vllm.verify.engine_main", asdict(request), request.separate_core, timeout)
