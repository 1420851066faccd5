"""Compiles a C++ operator library on first use and keeps it in the user's cache folder.

The file's name carries a key over everything that its content depends on, so a stale library is never loaded and
two versions live side by side. ``kernel_cache.py`` says which files are trusted. Nothing here runs at import.
"""

import errno
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from topt_vllm import envs
from topt_vllm.attention.cpu import kernel_cache

_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512cd")
CAPABILITIES = ("auto", "amx", "avx512", "avx2", "default")
_REMEDY = (
    "The CPU kernel needs a C++20 compiler (g++ 11 or newer; Debian and Ubuntu: apt install g++). "
    'Name one with CXX, or set the implementation to "reference", which is slow.'
)
# What failed to build or to load in this process, by path. Every layer and every step asks again, and what
# failed would only fail again, slowly; a new process tries once more.
_failures: dict[Path, str] = {}


def capability() -> str:
    """Instructions to build for: ``TOPT_CPU_CAPABILITY``, or what torch uses in this process, and AMX where it can.

    Raises:
        ValueError: Not a known capability, or one that this CPU lacks.
    """
    wanted = envs.get("TOPT_CPU_CAPABILITY").lower()
    # torch's own choice honours ATEN_CPU_CAPABILITY, so auto does too.
    found = torch.backends.cpu.get_cpu_capability().lower()
    best = found if found in ("avx512", "avx2") else "default"
    if best == "avx512" and _has_amx():
        best = "amx"
    if wanted not in CAPABILITIES:
        raise ValueError(f"TOPT_CPU_CAPABILITY is {wanted!r}; allowed: {', '.join(CAPABILITIES)}")
    if wanted == "auto":
        return best
    if CAPABILITIES.index(wanted) < CAPABILITIES.index(best):
        raise ValueError(f"TOPT_CPU_CAPABILITY is {wanted!r}, but torch offers {best!r} here; unset it")
    return wanted


def _has_amx() -> bool:
    # Asks Linux for the registers' memory too, once for a process; where it doesn't give it, they trap.
    return bool(_known().get("amx_bf16")) and torch.cpu._init_amx()


def _known() -> dict[str, bool]:
    """What this CPU has; nothing where torch is too old to say."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def capability_flags(name: str) -> tuple[str, ...]:
    """Compiler flags of a capability; named features instead of -march=native, for a cache may be shared."""
    if name == "amx":
        return (*capability_flags("avx512"), "-mamx-tile", "-mamx-bf16")
    select = (f"-DCPU_CAPABILITY={name.upper()}", f"-DCPU_CAPABILITY_{name.upper()}")
    if name == "avx512":
        bf16 = ("-mavx512bf16",) if torch.cpu._is_avx512_bf16_supported() else ()
        # Products of bytes in one instruction; every CPU with BF16 has them, and older ones may.
        vnni = ("-mavx512vnni",) if bf16 or _known().get("avx512_vnni") else ()
        # Byte lookups in registers, or shifts.
        vbmi = ("-mavx512vbmi",) if _known().get("avx512_vbmi") else ()
        return (*select, *_AVX512, *bf16, *vnni, *vbmi)
    return (*select, *_AVX2) if name == "avx2" else select


def find_compiler() -> tuple[str, ...]:
    """Path and arguments of $CXX or g++. Not clang++: its OpenMP needs a runtime that torch doesn't bring.

    Raises:
        RuntimeError: None is installed; the message has the remedy.
    """
    wanted = os.environ.get("CXX") or "g++"
    try:
        # A path may have spaces.
        name, *arguments = [wanted] if shutil.which(wanted) else shlex.split(wanted)
    except ValueError:  # nothing but spaces, or an open quote
        name, arguments = wanted, []
    path = shutil.which(name)
    if path is None:
        raise RuntimeError(f"no C++ compiler found ({wanted}). {_REMEDY}")
    return path, *arguments


@cache
def compiler_version(compiler: tuple[str, ...]) -> str:
    """First line of ``compiler --version``.

    Raises:
        RuntimeError: It can't be started; the message has the remedy.
    """
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"{compiler[0]} can't be started: {error}. {_REMEDY}") from error
    return done.stdout.partition("\n")[0]


@dataclass(frozen=True)
class Library:
    """What to build. Every field takes part in the key.

    Attributes:
        name: Prefix of the file and of the operator namespace.
        folder: Holds sources and headers.
        sources: Translation units in ``folder``, compiled side by side.
        flags: Compiler flags.
        versions: Whatever else the binary depends on, such as torch's version.
    """

    name: str
    folder: Path
    sources: tuple[str, ...]
    flags: tuple[str, ...]
    versions: tuple[str, ...]

    @property
    def key(self) -> str:
        """Digest over sources, headers, flags and versions."""
        digest = hashlib.sha256(repr((self.name, self.sources, self.flags, self.versions)).encode())
        for path in sorted(self.folder.iterdir()):
            if path.suffix in (".h", ".cpp"):
                digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        return digest.hexdigest()[:16]

    @property
    def namespace(self) -> str:
        """Operator namespace of this build, so that two builds don't collide in one process."""
        return f"{self.name}_{self.key}"

    @property
    def path(self) -> Path:
        """Where the library lies once built."""
        # Without symbolic links: what is checked is what is loaded.
        return envs.cache_dir().resolve() / "kernels" / f"{self.namespace}.so"


def torch_library(name: str, folder: Path, sources: tuple[str, ...]) -> Library:
    """A library of torch operators for this process's torch, CPU and compiler."""
    flags = (
        "-std=c++20",
        "-O3",
        "-fPIC",
        "-fopenmp",
        "-ffp-contract=off",
        *capability_flags(capability()),
    )
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    versions = (torch.__version__, platform.machine(), compiler_version(find_compiler()))
    return Library(name, folder, sources, (*flags, abi), versions)


def load(library: Library) -> Path:
    """Loads the library into torch.ops, building it first if it is missing or damaged.

    Of processes that start at once, one builds and the others wait for it. A killed one leaves its lock open.

    Raises:
        CacheError: The cache folder isn't to be trusted, or a library is missing there and it can't be written.
        RuntimeError: No compiler, or it failed, now or earlier in this process; the message has its output and the
            remedy.
    """
    path = library.path
    try:
        if _try_load(path):
            return path
        if path in _failures:
            raise RuntimeError(_failures[path])
        kernel_cache.create_folder(path.parent)
        with FileLock(f"{path}.lock"):
            # Another process may have built it while this one waited.
            if not _try_load(path):
                kernel_cache.remove_leftovers(path)
                _build_and_load(library, path)
    except OSError as error:
        raise kernel_cache.unwritable(path.parent, error) from error
    return path


def _try_load(path: Path) -> bool:
    if not path.parent.exists():
        return False
    kernel_cache.check_folder(path.parent)
    if not kernel_cache.is_sound(path):
        return False
    try:
        torch.ops.load_library(str(path))
    except OSError:
        # Whole, but not for this system, such as another C++ runtime: the caller builds it again.
        return False
    return True


def _build_and_load(library: Library, path: Path) -> None:
    try:
        build(library, path)
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            loading = f"the CPU kernel was compiled, but {path} can't be loaded: {error.__cause__ or error}"
            raise RuntimeError(f"{loading}\n{_REMEDY}") from error
    except RuntimeError as error:
        _failures[path] = str(error)
        raise


def build(library: Library, path: Path) -> None:
    """Compiles and links into a temporary folder, then renames, so that no half-written library is ever seen."""
    compiler = find_compiler()
    root = Path(torch.__file__).parent
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=kernel_cache.build_prefix(path)) as folder:
        commands = []
        for source in library.sources:
            target = str(Path(folder) / f"{source}.o")
            define = f"-DTOPT_LIBRARY={library.namespace}"
            unit = str(library.folder / source)
            commands.append([*compiler, *library.flags, define, *includes, "-c", unit, "-o", target])
        _run_all(commands, folder)
        # No -fopenmp here: GOMP's symbols must come from the runtime that libtorch_cpu already loaded. Naming
        # libgomp would bring the system's copy, and a second thread pool, where torch bundles its own.
        objects = [command[-1] for command in commands]
        sanitizers = [flag for flag in library.flags if flag.startswith("-fsanitize")]
        linked = str(Path(folder) / "library.so")
        libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
        _run_all([[*compiler, "-shared", *sanitizers, *objects, "-o", linked, *libraries]], folder)
        kernel_cache.seal(Path(linked))
        os.replace(linked, path)


def _run_all(commands: list[list[str]], folder: str) -> None:
    """Runs compilers side by side, with their temporary files in ``folder`` and their messages in English."""
    environment = os.environ | {"TMPDIR": folder, "LC_ALL": "C"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    try:
        running = [subprocess.Popen(command, env=environment, **pipes) for command in commands]
    except OSError as error:
        raise RuntimeError(f"{commands[0][0]} can't be started: {error}. {_REMEDY}") from error
    outputs = [process.communicate()[0] for process in running]
    for command, process, output in zip(commands, running, outputs, strict=True):
        if process.returncode:
            remedy = kernel_cache.REMEDY if os.strerror(errno.ENOSPC) in output else _REMEDY
            raise RuntimeError(f"compiling the CPU kernel failed.\n{' '.join(command)}\n{output}\n{remedy}")
