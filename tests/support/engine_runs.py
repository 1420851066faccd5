"""Engines are slow to start: what a test session ran once, it doesn't run again, in whichever of its processes."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

# Shared by the processes of a session; conftest.py sets it.
folder: Path | None = None


def once(request: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``run`` returned for this request, in JSON's types; a run that failed is tried again."""
    assert folder is not None
    name = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    kept = folder / f"{name}.json"
    with FileLock(folder / f"{name}.lock"):
        if not kept.exists():
            kept.write_text(json.dumps(run()))
    found: dict[str, Any] = json.loads(kept.read_text())
    return found
