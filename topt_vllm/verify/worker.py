"""What runs inside the engine's worker: forcing the tokens of a text."""

from typing import Any

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class ForcedTokens(AdapterLogitsProcessor):
    """Makes a request decode ``forced_tokens`` of its ``extra_args``; log-probabilities stay the model's own."""

    def is_argmax_invariant(self) -> bool:
        """No: it decides which token is the most likely."""
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        """Forces the tokens of one request, None for a request without any."""
        tokens = (params.extra_args or {}).get("forced_tokens")
        if tokens is None:
            return None

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            logits.fill_(-torch.inf)
            logits[tokens[len(output_ids)]] = 0.0
            return logits

        return force
