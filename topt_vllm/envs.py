"""Every environment variable that topt_vllm reads, in one table; read on access, never at import."""

import os
import tempfile
from pathlib import Path

# Defaults; docs/configuration.md says what they do.
VARIABLES = {
    "TOPT_THRESHOLDS": "",
    "TOPT_CACHE_DIR": "~/.cache/topt_vllm",
    "TOPT_CPU_CAPABILITY": "auto",
}


def get(name: str) -> str:
    """Value of a variable in ``VARIABLES``, or its default."""
    return os.environ.get(name) or VARIABLES[name]


def cache_dir() -> Path:
    """The user's cache folder; not created here.

    Raises:
        RuntimeError: It is named by a user that there isn't.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    if base and not os.environ.get("TOPT_CACHE_DIR"):
        return Path(base) / "topt_vllm"
    try:
        return Path(get("TOPT_CACHE_DIR")).expanduser()
    except RuntimeError as error:
        if named := os.environ.get("TOPT_CACHE_DIR"):
            raise RuntimeError(f"TOPT_CACHE_DIR is {named!r}: {error} Write the whole path.") from error
        # A container's user may have no entry in passwd, and no HOME.
        return Path(tempfile.gettempdir()) / f"topt_vllm-{os.getuid()}"
