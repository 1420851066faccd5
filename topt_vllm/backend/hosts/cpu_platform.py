"""vLLM's CPU platform, with TOPTHETA honoured.

The stock platform (0.32) ignores every backend name but its own and runs CPU_ATTN. When TOPTHETA is not chosen,
this class does what its base does.
"""

import logging
from functools import cache
from typing import TYPE_CHECKING, Any

from topt_vllm import large_pages, openmp
from topt_vllm.backend import compat, unused_settings

logger = logging.getLogger("vllm.topt_vllm")

_CpuPlatform: Any = compat.cpu_platform_class()

if TYPE_CHECKING:
    from vllm.config import VllmConfig


# Share of the cores.
_WORTH_A_NOTE = 0.1


@cache
def note_idle_cores(idle: tuple[int, int] | None) -> None:
    """Says in the log that cores are left idle, and of how many, where they are a good part of all.

    Once in a process, though vLLM makes several configurations.
    """
    if idle is not None and idle[0] >= _WORTH_A_NOTE * idle[1]:
        logger.info(
            "TOPTHETA: of %d cores vLLM leaves %d to its other processes; with VLLM_CPU_NUM_OF_RESERVED_CPU=0 in "
            "the environment all of them decode (docs/operations.md)",
            idle[1],
            idle[0],
        )


@cache
def note_small_pages() -> None:
    """Says in the log that the kernel gives no large pages; once in a process."""
    if not large_pages.given():
        logger.info(
            "TOPTHETA: this kernel gives no large pages, with which decoding is faster (docs/operations.md)"
        )


class TopThetaCpuPlatform(_CpuPlatform):
    """The CPU platform in force (plain or Zen) plus TOPTHETA."""

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Also checks the plugin's settings, so that a mistake stops the front end before anything is loaded.

        Workers, which start later, get large pages, and threads that soon sleep.
        """
        super().check_and_update_config(vllm_config)
        if vllm_config.model_config is not None and compat.is_chosen(vllm_config):
            from topt_vllm.backend.startup import resolve

            resolved = resolve(vllm_config)
            if resolved.config.sift is not None or resolved.drafts:
                compat.name_requests(vllm_config)
            note_idle_cores(compat.cores_left_idle(vllm_config))
            large_pages.ask()
            note_small_pages()
            openmp.wait_briefly()
        elif isinstance(others := vllm_config.additional_config, dict) and "toptheta" in others:
            unused_settings.warn_of_unused_settings()

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        """Returns TOPTHETA's class path when it is chosen and can serve the layer.

        Encoder layers keep no cache to skip in and stay with vLLM's backend.

        Raises:
            ValueError: TOPTHETA can't serve such a layer; the message has every reason.
        """
        if getattr(selected_backend, "name", None) != compat.BACKEND_NAME:
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        if attn_selector_config.attn_type in ("encoder", "encoder_only"):
            return super().get_attn_backend_cls(None, attn_selector_config, num_heads)
        from topt_vllm.backend.hosts.cpu import CpuTopThetaBackend

        reasons = CpuTopThetaBackend.validate_configuration(
            **attn_selector_config._asdict(), device_capability=None
        )
        if reasons:
            raise ValueError(
                f"TOPTHETA can't serve this model here: {'; '.join(reasons)}. "
                f"Use another --attention-backend, or change the option. ({attn_selector_config})"
            )
        return compat.BACKEND_PATH
