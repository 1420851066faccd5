"""What the Python that runs this lacks to run the tests on a GPU, in one line; scripts/test.sh asks.

Exit status 0: nothing. 1: vLLM or a GPU, so it isn't meant for that. 2: only packages that the tests need.
"""

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Modules, and what they are installed as.
TEST_PACKAGES = {"pytest": "pytest", "xdist": "pytest-xdist", "hypothesis": "hypothesis"}


def no_gpu() -> str | None:
    """Why this isn't an environment with vLLM and a GPU; None where it is."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set"
    for module in ("vllm", "torch"):
        if importlib.util.find_spec(module) is None:
            return f"{sys.executable} has no {module}"
    import torch

    return None if torch.cuda.is_available() else f"torch of {sys.executable} sees no GPU"


def missing() -> list[str]:
    """What pip is to install."""
    lacking = [name for module, name in TEST_PACKAGES.items() if importlib.util.find_spec(module) is None]
    # vLLM's engines find the plugin by its entry point.
    if not importlib.metadata.entry_points(group="vllm.general_plugins", name="toptheta"):
        lacking += ["--editable", str(ROOT)]
    return lacking


def main() -> int:
    """Prints what is lacking."""
    reason = no_gpu()
    if reason:
        print(reason)
        return 1
    lacking = missing()
    if lacking:
        print(f"{sys.executable} lacks packages; run: {sys.executable} -m pip install {' '.join(lacking)}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
