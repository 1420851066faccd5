"""From an open text to its documents: plain text, JSON, lines of JSON, CSV, Parquet; which, its content says.

JSON, CSV and Parquet hold records, whose texts are named "text". A text that is larger than what is needed is not
read whole. Of plain text and lines of JSON in a file, stretches are read that lie evenly over all of it, each from
the start of a line on; of everything else the beginning.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import IO, Any

from topt_vllm.replay.options import ReplayError
from topt_vllm.replay.text_files import TextFile

_BOM = b"\xef\xbb\xbf"
_TEXT = "text"
_LINE_SUFFIXES = (".jsonl", ".ndjson")
_OBJECT = re.compile(rb'\{\s*(?:"(?:[^"\\]|\\.)*"\s*:|\})')
_ARRAY_OF_OBJECTS = re.compile(rb'\[\s*\{\s*(?:"|\})')
# A tokenizer takes 160 bytes and more for each byte of a document.
_LONGEST_DOCUMENT = 4 << 20
_LONGEST_RECORD = 64 << 20
# A line of plain text that is longer is cut in the middle.
_LONGEST_LINE = 64 << 10
_BLOCK = 64 << 10


def documents(file: TextFile, share: int, stretches: int) -> list[str]:
    """The texts of a file.

    Args:
        file: Open, at its start.
        share: Bytes that are needed at most.
        stretches: Into how many they are split where the file is larger.

    Raises:
        ReplayError: Its content can't be read as texts.
    """
    found = (_limited(part, most) for part, most in _parts(file, share, stretches))
    return [piece for part in found for text in part for piece in _pieces(text)]


def _parts(file: TextFile, share: int, stretches: int) -> Iterator[tuple[Iterable[str], int]]:
    """Texts of each part that is read, and how many of their characters are wanted."""
    if file.head.startswith(b"PAR1") or file.suffix == ".parquet":
        yield _parquet(file), share
    elif file.suffix in (".csv", ".tsv"):
        yield _csv(file), share
    elif (kind := _json_kind(file)) == "values":
        yield _values(file), share
    else:
        read, longest = (_lines, _LONGEST_RECORD) if kind == "lines" else (_plain, _LONGEST_LINE)
        if file.size is None:
            yield read(file, 0, _beginning(file, share, longest)), share
            return
        before = 0
        for begin, end in _windows(file.size, share, stretches):
            # A line may be longer than a stretch: each has one at least, and none is read twice.
            start = max(_line_start(file.stream, begin, file.size, longest), before)
            before = _line_start(file.stream, max(end, start + 1), file.size, longest)
            file.stream.seek(start)
            yield read(file, start, file.stream.read(before - start)), before - start


def _limited(texts: Iterable[str], most: int) -> Iterator[str]:
    for text in texts:
        yield text[:most]
        most -= len(text)
        if most <= 0:
            return


def _pieces(text: str) -> list[str]:
    return [text[at : at + _LONGEST_DOCUMENT] for at in range(0, len(text), _LONGEST_DOCUMENT)]


def _windows(size: int, share: int, stretches: int) -> list[tuple[int, int]]:
    """Bytes to read, before they are moved to the starts of lines."""
    if size <= share:
        return [(start, min(start + _LONGEST_DOCUMENT, size)) for start in range(0, size, _LONGEST_DOCUMENT)]
    length = share // stretches
    apart = (size - length) / max(stretches - 1, 1)
    return [(int(index * apart), int(index * apart) + length) for index in range(stretches)]


def _line_start(stream: IO[bytes], at: int, size: int, longest: int) -> int:
    """Where the first line begins at or behind a place, or the next character where lines are too long."""
    if at <= 0 or at >= size:
        return max(0, min(at, size))
    stream.seek(at - 1)
    near = b""
    for read in range(0, longest, _BLOCK):
        block = stream.read(wanted := min(_BLOCK, longest - read))
        if (found := block.find(b"\n")) >= 0:
            return at + read + found
        near = near or block
        if len(block) < wanted:
            return size
    return at + next((n for n in range(4) if near[n + 1 : n + 2] < b"\x80" or near[n + 1] >= 0xC0), 0)


def _beginning(file: TextFile, share: int, longest: int) -> bytes:
    """Of what can only be read on, up to the end of a line, or of a character where lines are too long."""
    content = file.stream.read(share)
    if len(content) == share:
        content += file.stream.readline(longest)
        while content[-1] >= 0x80 and (more := file.stream.read(1)) and 0x80 <= more[0] < 0xC0:
            content += more
    return content


def _plain(file: TextFile, start: int, content: bytes) -> Iterator[str]:
    text = _decoded(file, start, content)
    if "\0" in text:
        raise ReplayError(f"{file.name}: not a text: it has zero bytes")
    yield text


def _decoded(file: TextFile, start: int, content: bytes) -> str:
    try:
        return content.removeprefix(b"" if start else _BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ReplayError(
            f"{file.name}: can't be read as UTF-8 text: {error.reason} at byte {start + error.start}"
        ) from error


def _json_kind(file: TextFile) -> str | None:
    """``lines`` with an object each, ``values`` (an array, or objects over several lines), or None for no JSON."""
    head = file.head.removeprefix(_BOM).lstrip()
    if _ARRAY_OF_OBJECTS.match(head):
        return "values"
    if file.suffix in _LINE_SUFFIXES:
        return "lines"
    if _OBJECT.match(head):
        line, newline, _ = head.partition(b"\n")
        return "lines" if not newline or _is_object(line) else "values"
    return "values" if file.suffix == ".json" else None


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _lines(file: TextFile, start: int, content: bytes) -> Iterator[str]:
    # Not split after decoding: JSON's strings may hold what else ends a line of text.
    at = start
    for number, line in enumerate(content.split(b"\n"), 1):
        where = f"{file.name}:{number}" if start == 0 else f"{file.name}, line {number} after byte {start}"
        if text := _decoded(file, at, line).strip():
            yield _text_of(_parsed(text, where), where)
        at += len(line) + 1


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ReplayError(f"{where}: not valid JSON: {str(error)[:200]}") from error


def _text_of(record: Any, where: str) -> str:
    """The text of a record, or of a JSON text by itself."""
    text = record.get(_TEXT) if isinstance(record, dict) else record if isinstance(record, str) else None
    if not isinstance(text, str):
        found = f"keys {', '.join(map(repr, list(record)[:9]))}" if isinstance(record, dict) else repr(record)
        raise ReplayError(
            f'{where}: an object with a string "{_TEXT}" was expected, not {found[:200]}; rename what has the text'
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ReplayError(
            f"{where}: half of a character, {text[error.start]!r}, which no text can hold; remove it"
        ) from error
    return text


def _values(file: TextFile) -> Iterator[str]:
    """Of an array of records, or of records one behind the other; read as far as they are asked for."""
    stream, decoder = io.TextIOWrapper(file.stream, "utf-8-sig"), json.JSONDecoder()
    held, count, inside, ended = "", 0, False, False
    while True:
        held = held.lstrip(" \t\r\n,")
        if not inside and count == 0 and held.startswith("["):
            held, inside = held[1:].lstrip(), True
        if inside and held.startswith("]"):
            held, inside = held[1:].lstrip(), False
        where = f"{file.name}, record {count + 1}"
        if held and len(held) <= _LONGEST_RECORD:
            try:
                record, end = decoder.raw_decode(held)
            except (ValueError, RecursionError) as error:
                if ended or isinstance(error, RecursionError):
                    raise ReplayError(f"{where}: not valid JSON: {str(error)[:200]}") from error
            else:
                held, count = held[end:], count + 1
                yield _text_of(record, where)
                continue
        elif held:
            raise ReplayError(f"{where}: longer than {_LONGEST_RECORD:,} characters, or not JSON")
        if ended:
            if inside or not count:
                raise ReplayError(f"{where}: not valid JSON: the file ends here")
            return
        # Twice as much each time: a record that isn't there yet is parsed again.
        more = stream.read(max(_BLOCK, len(held)))
        held, ended = held + more, not more


def _csv(file: TextFile) -> Iterator[str]:
    stream = io.TextIOWrapper(file.stream, "utf-8-sig", newline="")
    header = stream.readline(_BLOCK)
    # Spreadsheets of many countries write semicolons.
    delimiter = max(",;\t", key=header.count)
    rows = csv.reader(chain([header], stream), delimiter=delimiter, strict=True)
    before = csv.field_size_limit(_LONGEST_RECORD)
    try:
        columns = next(rows, [])
        _require_column(file, columns)
        for row in rows:
            if row and len(row) != len(columns):
                raise ReplayError(f"{file.name}:{rows.line_num}: {len(row)} cells, {len(columns)} expected")
            if row:
                yield row[columns.index(_TEXT)]
    except csv.Error as error:
        raise ReplayError(f"{file.name}:{rows.line_num}: not valid CSV: {error}") from error
    finally:
        csv.field_size_limit(before)


def _require_column(file: TextFile, columns: list[str]) -> None:
    if _TEXT not in columns:
        found = ", ".join(map(repr, columns))[:200]
        raise ReplayError(f'{file.name}: no column "{_TEXT}", only {found}; rename what has the texts')


def _parquet(file: TextFile) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ReplayError(
            f"{file.name}: reading Parquet needs `pip install pyarrow`; or convert it to lines of JSON"
        ) from error
    if file.size is None:
        raise ReplayError(
            f"{file.name}: Parquet can't be read from a pipe or compressed; unpack it into a file"
        )
    try:
        table = pyarrow.parquet.ParquetFile(file.stream)
        _require_column(file, table.schema_arrow.names)
        count = 0
        for batch in table.iter_batches(64, columns=[_TEXT]):
            for text in batch.column(0).to_pylist():
                count += 1
                yield _text_of(text, f"{file.name}, record {count}")
    except pyarrow.ArrowException as error:
        raise ReplayError(f"{file.name}: not valid Parquet: {str(error).splitlines()[0][:200]}") from error
