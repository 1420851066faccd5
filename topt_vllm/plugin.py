"""vLLM's entry points into topt_vllm. Loaded in every vLLM process, so both are lazy and idempotent."""

import sys


def register() -> None:
    """Entry point ``vllm.general_plugins``: makes TOPTHETA a name for ``--attention-backend``."""
    from topt_vllm.backend import compat, unused_settings

    compat.register_backend()
    # Where the platform isn't ours no configuration is seen unless TOPTHETA runs, and the command has to do.
    if unused_settings.in_command(sys.argv) and compat.cpu_platform_in_force() is None:
        unused_settings.warn_of_unused_settings()


def cpu_platform() -> str | None:
    """Entry point ``vllm.platform_plugins``: on CPUs, a platform that honours TOPTHETA; None elsewhere."""
    from topt_vllm.backend import compat

    if compat.cpu_platform_in_force() is None:
        return None
    return "topt_vllm.backend.hosts.cpu_platform.TopThetaCpuPlatform"
