"""YAML of threshold tables, which may come from strangers: read in bounded time and memory, and never executed.

A table needs mappings, lists, numbers, texts, true, false and null. Everything else of YAML is refused: tags,
anchors, aliases and merge keys, directives, keys that stand twice or aren't text, integers in other bases, a second
document.
"""

import math
import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from topt_vllm.table.schema import ThresholdTableError

# 80 layers × 64 heads × 12 lengths × 4 budgets take 2.8 MB and 0.37 million values.
MAX_BYTES = 16 << 20
MAX_VALUES = 2_000_000
# No mapping of a table has more than some tens. Each unknown one is a record of its own in pydantic's error.
MAX_KEYS = 256
# A number inside budgets → layers → theta → head stands seven deep.
_MAX_DEPTH = 16
_MAX_NUMBER = 64

# libyaml's parser is ten times faster than the pure Python one.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# libyaml compares each directive with all others, so many of them take hours.
_DIRECTIVE = re.compile("(?:^\ufeff?|[\n\r\x85\u2028\u2029])%")
# Up to 18 digits: fits int64, and the interpreter converts it fast.
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})")
_CONSTANTS = {
    ".inf": math.inf,
    "+.inf": math.inf,
    "-.inf": -math.inf,
    ".nan": math.nan,
}
_TAG = "tag:yaml.org,2002:"


def read(path: Path) -> Any:
    """Content of a YAML file as dicts, lists, numbers, texts, booleans and None.

    Raises:
        ThresholdTableError: It can't be read, is too large, isn't YAML, or uses what tables may not use.
    """
    text = _read_text(path)
    if _DIRECTIVE.search(text):
        raise ThresholdTableError(f"{path}: not valid YAML for a table: a line begins with %; remove it")
    try:
        loader = _Loader(text)
        try:
            return _Builder(loader, path).document()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ThresholdTableError(f"{path}: not valid YAML: {' '.join(str(error).split())[:500]}") from None


def _read_text(path: Path) -> str:
    try:
        # A device or a pipe may never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ThresholdTableError(f"{path}: can't be read: not a file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ThresholdTableError(
                f"{path}: too large for a threshold table: more than {MAX_BYTES:,} bytes"
            )
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ThresholdTableError(
            f"{path}: can't be read as UTF-8: {error.reason} at byte {error.start}"
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, ThresholdTableError):
            raise
        raise ThresholdTableError(f"{path}: can't be read: {error}") from error


class _Builder:
    """Builds plain data from the parser's events; PyYAML's own composer would follow aliases without a limit."""

    def __init__(self, loader: Any, path: Path):
        self._loader = loader
        self._path = path
        self._values = 0

    def document(self) -> Any:
        self._loader.get_event()  # the stream's start
        event = self._loader.get_event()
        if isinstance(event, yaml.StreamEndEvent):
            return None
        content = self._value(self._loader.get_event(), 0)
        self._loader.get_event()  # the document's end
        event = self._loader.get_event()
        if not isinstance(event, yaml.StreamEndEvent):
            raise self._error(event, "a second document begins; a table is one")
        return content

    def _value(self, event: Any, depth: int) -> Any:
        self._values += 1
        if self._values > MAX_VALUES:
            raise self._error(event, f"more than {MAX_VALUES:,} values, too many for a threshold table")
        if isinstance(event, yaml.AliasEvent):
            raise self._error(event, f"alias *{str(event.anchor)[:80]}; write the value out")
        if event.anchor is not None:
            raise self._error(event, f"anchor &{event.anchor[:80]}; remove it")
        if event.tag is not None:
            raise self._error(event, f"tag {event.tag[:80]}; remove it")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        if depth == _MAX_DEPTH:
            raise self._error(event, f"nested more than {_MAX_DEPTH} deep")
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(depth)
        return self._mapping(depth)

    def _sequence(self, depth: int) -> list[Any]:
        items = []
        while not isinstance(event := self._loader.get_event(), yaml.SequenceEndEvent):
            items.append(self._value(event, depth + 1))
        return items

    def _mapping(self, depth: int) -> dict[str, Any]:
        items: dict[str, Any] = {}
        while not isinstance(event := self._loader.get_event(), yaml.MappingEndEvent):
            key = self._value(event, depth + 1)
            if not isinstance(key, str):
                raise self._error(event, f"key {str(key)[:80]} is no text")
            if key in items:
                raise self._error(event, f"key {key[:80]!r} stands twice; remove one")
            if len(items) == MAX_KEYS:
                raise self._error(event, f"more than {MAX_KEYS} keys in one mapping")
            items[key] = self._value(self._loader.get_event(), depth + 1)
        return items

    def _scalar(self, event: Any) -> Any:
        text = event.value
        if not event.implicit[0] or len(text) > _MAX_NUMBER:
            return text
        kind = self._loader.resolve(yaml.ScalarNode, text, event.implicit).removeprefix(_TAG)
        if kind == "float":
            return self._float(event)
        if kind == "int":
            if not _INTEGER.fullmatch(text):
                raise self._error(event, f"integer {text}; write it in decimal, with at most 18 digits")
            return int(text)
        if kind == "bool":
            return text.lower() in ("true", "yes", "on")
        if kind in ("merge", "value"):
            raise self._error(event, f"merge key {text}; write the values out")
        # A date is text here.
        return None if kind == "null" else text

    def _float(self, event: Any) -> float:
        try:
            return float(event.value)
        except ValueError:
            if event.value.lower() not in _CONSTANTS:
                raise self._error(event, f"number {event.value}; write it in decimal") from None
            return _CONSTANTS[event.value.lower()]

    def _error(self, event: Any, problem: str) -> ThresholdTableError:
        mark = event.start_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}"
        return ThresholdTableError(f"{self._path}: not valid YAML for a table: {where}: {problem}")
