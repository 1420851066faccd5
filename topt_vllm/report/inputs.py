"""Reads the files of a report and refuses those that don't belong together. They may come from strangers."""

import hashlib
import json
import shlex
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from topt_vllm.errors import UserError
from topt_vllm.report.records import Decoded, Evaluated, Origin, Served
from topt_vllm.table.check import clipped
from topt_vllm.table.file import first_problem, load
from topt_vllm.table.schema import ThresholdTable
from topt_vllm.table.words import as_text

# A record with a needle grid has some kilobytes; thousands of them fit.
_MAX_BYTES = 16 << 20
_EVALUATE = "what `topt-vllm evaluate --json` writes"
_BENCH = "what `topt-vllm bench decode --json` or `bench serve --json` writes"


class ReportError(UserError):
    """A report that can't be made; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Source:
    """One file that went into the report.

    Attributes:
        name: File name.
        sha256: Of its bytes.
        origin: What its numbers depend on; None for the table.
    """

    name: str
    sha256: str
    origin: Origin | None


@dataclass(frozen=True)
class Inputs:
    """Everything that the page is made of.

    Attributes:
        table: The table.
        evaluated: Records of all evaluations.
        decoded: Cases of all decode benchmarks.
        served: Engine benchmarks.
        sources: The files, the table first.
        notes: What a reader should know about how the files fit together.
    """

    table: ThresholdTable
    evaluated: list[Evaluated]
    decoded: list[Decoded]
    served: list[Served]
    sources: list[Source]
    notes: list[str]

    @property
    def texts(self) -> list[Evaluated]:
        """Records on texts."""
        return [record for record in self.evaluated if record.cells is None and record.task is None]

    @property
    def needles(self) -> list[Evaluated]:
        """Records with a needle grid."""
        return [record for record in self.evaluated if record.cells is not None]

    @property
    def tasks(self) -> list[Evaluated]:
        """Records of tasks."""
        return [record for record in self.evaluated if record.task is not None]

    def evaluate_command(self, options: str) -> str:
        """What writes records of the table's own budget, with these options."""
        command = f"topt-vllm evaluate --model MODEL_FOLDER --dataset TEXT.txt {options}"
        return f"{command} --budget {shlex.quote(str(self.table.budget(None).key))} --json E.json"


def read(table_path: Path, evaluations: list[Path], benches: list[Path]) -> Inputs:
    """Reads and checks everything.

    Raises:
        ReportError: A file isn't what it should be, or is about another model.
        ThresholdTableError: The table can't be used.
        OSError: A file can't be read.
    """
    table = load(table_path)
    inputs = Inputs(
        table, [], [], [], [Source(as_text(table_path.name), _sha256(table_path.read_bytes()), None)], []
    )
    for path in evaluations:
        content, digest = _json(path, "--evaluation", _EVALUATE)
        records = _parsed(list[Evaluated], content, path, _EVALUATE)
        inputs.evaluated.extend(records)
        _accept(inputs, path, digest, "--evaluation", [record.provenance for record in records])
    for path in benches:
        content, digest = _json(path, "--bench", _BENCH)
        if isinstance(content, dict):
            served = _parsed(Served, content, path, _BENCH)
            inputs.served.append(served)
            _note_name(inputs, path, served.settings.model)
            origins = [served.provenance]
        else:
            cases = _parsed(list[Decoded], content, path, _BENCH)
            inputs.decoded.extend(cases)
            origins = [_of_case(case) for case in cases]
        _accept(inputs, path, digest, "--bench", origins)
    return inputs


def _note_name(inputs: Inputs, path: Path, served: str) -> None:
    """The engine's benchmark knows its model by name or folder alone."""
    if Path(served).name != Path(inputs.table.model.id).name:
        inputs.notes.append(
            f"{as_text(path.name)} served {served}; whether that is the table's model isn't known."
        )


def _of_case(case: Decoded) -> Origin:
    return case.provenance.model_copy(update={"model": case.model, "fingerprint": case.fingerprint})


def _accept(inputs: Inputs, path: Path, digest: str, option: str, origins: list[Origin]) -> None:
    """Adds the file to the sources when it speaks about the table's model."""
    model = inputs.table.model
    for origin in origins:
        if origin.fingerprint not in (None, model.fingerprint):
            raise ReportError(
                f"{option} {path} is about another model: {clipped(origin.model)} with fingerprint "
                f"{clipped(origin.fingerprint)}, and the table is of {clipped(model.id)} with {model.fingerprint}"
            )
    first, name = origins[0], as_text(path.name)
    if digest in (source.sha256 for source in inputs.sources):
        raise ReportError(f"{option} {path} is named twice; its records would count twice")
    if option == "--evaluation":
        if first.fingerprint is None:
            inputs.notes.append(f"{name} doesn't say which model it evaluates; evaluate again to be sure.")
        elif first.table_sha256 not in (None, inputs.sources[0].sha256):
            inputs.notes.append(
                f"{name} was evaluated with another table file of the same model, {first.table}."
            )
    inputs.sources.append(Source(name, digest, first))


def _json(path: Path, option: str, wanted: str) -> tuple[Any, str]:
    """Content and digest."""
    # A device or a pipe may never end.
    if not stat.S_ISREG(path.stat().st_mode):
        raise ReportError(f"{option} {path}: not a file")
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ReportError(f"{option} {path}: more than {_MAX_BYTES:,} bytes; {option} takes {wanted}")
    try:
        found = json.loads(content.decode("utf-8"))
        # JSON can name halves of characters, which no page can hold.
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{option} {path}: not JSON: {str(error)[:200]}") from None
    if not found or not isinstance(found, dict | list):
        raise ReportError(f"{option} {path}: holds no records; {option} takes {wanted}")
    return found, _sha256(content)


def _parsed(kind: Any, content: Any, path: Path, wanted: str) -> Any:
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise ReportError(f"{path}: {first_problem(error)}; expected {wanted}") from None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
