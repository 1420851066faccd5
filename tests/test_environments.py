"""Containers and odd accounts: no home, no name, a strict umask, a cache folder shared by commands at once."""

import os
import pwd
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_library import tiny_library

from topt_vllm import envs
from topt_vllm.attention.cpu import jit, kernel_cache

pytestmark = pytest.mark.slow


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whom nobody knows, as containers run them."""
    for name in ("HOME", "XDG_CACHE_HOME", "TOPT_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)

    def unknown(_: int) -> None:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("no_home")
def test_without_a_home_kernels_are_kept_in_a_folder_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert envs.cache_dir() == tmp_path / f"topt_vllm-{os.getuid()}"
    jit.load(tiny_library(tmp_path / "csrc"))
    assert envs.cache_dir().stat().st_mode & 0o777 == 0o700
    envs.cache_dir().chmod(0o777)
    with pytest.raises(kernel_cache.CacheError, match=r"can be written by everybody.*Set TOPT_CACHE_DIR"):
        kernel_cache.check_folder(envs.cache_dir())


def test_a_cache_folder_of_nobody_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOPT_CACHE_DIR", "~no-such-user/cache")
    with pytest.raises(
        RuntimeError, match=r"TOPT_CACHE_DIR is '~no-such-user/cache': .*Write the whole path"
    ):
        envs.cache_dir()


def test_a_home_that_cannot_be_written_names_the_variable_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "home").write_text("no folder, so that root can't write there either")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("XDG_CACHE_HOME", "TOPT_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match=r"can't be compiled into .*Set TOPT_CACHE_DIR"):
        jit.load(tiny_library(tmp_path / "csrc"))


_LOAD = """
import sys
from pathlib import Path
from tiny_library import tiny_library
from topt_vllm.attention.cpu import jit
print(jit.load(tiny_library(Path(sys.argv[1]))).stat().st_mode & 0o777)
"""


def test_two_commands_share_a_cache_folder_under_any_umask(tmp_path: Path):
    """Both compile at once, or one waits; the path has spaces and letters of other scripts."""
    environment = os.environ | {
        "TOPT_CACHE_DIR": str(tmp_path / "cäche 温"),
        "PYTHONPATH": str(Path(__file__).with_name("support")),
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _LOAD, str(tmp_path / f"csrc {number}")],
            env=environment,
            umask=0o077,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    assert [process.communicate(timeout=120)[0] for process in running] == ["493\n"] * 2
    assert len(list((tmp_path / "cäche 温").rglob("*.so"))) == 1


@pytest.mark.parametrize(
    ("additional", "warned"),
    [({"toptheta": {"budget": 64}}, 1), ({"other": {}}, 0), ({}, 0), (object(), 0)],
    ids=["settings", "another plugin's", "none", "a class of another plugin"],
)
def test_settings_without_the_backend_are_warned_of(
    additional: object, warned: int, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("vllm")
    pytest.importorskip("vllm.platforms").current_platform.is_cpu() or pytest.skip("a CPU's platform")
    from topt_vllm.backend import unused_settings
    from topt_vllm.backend.hosts import cpu_platform

    said: list[str] = []
    monkeypatch.setattr(unused_settings.logger, "warning", said.append)
    monkeypatch.setattr(cpu_platform.TopThetaCpuPlatform.__base__, "check_and_update_config", lambda _: None)
    unused_settings.warn_of_unused_settings.cache_clear()
    attention = SimpleNamespace(backend=None, backend_per_kind=None)
    config = SimpleNamespace(model_config=object(), attention_config=attention, additional_config=additional)
    for _ in range(2):
        cpu_platform.TopThetaCpuPlatform.check_and_update_config(config)
    assert len(said) == warned
    assert all("Add --attention-backend TOPTHETA" in line for line in said)


@pytest.mark.parametrize(
    ("command", "warned"),
    [
        ("""serve MODEL --additional-config {"toptheta":{"budget":64}}""", 1),
        ("""serve MODEL --additional-config={"toptheta":{}} --attention-backend FLASH_ATTN""", 1),
        ("""serve MODEL --additional-config {"toptheta":{}} --attention-backend TOPTHETA""", 0),
        ("""serve MODEL --additional-config {"toptheta":{}} --config FILE""", 0),
        ("""serve MODEL --additional-config {"other":{}}""", 0),
        ("serve toptheta", 0),
    ],
)
def test_where_the_platform_is_not_ours_the_command_line_is_read(
    command: str, warned: int, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("vllm")
    from topt_vllm import plugin
    from topt_vllm.backend import compat, unused_settings

    said: list[str] = []
    monkeypatch.setattr(unused_settings.logger, "warning", said.append)
    monkeypatch.setattr(compat, "cpu_platform_in_force", lambda: None)
    monkeypatch.setattr("sys.argv", ["vllm", *command.split(" ")])
    unused_settings.warn_of_unused_settings.cache_clear()
    for _ in range(2):
        plugin.register()
    assert len(said) == warned
