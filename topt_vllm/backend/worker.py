"""vLLM's CPU worker, which also tells TOPTHETA whose rows a step has; chosen for ``policy: sift`` only."""

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from topt_vllm.backend import requests


class TopThetaWorker(CPUWorker):
    """The same worker."""

    def init_device(self) -> None:
        super().init_device()
        requests.follow(self.model_runner)

    def execute_model(self, scheduler_output: Any) -> Any:
        requests.ended(scheduler_output.finished_req_ids)
        return super().execute_model(scheduler_output)
