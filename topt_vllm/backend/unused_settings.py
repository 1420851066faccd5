"""Settings of the plugin without the backend that reads them."""

import logging
from collections.abc import Sequence
from functools import cache

logger = logging.getLogger("vllm.topt_vllm")


@cache
def warn_of_unused_settings() -> None:
    """Says in the log that TOPTHETA's settings have no effect; once in a process."""
    logger.warning(
        'TOPTHETA: --additional-config has settings of "toptheta", but another attention backend runs, and they '
        "have no effect. Add --attention-backend TOPTHETA, or remove them."
    )


def in_command(arguments: Sequence[str]) -> bool:
    """Whether a command of vLLM has settings of ours and names no TOPTHETA; not where a file may name it."""
    others = [argument for argument in arguments if '"toptheta"' not in argument]
    rest = " ".join(others)
    return len(others) < len(arguments) and "TOPTHETA" not in rest.upper() and "--config" not in rest
