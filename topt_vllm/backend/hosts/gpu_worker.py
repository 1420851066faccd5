"""vLLM's GPU worker, which also tells TOPTHETA whose rows a step has; users name it for ``policy: sift``."""

from vllm.v1.worker.gpu_worker import Worker

from topt_vllm.backend.worker import NamesRequests


class TopThetaWorker(NamesRequests, Worker):
    """The same worker."""
