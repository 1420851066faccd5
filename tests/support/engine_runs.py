"""Engines are slow to start: what a test session ran once, it doesn't run again, in whichever of its processes."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from topt_vllm.verify.near_ties import compare

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


def assert_same_tokens(ours: Sequence[Sequence[int]], stock: dict[str, Any], dtype: str) -> None:
    """Equal up to near ties: stock's two highest logits within two steps of the dtype, the rounding of either."""
    found = compare(ours, stock["tokens"], stock["logits"], dtype)
    assert not found.wrong
    assert found.equal, "every prompt ended in a near tie: nothing was compared to the end"
