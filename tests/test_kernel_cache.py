"""Faults of the kernel cache: starts at once, killed compiles, read-only, full, damaged and foreign folders."""

import ctypes
import errno
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_library import tiny_library

from topt_vllm.attention.cpu import jit, kernel_cache
from topt_vllm.attention.cpu.kernel_cache import CacheError

STRANGER = 54321
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2
LOAD = """
import sys
from pathlib import Path
from topt_vllm.attention.cpu import jit
library = jit.Library("tiny", Path(sys.argv[1]), ("tiny.cpp",), ("-O0", "-fPIC"), ("1.0",))
try:
    print("loaded", jit.load(library))
except RuntimeError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> jit.Library:
    """A library without torch headers, in its own cache folder."""
    monkeypatch.setenv("TOPT_CACHE_DIR", str(tmp_path / "cache"))
    return tiny_library(tmp_path / "csrc")


@pytest.fixture
def built(tiny: jit.Library, monkeypatch: pytest.MonkeyPatch) -> jit.Library:
    """The same library, in the cache; loading it from there fails the test."""
    jit.load(tiny)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail(f"loaded {path}"))
    return tiny


def start(library: jit.Library, **options: Any) -> subprocess.Popen[str]:
    """A process that loads the library and prints how that ended."""
    command = [sys.executable, "-c", LOAD, str(library.folder)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )


def compiler(folder: Path, script: str) -> str:
    """A compiler that first does something else."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the file or folder belong to another user than this process."""
    if os.geteuid() == 0:
        os.chown(path, STRANGER, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: STRANGER)


@pytest.mark.slow
def test_two_processes_at_once_compile_once(tiny: jit.Library, tmp_path: Path) -> None:
    log = tmp_path / "log"
    slow = compiler(tmp_path, f'case "$*" in *" -c "*) echo compile >>{log}; sleep 2;; esac\nexec g++ "$@"')
    environment = os.environ | {"CXX": slow}
    processes = [start(tiny, env=environment) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert all(output.startswith("loaded ") for output in outputs), outputs
    assert log.read_text().split() == ["compile"]


@pytest.mark.slow
def test_killed_compile_leaves_nothing_in_the_way(tiny: jit.Library, tmp_path: Path) -> None:
    started = tmp_path / "started"
    stuck = compiler(
        tmp_path, f'case "$*" in *" -c "*) touch {started}; exec sleep 600;; esac\nexec g++ "$@"'
    )
    process = start(tiny, env=os.environ | {"CXX": stuck})
    try:
        while not started.exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        process.kill()
        process.wait()
        # Its compiler may go on for a while, as here.
        folder = tiny.path.parent
        assert [path.name for path in folder.iterdir() if path.is_dir()] != []
        assert jit.load(tiny).exists()
        assert [path.name for path in folder.iterdir() if path.is_dir()] == []
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def obey_modes() -> None:
    """Runs in a child before it becomes Python: takes root's right to read and write where the mode forbids it."""
    for right in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH) if os.geteuid() == 0 else ():
        if ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, right, 0, 0, 0) != 0:
            os._exit(77)


def load_where_modes_count(library: jit.Library) -> str:
    process = start(library, preexec_fn=obey_modes)
    output = process.communicate()[0]
    if process.returncode == 77:
        pytest.skip("root may write to read-only folders here and can't give that right up")
    return output


@pytest.mark.slow
def test_read_only_folder_names_the_remedy(tiny: jit.Library) -> None:
    kernel_cache.create_folder(tiny.path.parent)
    tiny.path.parent.chmod(0o500)
    output = load_where_modes_count(tiny)
    assert output.startswith(f"CacheError the CPU kernel can't be compiled into {tiny.path.parent}: ")
    assert "Permission denied" in output
    assert kernel_cache.REMEDY in output


@pytest.mark.slow
def test_folder_that_may_not_be_searched_names_the_remedy(tiny: jit.Library) -> None:
    """Such as root's home in a container that runs as another user."""
    jit.load(tiny)
    tiny.path.parent.parent.chmod(0o600)
    try:
        output = load_where_modes_count(tiny)
    finally:
        tiny.path.parent.parent.chmod(0o700)
    assert output.startswith(f"CacheError the CPU kernel can't be compiled into {tiny.path.parent}: ")
    assert kernel_cache.REMEDY in output


def test_other_users_may_load_what_this_one_has_built(tiny: jit.Library) -> None:
    kernel_cache.create_folder(tiny.path.parent)
    assert stat.S_IMODE(tiny.path.parent.stat().st_mode) == 0o755


def test_compiler_may_have_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env LANG=C 'g++'")
    assert jit.find_compiler()[1:] == ("LANG=C", "g++")
    assert jit.compiler_version(jit.find_compiler()).startswith("g++")


def test_compiler_s_path_may_have_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a folder").mkdir()
    path = compiler(tmp_path / "a folder", 'exec g++ "$@"')
    monkeypatch.setenv("CXX", path)
    assert jit.find_compiler() == (path,)


@pytest.mark.parametrize("wanted", [" ", "g++ 'open"])
def test_compiler_that_is_no_command_names_the_remedy(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", wanted)
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler found"):
        jit.find_compiler()


@pytest.mark.slow
def test_read_only_folder_with_the_kernel_is_enough(tiny: jit.Library) -> None:
    jit.load(tiny)
    tiny.path.parent.chmod(0o500)
    assert load_where_modes_count(tiny) == f"loaded {tiny.path}\n"


def test_full_folder_names_the_remedy(
    tiny: jit.Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler finds no space; then, in another cache, not even a folder to compile in can be made."""
    monkeypatch.setenv("CXX", compiler(tmp_path, "echo 'as: x.o: No space left on device'; exit 1"))
    with pytest.raises(RuntimeError, match=r"(?s)No space left.*TOPT_CACHE_DIR"):
        jit.load(tiny)
    assert not tiny.path.exists()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("TOPT_CACHE_DIR", str(tmp_path / "other"))
    monkeypatch.delenv("CXX")
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryDirectory", full)
        with pytest.raises(CacheError, match=r"No space left.*TOPT_CACHE_DIR"):
            jit.load(tiny)
    assert jit.load(tiny).exists()


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [flip, lambda content: content[: len(content) // 2], lambda content: b"", lambda content: content + b"x"],
    ids=["one bit", "torn", "empty", "longer"],
)
def test_damaged_library_is_never_mapped_but_built_again(
    tiny: jit.Library, damage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jit.load(tiny)
    damaged = damage(path.read_bytes())
    path.unlink()  # this process has mapped the old file: written over, it would crash at exit
    path.write_bytes(damaged)
    loaded = []
    monkeypatch.setattr(
        torch.ops, "load_library", lambda path: loaded.append(kernel_cache.is_sound(Path(path)))
    )
    jit.load(tiny)
    assert loaded == [True]


def test_library_of_another_system_is_built_again(tiny: jit.Library) -> None:
    """Whole, by its digest, but the loader refuses it."""
    kernel_cache.create_folder(tiny.path.parent)
    tiny.path.write_bytes(b"\x7fELF of another machine")
    kernel_cache.seal(tiny.path)
    jit.load(tiny)
    assert b"another machine" not in tiny.path.read_bytes()


@pytest.mark.parametrize("part", ["library", "folder", "parent"])
@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_what_others_can_write_is_not_loaded(
    built: jit.Library, part: str, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = {"library": built.path, "folder": built.path.parent, "parent": built.path.parent.parent}[part]
    monkeypatch.setattr(kernel_cache, "_private", lambda gid: False)
    path.chmod(mode)
    who = "everybody" if mode == 0o777 else "group"
    with pytest.raises(CacheError, match=rf"{path}.* can be written by {who} .*TOPT_CACHE_DIR"):
        jit.load(built)


@pytest.mark.parametrize("part", ["library", "folder", "parent"])
def test_what_belongs_to_another_user_is_not_loaded(
    built: jit.Library, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = {"library": built.path, "folder": built.path.parent, "parent": built.path.parent.parent}[part]
    give_away(path, monkeypatch)
    with pytest.raises(CacheError, match=r"belongs to user .*TOPT_CACHE_DIR"):
        jit.load(built)


def test_nothing_is_compiled_into_a_folder_of_others(tiny: jit.Library) -> None:
    tiny.path.parent.mkdir(parents=True)
    tiny.path.parent.chmod(0o777)
    with pytest.raises(CacheError, match="can be written by everybody"):
        jit.load(tiny)
    assert list(tiny.path.parent.iterdir()) == []


def test_symbolic_link_is_no_library(built: jit.Library, tmp_path: Path) -> None:
    built.path.rename(tmp_path / "elsewhere.so")
    built.path.symlink_to(tmp_path / "elsewhere.so")
    with pytest.raises(CacheError, match="can't be read"):
        jit.load(built)


def test_linked_cache_is_judged_where_it_leads(
    built: jit.Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    monkeypatch.setenv("TOPT_CACHE_DIR", str(tmp_path / "link"))
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(CacheError, match=rf"{tmp_path}/cache can be written by everybody"):
        jit.load(built)


def test_open_umask_makes_no_open_cache(tiny: jit.Library) -> None:
    before = os.umask(0)
    try:
        jit.load(tiny)
    finally:
        os.umask(before)
    for path in (tiny.path, tiny.path.parent, tiny.path.parent.parent):
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH), path


def test_group_without_other_members_is_private(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = {
        100: ("me", []),
        101: ("me", ["me"]),
        102: ("me", ["you"]),
        103: ("users", []),
    }
    monkeypatch.setattr(kernel_cache, "_user", lambda uid: "me")

    def known(gid: int) -> Any:
        name, members = groups[gid]
        return kernel_cache.grp.struct_group((name, "x", gid, members))

    monkeypatch.setattr(kernel_cache.grp, "getgrgid", known)
    assert [kernel_cache._private(gid) for gid in (0, 100, 101, 102, 103, 999)] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]
