"""The JIT as a module of its own, on a tiny library that compiles in a moment or not at all."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_library import TINY, tiny_library

from topt_vllm.attention.cpu import jit


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> jit.Library:
    """A library without torch headers, in its own cache folder."""
    monkeypatch.setenv("TOPT_CACHE_DIR", str(tmp_path / "cache"))
    return tiny_library(tmp_path / "csrc")


def test_key_changes_with_everything_the_binary_depends_on(tiny: jit.Library) -> None:
    keys = {
        tiny.key,
        replace(tiny, name="other").key,
        replace(tiny, flags=("-O1", "-fPIC")).key,
        replace(tiny, versions=("1.1",)).key,
    }
    (tiny.folder / "tiny.h").write_text("// another header\n")
    keys.add(tiny.key)
    (tiny.folder / "tiny.cpp").write_text(TINY + "\n")
    keys.add(tiny.key)
    assert len(keys) == 6
    (tiny.folder / "notes.txt").write_text("not compiled")
    assert tiny.key in keys


def test_load_builds_once(tiny: jit.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jit.load(tiny)
    assert path == tiny.path
    monkeypatch.setattr(jit, "build", lambda *_: pytest.fail("built again"))
    assert jit.load(tiny) == path


def test_changed_source_is_built_beside_the_old_one(tiny: jit.Library) -> None:
    old = jit.load(tiny)
    (tiny.folder / "tiny.cpp").write_text(TINY.replace("42", "43"))
    new = jit.load(tiny)
    assert new != old
    assert old.exists()


def test_waiting_process_uses_what_the_other_built(
    tiny: jit.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = jit.load(tiny)
    answers = iter([False, True])
    monkeypatch.setattr(jit, "_try_load", lambda _: next(answers))
    monkeypatch.setattr(jit, "build", lambda *_: pytest.fail("built again"))
    assert jit.load(tiny) == ready


def test_failed_compile_shows_the_output_and_the_remedy(tiny: jit.Library) -> None:
    (tiny.folder / "tiny.cpp").write_text("int broken(\n")
    with pytest.raises(RuntimeError, match=r"(?s)tiny\.cpp.*error:.*C\+\+20 compiler"):
        jit.load(tiny)
    assert not tiny.path.exists()
    assert [entry.name for entry in tiny.path.parent.iterdir() if entry.is_dir()] == []


def test_a_compiler_that_is_no_program_is_said_to_be_none(tmp_path: Path):
    text = tmp_path / "compiler"
    text.write_text("nothing to run")
    text.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"compiler can't be started: .*C\+\+20 compiler"):
        jit.compiler_version((str(text),))


def test_failed_compile_is_not_tried_again_in_the_process(
    tiny: jit.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny.folder / "tiny.cpp").write_text("int broken(\n")
    with pytest.raises(RuntimeError, match="error:") as first:
        jit.load(tiny)
    monkeypatch.setattr(jit, "build", lambda *_: pytest.fail("built again"))
    with pytest.raises(RuntimeError) as second:
        jit.load(tiny)
    assert str(second.value) == str(first.value)


def test_library_that_cannot_be_loaded_is_not_built_again(
    tiny: jit.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny.folder / "tiny.cpp").write_text(TINY + 'extern "C" int missing();\nint called = missing();\n')
    with pytest.raises(RuntimeError, match=r"(?s)can't be loaded: .*C\+\+20 compiler"):
        jit.load(tiny)
    monkeypatch.setattr(jit, "build", lambda *_: pytest.fail("built again"))
    with pytest.raises(RuntimeError, match="can't be loaded"):
        jit.load(tiny)


def test_mended_source_is_built_after_a_failure(tiny: jit.Library) -> None:
    (tiny.folder / "tiny.cpp").write_text("int broken(\n")
    with pytest.raises(RuntimeError, match="error:"):
        jit.load(tiny)
    (tiny.folder / "tiny.cpp").write_text(TINY)
    assert jit.load(tiny).exists()


def test_missing_compiler_names_the_remedy(tiny: jit.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"no-such-compiler.*apt install g\+\+"):
        jit.load(tiny)


@pytest.mark.parametrize("value", ["sse9", "AVX1024"])
def test_unknown_capability_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPT_CPU_CAPABILITY", value)
    with pytest.raises(ValueError, match="allowed: auto, amx, avx512, avx2, default"):
        jit.capability()


def test_capability_beyond_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPT_CPU_CAPABILITY", "avx512")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with pytest.raises(ValueError, match="torch offers 'avx2'"):
        jit.capability()


@pytest.mark.parametrize(("allowed", "expected"), [(True, "amx"), (False, "avx512")])
def test_amx_is_taken_where_linux_allows_it(
    allowed: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOPT_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: allowed)
    assert jit.capability() == expected


@pytest.mark.parametrize(
    ("known", "bf16", "expected"),
    [({}, False, set()), ({"avx512_vnni": True}, False, {"vnni"}), ({}, True, {"bf16", "vnni"})],
)
def test_avx512_has_what_the_cpu_has_besides(
    known: dict[str, bool], bf16: bool, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    flags = jit.capability_flags("avx512")
    assert {name for name in ("bf16", "vnni", "vbmi") if f"-mavx512{name}" in flags} == expected


def test_capability_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TOPT_CPU_CAPABILITY", raising=False)
    keys = set()
    for found in ("AVX512", "AVX2", "DEFAULT"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda found=found: found)
        keys.add(jit.torch_library("any", tmp_path, ()).key)
    assert len(keys) == 3


IN_PROCESS = """
import subprocess, sys
import torch
real = subprocess.Popen.__init__
def refuse(*args, **kwargs):
    raise AssertionError("import started a process")
subprocess.Popen.__init__ = refuse
import topt_vllm.attention.api
import topt_vllm.attention.cpu.launcher as launcher
subprocess.Popen.__init__ = real
launcher.prepare()
torch.set_num_threads(2)
torch.rand(1000, 1000).sum()
before = len(__import__("os").listdir("/proc/self/task"))
sys.path.insert(0, sys.argv[1])
from attention_cases import random_case
random_case([(1, 3000)]).run("cpu")
after = len(__import__("os").listdir("/proc/self/task"))
runtimes = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libiomp" in line}
assert len(runtimes) == 1, runtimes
assert "torch" in runtimes.pop()
assert after == before, (before, after)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_import_starts_no_compiler_and_threads_are_torchs() -> None:
    """One OpenMP runtime, torch's, and no thread of our own."""
    support = str(Path(__file__).with_name("support"))
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    done = subprocess.run(
        [sys.executable, "-c", IN_PROCESS, support],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
