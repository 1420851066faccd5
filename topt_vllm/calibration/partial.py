"""Intermediate results beside the output, so that a killed run can go on where it was.

Each result is one file, written in one step. A digest of everything that shapes the results stands beside them: a
run with other options doesn't take them up.
"""

import hashlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock, Timeout

from topt_vllm.calibration.key_statistics import SKIPPED_TOKENS
from topt_vllm.calibration.options import ROWS_PER_LENGTH, CalibrationError
from topt_vllm.calibration.plan import ERROR_ROWS, Plan
from topt_vllm.calibration.sensitivity import SENSITIVITY_ROWS
from topt_vllm.output import in_one_step
from topt_vllm.version import __version__

# What a run may change without changing its results.
_FREE = {"output", "force", "resume"}
_LOCK = "lock"
_WEIGHTS = (".safetensors", ".bin", ".gguf")


class Partial:
    """The folder of intermediate results of one run."""

    def __init__(self, plan: Plan) -> None:
        """Nothing is written before :meth:`held`.

        Raises:
            CalibrationError: What is there comes from other options, or from the same and wasn't asked for.
        """
        output = plan.options.output
        self.folder = output.with_name(output.name + ".partial")
        self._digest = _digest(plan)
        self._taken_up = self.folder.exists() and plan.options.resume
        if self._taken_up:
            self._check()
        elif any(self.folder.glob("*.pt")) and self._known() == self._digest:
            raise CalibrationError(
                f"{self.folder} has what a run with the same options found before it ended; add --resume to go on "
                "from there, or remove that folder to start over"
            )

    def _check(self) -> None:
        if self._known() != self._digest:
            raise CalibrationError(
                f"--resume: {self.folder} was left by a run with another model, text or options; "
                "repeat that run's command, or remove that folder to start over"
            )

    def _known(self) -> str | None:
        """The digest of the run that left the folder."""
        path = self.folder / "digest"
        return path.read_text(encoding="utf-8") if path.exists() else None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other processes out; takes up what a run before left, with ``resume``, or starts anew.

        Raises:
            CalibrationError: Another process is making the same table, or has left results of other options.
        """
        self.folder.mkdir(exist_ok=True)
        lock = FileLock(self.folder / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise CalibrationError(
                f"{self.folder}: another calibration is making this table; wait for it, or name another --output"
            ) from error
        try:
            if self._taken_up:
                self._check()  # another run may have been here while the model was loaded
            else:
                for path in self.folder.iterdir():
                    if path.name != _LOCK:
                        path.unlink()
                (self.folder / "digest").write_text(self._digest, encoding="utf-8")
            yield
        except KeyboardInterrupt:
            print(
                f"{self.folder} keeps what was found; the same command with --resume goes on", file=sys.stderr
            )
            raise
        finally:
            lock.release()

    def load(self, name: str) -> Any:
        """A result by its name, or None; also where the file is damaged, so that it is made anew."""
        path = self.folder / f"{name}.pt"
        try:
            return torch.load(path, weights_only=True) if path.exists() else None
        except Exception:  # torch raises errors of many kinds, from EOFError to pickle's
            return None

    def save(self, name: str, result: Any) -> None:
        """Keeps a result: tensors, numbers, and lists or dicts of them."""
        with in_one_step(self.folder / f"{name}.pt", force=True) as temporary:
            torch.save(result, temporary)

    def remove(self) -> None:
        """Deletes everything, once the table is made, or where a resumed run would fail as this one."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _files(model: str) -> list[tuple[str, int, int]]:
    """What tells the weights of a folder from others: name, size (bytes) and time (ns) of files; [] for hub ids."""
    folder = Path(model)
    if not folder.is_dir():
        return []
    found = [(path.name, path.stat()) for path in folder.iterdir() if path.suffix in _WEIGHTS]
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)


def _digest(plan: Plan) -> str:
    options = {name: value for name, value in asdict(plan.options).items() if name not in _FREE}
    facts = (
        __version__,
        torch.__version__,
        transformers.__version__,
        _files(plan.options.model),
        sorted(options.items()),
        plan.subject,
        (plan.lengths, plan.dense_layers),
        (plan.ks, ROWS_PER_LENGTH, ERROR_ROWS, SENSITIVITY_ROWS, SKIPPED_TOKENS),
        [source.model_dump() for source in plan.sources],
        plan.sequences,
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()
