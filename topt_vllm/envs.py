"""Every environment variable that topt_vllm reads, in one table; read on access, never at import."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Variable:
    """One environment variable: its default, what it does and when to leave it alone."""

    default: str
    effect: str


VARIABLES = {
    "TOPT_THRESHOLDS": Variable(
        "",
        'Threshold table to use when the configuration names none: a path, or "none" for θ = −inf. Prefer '
        "toptheta.thresholds where the command line is yours.",
    ),
    "TOPT_CACHE_DIR": Variable(
        "~/.cache/topt_vllm",
        "Folder of compiled kernels and demo assets. XDG_CACHE_HOME is honoured when unset; "
        "without a home folder it is topt_vllm-UID in that of temporary files. Kernels are only "
        "loaded from a folder that no other user but root owns or can write to.",
    ),
    "TOPT_CPU_CAPABILITY": Variable(
        "auto",
        "Instructions of the CPU kernel: auto, amx, avx512, avx2 or default (the compiler's portable baseline). "
        "For tests and bug reports; auto is the fastest.",
    ),
}


def get(name: str) -> str:
    """Value of a variable in ``VARIABLES``, or its default."""
    return os.environ.get(name) or VARIABLES[name].default


def cache_dir() -> Path:
    """The user's cache folder; not created here."""
    base = os.environ.get("XDG_CACHE_HOME")
    if base and not os.environ.get("TOPT_CACHE_DIR"):
        return Path(base) / "topt_vllm"
    try:
        return Path(get("TOPT_CACHE_DIR")).expanduser()
    except RuntimeError:
        # A container's user may have no entry in passwd, and no HOME.
        return Path(tempfile.gettempdir()) / f"topt_vllm-{os.getuid()}"
