"""Files that commands write: checked before the long work, and put in place in one step when it is done."""

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Of a file system's 255 bytes, with room for a suffix.
_LONGEST_NAME = 240


def write_text(text: str, path: Path, force: bool = False) -> None:
    """Writes a file in one step: a reader sees the old file or the whole new one.

    Raises:
        OSError: The file exists and ``force`` is not set, or it can't be written.
    """
    with in_one_step(path, force) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def in_one_step(path: Path, force: bool = False) -> Iterator[Path]:
    """Gives a file beside ``path`` to write, which takes its place once the block has ended well.

    Raises:
        OSError: The file exists and ``force`` is not set, or it can't be written.
    """
    refuse_overwrite(path, force)
    try:
        # Names may be as long as the file system allows.
        temporary = path.parent / f".topt-vllm-{secrets.token_hex(8)}{path.suffix[:9]}"
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise OSError(f"{path}: {not_writable(path) or error.strerror}") from error
    try:
        yield temporary
        if force:
            os.replace(temporary, path)
        else:
            _link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _link(name: Path, path: Path) -> None:
    """The file under its name, if nothing else has got that meanwhile."""
    try:
        os.link(name, path)
    except FileExistsError:
        raise
    except OSError:
        # Not all file systems have hard links: then the name is taken before the file is put there.
        path.touch(exist_ok=False)
        os.replace(name, path)


def refuse_overwrite(path: Path, force: bool) -> None:
    """Raises FileExistsError when ``path`` exists and ``force`` is not set; call it before the long work."""
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is a folder, a device or a pipe; name a file")
    if os.path.lexists(path) and not force:
        raise FileExistsError(f"{path} exists; name another file, or give --force where the command has it")


def is_one_of(path: Path, others: Iterable[Path]) -> bool:
    """Whether a file is one of these, by whatever name; call it where an output may replace what is there."""
    return path.exists() and any(other.exists() and path.samefile(other) for other in others)


def not_writable(path: Path) -> str | None:
    """Why a file can't be made there, or None; call it before the long work."""
    try:
        # A link is replaced, wherever it points to.
        folder = path.parent.resolve()
        exists = folder.is_dir()
    except (OSError, RuntimeError) as error:  # pathlib's own, of links in a circle
        return str(getattr(error, "strerror", None) or error)
    if not exists:
        return f"the folder {folder} does not exist"
    if len(os.fsencode(path.name)) > _LONGEST_NAME:
        return "the file's name is too long; take a shorter one"
    return None if os.access(folder, os.W_OK | os.X_OK) else f"the folder {folder} can't be written to"
