"""How an engine is made to decode the tokens of a text, whatever its model would say.

vLLM's two model runners (0.31 to 0.33) have a way each and refuse the other's: V2 replays tokens that come with a
request, V1 lets a logits processor choose them. Both return the model's own log-probabilities of those tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from topt_vllm.backend import compat


@dataclass(frozen=True)
class Forcing:
    """One of the ways.

    Attributes:
        engine: Arguments of ``vllm.LLM`` that allow it.
        sampling: From the tokens that a request is to decode to arguments of its ``vllm.SamplingParams``.
    """

    engine: Mapping[str, Any]
    sampling: Callable[[list[int]], dict[str, Any]]


REPLAY = Forcing({"enable_trace_replay": True}, lambda tokens: {"trace_decode_token_ids": tokens})
LOGITS_PROCESSOR = Forcing(
    {"logits_processors": ["topt_vllm.verify.forced_tokens:ForcedTokens"]},
    lambda tokens: {"extra_args": {"forced_tokens": tokens}},
)


def forcing_of(engine: Mapping[str, Any]) -> Forcing:
    """The way of the model runner that an engine with these arguments of ``vllm.LLM`` gets."""
    return REPLAY if compat.uses_v2_runner(engine) else LOGITS_PROCESSOR
