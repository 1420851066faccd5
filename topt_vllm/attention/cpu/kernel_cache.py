"""The folder of compiled kernels: code is loaded from it, so whoever writes there runs as this user.

Nothing is loaded from a folder or file that another user owns or can write to; root is trusted. A library carries
its own digest, so that a damaged one is noticed before it is mapped: a torn ELF file can kill the process.
"""

import grp
import hashlib
import os
import pwd
import shutil
import stat
import tempfile
from pathlib import Path

_MARK = b"\ntopt-sha256:"
_SEAL_BYTES = len(_MARK) + hashlib.sha256().digest_size
_LEFTOVER = ".build-"
REMEDY = "Set TOPT_CACHE_DIR to a folder of your own that nobody else can write to, with 50 MB free."


class CacheError(RuntimeError):
    """The cache folder can't be used; the message has path, reason and remedy."""


def create_folder(folder: Path) -> None:
    """Makes the folder and missing parents; others may load from them, as a container's user what root has built.

    Raises:
        CacheError: It can't be made, or an existing part of the path isn't to be trusted.
    """
    try:
        missing = [part for part in (folder, *folder.parents) if not part.exists()]
        for part in reversed(missing):
            # Among everybody's temporary files it is this user's alone.
            shared = part.parent == Path(tempfile.gettempdir()).resolve()
            part.mkdir(mode=0o700 if shared else 0o755, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    check_folder(folder)


def check_folder(folder: Path) -> None:
    """Checks that nobody but this user and root can put files into the folder, or another folder in its place.

    Args:
        folder: Absolute, without symbolic links.

    Raises:
        CacheError: Others can.
    """
    for part in (folder, *folder.parents):
        facts = part.stat()
        # In a sticky folder, such as /tmp, others can't rename what isn't theirs; the folder itself isn't one.
        sticky = part != folder and facts.st_mode & stat.S_ISVTX
        problem = _foreign(facts, bool(sticky))
        if problem:
            where = "it" if part == folder else str(part)
            raise CacheError(f"kernels are not loaded from {folder}: {where} {problem}. {REMEDY}")


def unwritable(folder: Path, error: OSError) -> CacheError:
    """The error for a folder that is read-only or full."""
    return CacheError(f"the CPU kernel can't be compiled into {folder}: {error}. {REMEDY}")


def is_sound(path: Path) -> bool:
    """Whether the library is there and is what was sealed.

    Raises:
        CacheError: Others could have written it.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise CacheError(f"{path} can't be read: {error}. Remove it, or: {REMEDY}") from error
    with os.fdopen(handle, "rb") as file:
        facts = os.fstat(handle)
        problem = _foreign(facts) if stat.S_ISREG(facts.st_mode) else "is no file"
        if problem:
            raise CacheError(f"{path} is not loaded: it {problem}. Remove it, or: {REMEDY}")
        content = file.read()
    body, seal = content[:-_SEAL_BYTES], content[-_SEAL_BYTES:]
    return seal == _MARK + hashlib.sha256(body).digest()


def seal(path: Path) -> None:
    """Appends a library's digest, which loaders ignore, and takes write permission from others."""
    digest = hashlib.sha256(path.read_bytes()).digest()
    with path.open("ab") as file:
        file.write(_MARK + digest)
    path.chmod(0o755)


def build_prefix(path: Path) -> str:
    """Prefix of the folders that a library is built in."""
    return path.stem + _LEFTOVER


def remove_leftovers(path: Path) -> None:
    """Removes what killed compiles of this library left; for the holder of its lock."""
    for folder in path.parent.glob(f"{build_prefix(path)}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _foreign(facts: os.stat_result, sticky: bool = False) -> str:
    """Why a file or folder may hold what others wrote; empty if it can't."""
    if facts.st_uid not in (0, os.geteuid()):
        return f"belongs to user {_user(facts.st_uid)}, not to {_user(os.geteuid())}"
    if sticky:
        return ""
    if facts.st_mode & stat.S_IWOTH:
        return f"can be written by everybody (mode {stat.S_IMODE(facts.st_mode):04o})"
    if facts.st_mode & stat.S_IWGRP and not _private(facts.st_gid):
        return f"can be written by group {facts.st_gid} (mode {stat.S_IMODE(facts.st_mode):04o})"
    return ""


def _private(gid: int) -> bool:
    """Whether a group has no other member: root's, or one's own as Debian and Fedora give to each user."""
    if gid == 0:
        return True
    me = _user(os.geteuid())
    try:
        group = grp.getgrgid(gid)
    except KeyError:
        return False
    return group.gr_name == me and set(group.gr_mem) <= {me}


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
