"""vLLM's entry points into topt_vllm. Loaded in every vLLM process, so both are lazy and idempotent."""


def register() -> None:
    """Entry point ``vllm.general_plugins``: makes TOPTHETA a name for ``--attention-backend``."""
    from topt_vllm.backend import compat

    compat.register_backend()


def cpu_platform() -> str | None:
    """Entry point ``vllm.platform_plugins``: on CPUs, a platform that honours TOPTHETA; None elsewhere."""
    from topt_vllm.backend import compat

    if compat.cpu_platform_in_force() is None:
        return None
    return "topt_vllm.backend.hosts.cpu_platform.TopThetaCpuPlatform"
