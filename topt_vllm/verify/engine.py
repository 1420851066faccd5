"""What an engine is asked for a verification."""

from dataclasses import asdict, dataclass
from typing import Any

from topt_vllm.engines.process import ask


@dataclass(frozen=True)
class Forced:
    """A text whose end is decoded token by token, whatever the model would say.

    Attributes:
        tokens: The whole text.
        first: The first token that is decoded; those before it are prefilled.
        rows: Tokens that one request decodes; several requests, which share a batch, decode what is left.
    """

    tokens: list[int]
    first: int
    rows: int


@dataclass(frozen=True)
class Request:
    """What an engine is to do.

    Attributes:
        engine: Arguments of ``vllm.LLM``.
        prompts: Token ids of each prompt, answered greedily in one batch.
        max_tokens: Of each answer.
        forced: A text to decode; needs ``logprobs_mode: raw_logprobs``, as ``prompts`` needs ``raw_logits``.
        separate_core: Whether the engine's core is a process of its own, as under ``vllm serve``; it is slower to
            start.
    """

    engine: dict[str, Any]
    prompts: list[list[int]]
    max_tokens: int = 0
    forced: Forced | None = None
    separate_core: bool = True


def run(request: Request, timeout: float) -> dict[str, Any]:
    """Runs an engine; see ``engine_main.py`` for the result.

    Args:
        request: What it is to do.
        timeout: After which it is killed (seconds).

    Raises:
        EngineError: It failed or took too long.
    """
    return ask(["-m", "topt_vllm.verify.engine_main"], asdict(request), request.separate_core, timeout)
