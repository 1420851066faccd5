"""What runs inside an engine's worker to read TOPTHETA's counters."""

import sys


class WorkerCounters:
    """Mixed into vLLM's worker (``worker_extension_cls``)."""

    def toptheta_totals(self) -> dict[str, float] | None:
        """The process's counters, up to the last step; None where nothing of TOPTHETA ran."""
        module = sys.modules.get("topt_vllm.backend.metrics")
        if module is None:
            return None
        recorder = module.recorder()
        recorder.settle()
        return recorder.totals()
