"""What runs inside an engine's worker to read TOPTHETA's counters."""

import sys


class WorkerCounters:
    """Mixed into vLLM's worker (``worker_extension_cls``)."""

    def toptheta_totals(self) -> dict[str, float] | None:
        """The process's counters; None where nothing of TOPTHETA ran."""
        module = sys.modules.get("topt_vllm.backend.metrics")
        return module.recorder().totals() if module else None
