"""What every mode of ``topt-vllm bench`` says about its numbers, and where it writes them."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from topt_vllm.errors import UserError
from topt_vllm.output import not_writable, write_text
from topt_vllm.version import __version__


def check_output(path: Path | None) -> None:
    """Call it before the long work.

    Raises:
        UserError: The file exists, or can't be written.
    """
    if path and os.path.lexists(path):
        raise UserError(f"{path} exists; name another file")
    if path and (problem := not_writable(path)):
        raise UserError(f"{path}: {problem}")


def refuse_interpreter() -> None:
    """Call it before what compiles is imported.

    Raises:
        UserError: Triton would interpret.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise UserError("TRITON_INTERPRET is set, so nothing would be compiled; unset it")


def provenance() -> dict[str, Any]:
    """What the numbers depend on, also printed."""
    from topt_vllm.benchmarks.timing import machine

    found = {**machine(), "topt_vllm": __version__, "commit": _commit(), "command": shlex.join(sys.argv)}
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    return found


def write_json(path: Path | None, content: Any) -> None:
    """Writes the file, if one was asked for."""
    if path:
        write_text(json.dumps(content, indent=1) + "\n", path)


def _commit() -> str | None:
    """Of the source tree; None for an installed package, and where git isn't."""
    root = Path(__file__).parents[2]
    # Above an installed package may lie a tree of the user's.
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None
