"""vLLM's CPU worker, which also tells TOPTHETA whose rows a step has; chosen for ``policy: sift`` and
drafts only."""

from vllm.v1.worker.cpu_worker import CPUWorker

from topt_vllm.backend.worker import NamesRequests


class TopThetaWorker(NamesRequests, CPUWorker):
    """The same worker."""
