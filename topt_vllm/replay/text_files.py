"""What people hand over as texts, opened: files, compressed ones too, folders and pipes."""

import bz2
import gzip
import io
import lzma
import os
import stat
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from topt_vllm.replay.options import ReplayError

# Of the files in a folder these are texts; named by themselves, files may end as they like.
TEXT_SUFFIXES = (".txt", ".text", ".md", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_COMPRESSED: dict[bytes, tuple[str, Any]] = {
    b"\x1f\x8b": (".gz", lambda file: gzip.GzipFile(fileobj=file)),
    b"BZh": (".bz2", bz2.BZ2File),
    b"\xfd7zXZ\x00": (".xz", lzma.LZMAFile),
}
_COMPRESSED_SUFFIXES = tuple(suffix for suffix, _ in _COMPRESSED.values())
# What is known by its first bytes, and can't be read.
_FOREIGN = {
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"%PDF": "a PDF",
    b"ARROW1": "an Arrow file",
    b"GGUF": "a GGUF file",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
# Seen before the format is known (bytes).
_HEAD = 64 << 10
# A named pipe may be opened by its writer after us.
WRITER_SECONDS = 5.0


@dataclass(frozen=True)
class TextFile:
    """An open text, at its start.

    Attributes:
        name: As it was given, for messages.
        suffix: Of the text inside, where it is compressed; lower case.
        head: Its first bytes.
        stream: All of it.
        size: Bytes, where any part can be read by itself; None where only reading on tells.
    """

    name: str
    suffix: str
    head: bytes
    stream: IO[bytes]
    size: int | None


class _Again(io.RawIOBase):
    """A stream whose beginning has been read already."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        super().__init__()
        self._head, self._rest = io.BytesIO(head), rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._head.read(len(buffer)) or self._rest.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        super().close()
        self._rest.close()


def files_of(path: Path) -> list[Path]:
    """The file itself, or a folder's text files in sorted order. Folders inside it are left alone.

    Raises:
        ReplayError: The folder has none.
        OSError: It can't be read.
    """
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if _is_text(file) and file.is_file())
    if not found:
        raise ReplayError(
            f"--dataset {path}: no text files in this folder; those taken end in {' '.join(TEXT_SUFFIXES)}, with "
            f"{' '.join(_COMPRESSED_SUFFIXES)} behind it or not"
        )
    return found


def _is_text(path: Path) -> bool:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in _COMPRESSED_SUFFIXES]
    return not path.name.startswith(".") and bool(suffixes) and suffixes[-1] in TEXT_SUFFIXES


def known_size(path: Path) -> int | None:
    """Bytes of a text that lies open in a file; None where only reading it tells."""
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        return None
    with path.open("rb") as file:
        return facts.st_size if _compression(file.read(8)) is None else None


@contextmanager
def open_text(path: Path) -> Iterator[TextFile]:
    """Opens a text, whatever it is compressed with.

    Raises:
        ReplayError: It is none, or can't be read; also while it is open.
    """
    try:
        with ExitStack() as held:
            yield _open(path, held)
    except UnicodeDecodeError as error:
        raise ReplayError(f"{path}: can't be read as UTF-8 text: {error.reason}") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ReplayError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from error


def _open(path: Path, held: ExitStack) -> TextFile:
    facts = path.stat()
    regular = stat.S_ISREG(facts.st_mode)
    if not regular and not stat.S_ISFIFO(facts.st_mode):
        raise ReplayError(f"{path}: a device or a socket; texts are read from files, folders and pipes")
    file = held.enter_context(path.open("rb") if regular else _open_pipe(path))
    size = facts.st_size if regular else None
    head = _read(file, _HEAD)
    suffix = path.suffix.lower()
    if (compression := _compression(head)) is not None:
        ending, reader = compression
        file = held.enter_context(reader(_from_start(head, file, size)))
        size, head = None, _read(file, _HEAD)
        suffix = Path(path.stem).suffix.lower() if suffix == ending else suffix
    foreign = next((kind for magic, kind in _FOREIGN.items() if head.startswith(magic)), None)
    if foreign is None and head[257:262] == b"ustar":
        foreign = "a tar archive"
    if foreign is not None:
        raise ReplayError(
            f"{path}: can't be read as UTF-8 text: it is {foreign}. Unpack or convert it; JSON, CSV and Parquet "
            "are read too, and what is compressed with gzip, bzip2 or xz"
        )
    return TextFile(str(path), suffix, head, _from_start(head, file, size), size)


def _from_start(head: bytes, file: IO[bytes], size: int | None) -> IO[bytes]:
    if size is None:
        return io.BufferedReader(_Again(head, file), _HEAD)
    file.seek(0)
    return file


def _compression(head: bytes) -> tuple[str, Any] | None:
    return next((known for magic, known in _COMPRESSED.items() if head.startswith(magic)), None)


def _read(file: IO[bytes], count: int) -> bytes:
    """So many bytes, or all there are; a pipe hands over few at a time."""
    found = b""
    while len(found) < count and (more := file.read(count - len(found))):
        found += more
    return found


def _open_pipe(path: Path) -> IO[bytes]:
    """Waits for a writer, but not for ever; a writer that is there may take its time."""
    # Opened to wait, it would hang where nobody ever writes.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    file = os.fdopen(handle, "rb", buffering=0)
    first, until = b"", time.monotonic() + WRITER_SECONDS
    try:
        while not first:
            first = os.read(handle, 1)
            if not first and time.monotonic() > until:
                raise ReplayError(f"{path}: a pipe that nobody writes to")
            time.sleep(0 if first else 0.05)
    except BlockingIOError:
        # Empty, and not at its end: there is a writer.
        pass
    except BaseException:
        file.close()
        raise
    os.set_blocking(handle, True)
    return io.BufferedReader(_Again(first, file), _HEAD)
