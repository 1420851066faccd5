"""Reading and writing threshold tables: a versioned YAML contract between the calibrator and the server.

docs/table.md describes the format; ``schema.py`` has its parts, ``check.py`` its rules.
Loading is strict: whatever does not belong, is missing or does not add up is an error with the file and the key
path. ``dump(load(x))`` gives the same bytes.

A table may come from a stranger: ``yaml.py`` says what of YAML is refused.
"""

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from topt_vllm.output import write_text
from topt_vllm.table.check import check, clipped
from topt_vllm.table.schema import SCHEMA_VERSION, ThresholdTable, ThresholdTableError
from topt_vllm.table.yaml import read

_HEADER = "# Thresholds of Top-Theta attention; written by `topt-vllm calibrate`. θ is in scaled logits.\n"

_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def load(path: str | os.PathLike[str]) -> ThresholdTable:
    """Reads and checks a table.

    Raises:
        ThresholdTableError: The file is missing, isn't YAML, or breaks the schema.
    """
    path = Path(path)
    return _parse(read(path), path)


def dumps(table: ThresholdTable) -> str:
    """The table as YAML text; the same table gives the same text."""
    body = yaml.dump(
        table.model_dump(exclude_unset=True),
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=None,
        width=2**31 - 1,
        allow_unicode=True,
    )
    return _HEADER + body


def dump(table: ThresholdTable, path: str | os.PathLike[str], force: bool = False) -> None:
    """Writes a table in one step: a reader sees the old file or the whole new one.

    Raises:
        FileExistsError: The file exists and ``force`` is not set.
        ThresholdTableError: The table breaks the schema's rules, so it could not be loaded again.
    """
    path = Path(path)
    check(table, path)
    write_text(dumps(table), path, force)


def _parse(content: Any, path: Path) -> ThresholdTable:
    if not isinstance(content, dict):
        raise ThresholdTableError(f"{path}: a mapping was expected, got {type(content).__name__}")
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ThresholdTableError(
            f"{path}: schema_version is {clipped(version)}, this release reads {SCHEMA_VERSION}; calibrate again"
        )
    try:
        table = ThresholdTable.model_validate(content)
    except ValidationError as error:
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ThresholdTableError(f"{path}: {first_problem(error)}{more}") from None
    check(table, path)
    return table


def first_problem(error: ValidationError) -> str:
    """Key path and what is wrong there; pydantic's own message repeats a file's content, whatever its size."""
    first = error.errors()[0]
    parts = (f"[{part}]" if isinstance(part, int) else f".{part[:80]}" for part in first["loc"])
    where = "".join(parts).lstrip(".") or "content"
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key; remove it"
    if first["type"] == "missing":
        return f"{where}: missing key"
    return f"{where}: {first['msg']}, got {clipped(first['input'])}"
