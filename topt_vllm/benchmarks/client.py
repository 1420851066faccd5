"""Concurrent long-prompt requests through the OpenAI API, and what their token times say."""

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import aiohttp

from topt_vllm.engines.process import EngineError


@dataclass(frozen=True)
class Stream:
    """One streamed answer.

    Attributes:
        start: When the request was sent (seconds, any origin).
        times: When each chunk arrived (seconds, the same origin).
        tokens: Completion tokens up to and with each chunk.
    """

    start: float
    times: list[float]
    tokens: list[int]


@dataclass(frozen=True)
class Measurement:
    """One round of concurrent requests.

    Attributes:
        decode_tokens_per_second: Of all requests together while every one of them decodes: from the last first
            token to the first last token. Prefill of one request is no decode time of another.
        itl_ms_median: Median time between two tokens of a request in that interval (ms).
        ttft_ms_median: Median time to first token (ms).
        tokens: Completion tokens of the interval.
        seconds: Its length.
    """

    decode_tokens_per_second: float
    itl_ms_median: float
    ttft_ms_median: float
    tokens: int
    seconds: float


def request_all(url: str, model: str, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Stream]:
    """Sends all prompts (token ids) at once and waits for ``max_tokens`` tokens of each.

    Raises:
        EngineError: The server refused, broke off or can't be reached.
    """
    return asyncio.run(_request_all(url, model, prompts, max_tokens))


def summarise(streams: Sequence[Stream]) -> Measurement:
    """Statistics over the interval in which every request decodes.

    Raises:
        ValueError: There is no such interval: the answers are too short for the prefill of the others.
    """
    begin = max(stream.times[0] for stream in streams)
    end = min(stream.times[-1] for stream in streams)
    if end <= begin:
        raise ValueError(
            "the first answer was complete before the last one began, so there is no time in which all requests "
            "decode; ask for more --max-tokens, fewer --prompt-tokens or less --concurrency"
        )
    tokens = 0
    gaps: list[float] = []
    for stream in streams:
        arrivals = list(zip(stream.times, stream.tokens, strict=True))
        for (earlier, before), (later, after) in pairwise(arrivals):
            if begin < later <= end:
                tokens += after - before
                gaps += [(later - earlier) / (after - before)] * (after - before)
    return Measurement(
        decode_tokens_per_second=tokens / (end - begin),
        itl_ms_median=1000 * statistics.median(gaps),
        ttft_ms_median=1000 * statistics.median(stream.times[0] - stream.start for stream in streams),
        tokens=tokens,
        seconds=end - begin,
    )


async def _request_all(
    url: str, model: str, prompts: Sequence[Sequence[int]], max_tokens: int
) -> list[Stream]:
    # No client library: it makes objects of every chunk, on cores that the server wants.
    try:
        async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=None)) as session:
            return await asyncio.gather(*(_request(session, model, prompt, max_tokens) for prompt in prompts))
    except aiohttp.ClientError as error:
        raise EngineError(f"the connection to the server broke: {error}") from error


async def _request(
    session: aiohttp.ClientSession, model: str, prompt: Sequence[int], max_tokens: int
) -> Stream:
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    start = time.perf_counter()
    times: list[float] = []
    tokens: list[int] = []
    async with session.post("/v1/completions", json=body) as answer:
        if not answer.ok:
            raise EngineError(f"the server answered {answer.status}: {await answer.text()}")
        async for line in answer.content:
            event = line.removeprefix(b"data: ").strip()
            if not line.startswith(b"data: ") or event == b"[DONE]":
                continue
            chunk = json.loads(event)
            if "error" in chunk:
                raise EngineError(f"the server broke off: {chunk['error']}")
            count = (chunk.get("usage") or {}).get("completion_tokens", 0)
            if count > (tokens[-1] if tokens else 0):
                times.append(time.perf_counter())
                tokens.append(count)
    if not tokens:
        raise EngineError("the server sent an empty answer")
    return Stream(start, times, tokens)
