"""Compiles a C++ operator library on first use and keeps it in the user's cache folder.

The file's name carries a key over everything that its content depends on, so a stale library is never loaded and
two versions live side by side. Nothing here runs at import.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

from topt_vllm import envs

_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512cd")
CAPABILITIES = ("auto", "avx512", "avx2", "default")
_REMEDY = (
    "The CPU kernel needs a C++20 compiler (g++ 11 or clang++ 14 and newer; Debian and Ubuntu: apt install g++). "
    'Name one with CXX, or set the implementation to "reference", which is slow.'
)
# What failed to build in this process, by path. Every layer and every step asks again, and a compiler that failed
# would only fail again, slowly; a new process tries once more.
_failures: dict[Path, str] = {}


def capability() -> str:
    """Vector instructions to build for: ``TOPT_CPU_CAPABILITY``, or what torch uses in this process.

    Raises:
        ValueError: Not a known capability, or one that this CPU lacks.
    """
    wanted = envs.get("TOPT_CPU_CAPABILITY").lower()
    # torch's own choice honours ATEN_CPU_CAPABILITY, so auto does too.
    found = torch.backends.cpu.get_cpu_capability().lower()
    best = found if found in ("avx512", "avx2") else "default"
    if wanted not in CAPABILITIES:
        raise ValueError(f"TOPT_CPU_CAPABILITY is {wanted!r}; allowed: {', '.join(CAPABILITIES)}")
    if wanted == "auto":
        return best
    if CAPABILITIES.index(wanted) < CAPABILITIES.index(best):
        raise ValueError(f"TOPT_CPU_CAPABILITY is {wanted!r}, but torch offers {best!r} here; unset it")
    return wanted


def capability_flags(name: str) -> tuple[str, ...]:
    """Compiler flags of a capability; named features instead of -march=native, for a cache may be shared."""
    select = (f"-DCPU_CAPABILITY={name.upper()}", f"-DCPU_CAPABILITY_{name.upper()}")
    if name == "avx512":
        # Every CPU with AVX512-BF16 has VNNI too.
        bf16 = ("-mavx512bf16", "-mavx512vnni") if torch.cpu._is_avx512_bf16_supported() else ()
        return (*select, *_AVX512, *bf16)
    return (*select, *_AVX2) if name == "avx2" else select


def find_compiler() -> str:
    """Path of $CXX, g++ or clang++.

    Raises:
        RuntimeError: None is installed; the message has the remedy.
    """
    named = os.environ.get("CXX")
    for candidate in (named,) if named else ("g++", "clang++"):
        path = shutil.which(candidate)
        if path:
            return path
    raise RuntimeError(f"no C++ compiler found ({named or 'g++, clang++'}). {_REMEDY}")


@cache
def compiler_version(compiler: str) -> str:
    """First line of ``compiler --version``."""
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
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
        return envs.cache_dir() / "kernels" / f"{self.namespace}.so"


def torch_library(name: str, folder: Path, sources: tuple[str, ...], extra: tuple[str, ...] = ()) -> Library:
    """A library of torch operators for this process's torch, CPU and compiler."""
    flags = (
        "-std=c++20",
        "-O3",
        "-fPIC",
        "-fopenmp",
        "-ffp-contract=off",
        *capability_flags(capability()),
        *extra,
    )
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    versions = (torch.__version__, platform.machine(), compiler_version(find_compiler()))
    return Library(name, folder, sources, (*flags, abi), versions)


def load(library: Library) -> Path:
    """Loads the library into torch.ops, building it first if it is missing or can't be loaded.

    Raises:
        RuntimeError: No compiler, or it failed, now or earlier in this process; the message has its output and the
            remedy.
    """
    path = library.path
    if _try_load(path):
        return path
    if path in _failures:
        raise RuntimeError(_failures[path])
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        # Another process may have built it while this one waited.
        if not _try_load(path):
            try:
                build(library, path)
            except RuntimeError as error:
                _failures[path] = str(error)
                raise
            torch.ops.load_library(str(path))
    return path


def _try_load(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        torch.ops.load_library(str(path))
    except OSError:
        # A damaged file: the caller builds it again.
        return False
    return True


def build(library: Library, path: Path) -> None:
    """Compiles and links into a temporary folder, then renames, so that no half-written library is ever seen."""
    compiler = find_compiler()
    root = Path(torch.__file__).parent
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        commands = []
        for source in library.sources:
            target = str(Path(folder) / f"{source}.o")
            define = f"-DTOPT_LIBRARY={library.namespace}"
            unit = str(library.folder / source)
            commands.append([compiler, *library.flags, define, *includes, "-c", unit, "-o", target])
        _run_all(commands)
        # No -fopenmp here: GOMP's symbols must come from the runtime that libtorch_cpu already loaded. Naming
        # libgomp would bring the system's copy, and a second thread pool, where torch bundles its own.
        objects = [command[-1] for command in commands]
        sanitizers = [flag for flag in library.flags if flag.startswith("-fsanitize")]
        linked = str(Path(folder) / "library.so")
        libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
        _run_all([[compiler, "-shared", *sanitizers, *objects, "-o", linked, *libraries]])
        os.replace(linked, path)


def _run_all(commands: list[list[str]]) -> None:
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    outputs = [process.communicate()[0] for process in running]
    for command, process, output in zip(commands, running, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"compiling the CPU kernel failed.\n{' '.join(command)}\n{output}\n{_REMEDY}")
