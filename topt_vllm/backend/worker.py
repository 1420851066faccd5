"""What TOPTHETA's workers add to vLLM's: they know requests by name; for ``policy: sift``, and drafts."""

from typing import Any

from topt_vllm.backend import requests

# A worker of vLLM, when this is mixed into one.
_Platform: Any = object


class NamesRequests(_Platform):
    """Mixed into a worker of vLLM, which stays as it is."""

    def init_device(self) -> None:
        super().init_device()
        requests.follow(self.model_runner)

    def execute_model(self, scheduler_output: Any) -> Any:
        requests.ended(scheduler_output.finished_req_ids)
        return super().execute_model(scheduler_output)
