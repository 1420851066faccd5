"""Intermediate results beside the output, so that a killed run can go on where it was.

Each result is one file, written in one step. A digest of everything that shapes the results stands beside them: a
run with other options doesn't take them up.
"""

import hashlib
import os
import shutil
import tempfile
from dataclasses import asdict
from typing import Any

import torch

from topt_vllm.calibration.key_statistics import SKIPPED_TOKENS
from topt_vllm.calibration.options import ROWS_PER_LENGTH, CalibrationError
from topt_vllm.calibration.plan import ERROR_ROWS, Plan
from topt_vllm.calibration.sensitivity import SENSITIVITY_ROWS
from topt_vllm.version import __version__

# What a run may change without changing its results.
_FREE = {"output", "force", "resume"}


class Partial:
    """The folder of intermediate results of one run."""

    def __init__(self, plan: Plan) -> None:
        """Takes up what a run before left, with ``resume``, or starts with an empty folder.

        Raises:
            CalibrationError: What is there comes from other options.
        """
        output = plan.options.output
        self.folder = output.with_name(output.name + ".partial")
        digest = _digest(plan)
        if self.folder.exists() and plan.options.resume:
            found = self.folder / "digest"
            if not found.exists() or found.read_text(encoding="utf-8") != digest:
                raise CalibrationError(
                    f"--resume: {self.folder} was left by a run with another model, text or options; "
                    "repeat that run's command, or leave --resume out to start over"
                )
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        (self.folder / "digest").write_text(digest, encoding="utf-8")

    def load(self, name: str) -> Any:
        """A result by its name, or None."""
        path = self.folder / f"{name}.pt"
        return torch.load(path, weights_only=True) if path.exists() else None

    def save(self, name: str, result: Any) -> None:
        """Keeps a result: tensors, numbers, and lists or dicts of them."""
        handle, temporary = tempfile.mkstemp(dir=self.folder)
        with os.fdopen(handle, "wb") as file:
            torch.save(result, file)
        os.replace(temporary, self.folder / f"{name}.pt")

    def remove(self) -> None:
        """Deletes everything, once the table is written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _digest(plan: Plan) -> str:
    options = {name: value for name, value in asdict(plan.options).items() if name not in _FREE}
    facts = (
        __version__,
        torch.__version__,
        sorted(options.items()),
        plan.subject,
        (plan.lengths, plan.dense_layers),
        (plan.ks, ROWS_PER_LENGTH, ERROR_ROWS, SENSITIVITY_ROWS, SKIPPED_TOKENS),
        [source.model_dump() for source in plan.sources],
        plan.sequences,
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()
