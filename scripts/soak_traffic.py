"""Traffic of the soak test: prompts, requests of several kinds, and clients that send them until time is up."""

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx
from openai import AsyncOpenAI, OpenAIError

LENGTHS = (10, 40, 150, 500, 1200, 2500, 4500, 7000)
TOP_LOGPROBS = 5
# Share of each kind of request.
KINDS = {"answer": 0.35, "streamed answer": 0.35, "abort": 0.13, "samples": 0.05, "bad": 0.12}


@dataclass(frozen=True)
class Prompt:
    """A prompt and how long its answer is (tokens)."""

    ids: tuple[int, ...]
    max_tokens: int


@dataclass
class Answer:
    """What a server said.

    Attributes:
        tokens: ``token_id:N`` of each token.
        logprobs: Of each token.
        tops: The most likely tokens of each step and their log-probabilities.
        finish: Why it ended; None for an answer that was cut off.
    """

    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[dict[str, float]] = field(default_factory=list)
    finish: str | None = None

    def add(self, choice: Any) -> None:
        """Appends a choice of the completions API, whole or a chunk of it."""
        if choice.logprobs is not None and choice.logprobs.tokens:
            self.tokens += choice.logprobs.tokens
            self.logprobs += choice.logprobs.token_logprobs
            self.tops += choice.logprobs.top_logprobs
        self.finish = choice.finish_reason or self.finish


@dataclass
class Tally:
    """What the clients saw.

    Attributes:
        requests: Sent, by kind.
        answers: Complete answers to prompts, by the prompt's index.
        tokens: Received, of complete and aborted answers.
        faults: What should not have happened, and how often.
        seconds: Time that each request took, by kind.
    """

    requests: Counter[str] = field(default_factory=Counter)
    answers: list[tuple[int, Answer]] = field(default_factory=list)
    tokens: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)


def make_prompts(model: str, texts: Path, count: int, max_tokens: int) -> list[Prompt]:
    """Prompts of 10 to 7,000 tokens. Those of one text share its beginning, so prefill doesn't eat all the time."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    files = sorted(texts.glob("*.txt"))
    needed = -(-count // len(LENGTHS))
    if len(files) < needed:
        raise ValueError(f"{texts} has {len(files)} texts; {count} prompts need {needed}")
    prompts = []
    for path in files[:needed]:
        ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        for length in LENGTHS:
            # The last tokens come from elsewhere, so that no prompt is the beginning of another.
            tail = ids[-length:][:8]
            prompts.append(Prompt((*ids[: length - 8], *tail), max_tokens))
    return prompts[:count]


class Clients:
    """Clients of one server."""

    def __init__(self, url: str, model: str, prompts: Sequence[Prompt], max_model_len: int, timeout: float):
        self._url, self._model, self._prompts = url, model, prompts
        self._max_model_len, self._timeout = max_model_len, timeout
        self.tally = Tally()

    async def alone(self) -> list[Answer]:
        """Each prompt's answer with nothing beside it."""
        async with self._openai() as api:
            return [await self._complete(api, prompt, stream=False) for prompt in self._prompts]

    async def run(self, concurrency: int, until: float, seed: int) -> Tally:
        """Sends requests until the given time (``time.monotonic``) and waits for the last ones."""
        # Each request on a connection of its own: the server closes idle ones after seconds, and a request that is
        # sent at that moment fails through nobody's fault.
        connector = aiohttp.TCPConnector(force_close=True)
        async with self._openai() as api, aiohttp.ClientSession(connector=connector) as session:
            clients = (self._client(api, session, until, random.Random(seed + i)) for i in range(concurrency))
            await asyncio.gather(*clients)
        return self.tally

    def _openai(self) -> AsyncOpenAI:
        headers = {"Connection": "close"}
        return AsyncOpenAI(
            base_url=f"{self._url}/v1",
            api_key="none",
            timeout=None,
            max_retries=0,
            default_headers=headers,
        )

    async def _client(
        self, api: AsyncOpenAI, session: aiohttp.ClientSession, until: float, choice: random.Random
    ) -> None:
        while time.monotonic() < until:
            kind = choice.choices(list(KINDS), list(KINDS.values()))[0]
            self.tally.requests[kind] += 1
            started = time.monotonic()
            try:
                async with asyncio.timeout(self._timeout):
                    await self._send(kind, api, session, choice)
            except TimeoutError:
                self.tally.faults[f"{kind}: no end within {self._timeout:.0f} s"] += 1
            except (OpenAIError, httpx.HTTPError, aiohttp.ClientError, OSError) as error:
                self.tally.faults[f"{kind}: {type(error).__name__}: {str(error)[:120]}"] += 1
                # A server that is gone refuses at once; don't spin.
                await asyncio.sleep(1)
            took = time.monotonic() - started
            self.tally.seconds[kind] = max(took, self.tally.seconds.get(kind, 0.0))

    async def _send(
        self, kind: str, api: AsyncOpenAI, session: aiohttp.ClientSession, choice: random.Random
    ) -> None:
        index = choice.randrange(len(self._prompts))
        prompt = self._prompts[index]
        if kind == "bad":
            await self._bad(session, choice)
        elif kind == "abort":
            await self._abort(api, prompt, choice.randrange(0, prompt.max_tokens))
        elif kind == "samples":
            await self._samples(api, prompt)
        else:
            answer = await self._complete(api, prompt, stream=kind == "streamed answer")
            self.tally.tokens += len(answer.tokens)
            if answer.finish is None:
                self.tally.faults[f"{kind}: cut off after {len(answer.tokens)} tokens"] += 1
            else:
                self.tally.answers.append((index, answer))

    def _request(self, prompt: Prompt, **options: Any) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": list(prompt.ids),
            "max_tokens": prompt.max_tokens,
            "temperature": 0.0,
            "logprobs": TOP_LOGPROBS,
            "extra_body": {"return_tokens_as_token_ids": True},
        } | options

    async def _complete(self, api: AsyncOpenAI, prompt: Prompt, stream: bool) -> Answer:
        answer = Answer()
        if stream:
            async for chunk in await api.completions.create(**self._request(prompt), stream=True):
                for choice in chunk.choices:
                    answer.add(choice)
        else:
            reply = await api.completions.create(**self._request(prompt))
            for choice in reply.choices:
                answer.add(choice)
        return answer

    async def _abort(self, api: AsyncOpenAI, prompt: Prompt, tokens: int) -> None:
        """Hangs up after some tokens, before the first one too."""
        answer = Answer()
        stream = await api.completions.create(**self._request(prompt), stream=True)
        async with stream:
            if tokens:
                async for chunk in stream:
                    for choice in chunk.choices:
                        answer.add(choice)
                    if len(answer.tokens) >= tokens:
                        break
        self.tally.tokens += len(answer.tokens)

    async def _samples(self, api: AsyncOpenAI, prompt: Prompt) -> None:
        # Without a seed: one in a chunked prefill kills vLLM 0.32's worker on CPU, with its own backend too ("CPU
        # Generator does not use offset").
        reply = await api.completions.create(**self._request(prompt, temperature=0.8, n=3))
        for choice in reply.choices:
            self.tally.tokens += len(choice.logprobs.tokens)
            if not all(map(math.isfinite, choice.logprobs.token_logprobs)):
                self.tally.faults["samples: a log-probability isn't finite"] += 1

    async def _bad(self, session: aiohttp.ClientSession, choice: random.Random) -> None:
        """Sends what the server must refuse, and expects status 4xx with an error in JSON."""
        prompt = self._prompts[0]
        body = self._request(prompt)
        del body["extra_body"]
        changes: dict[str, dict[str, Any]] = {
            "wrong model": {"model": "no-such-model"},
            "negative max_tokens": {"max_tokens": -5},
            "prompt too long": {"prompt": [prompt.ids[0]] * (self._max_model_len + 1)},
            "temperature as text": {"temperature": "hot"},
            "empty": {"prompt": []},
        }
        texts = {"malformed JSON": '{"model": '} | {
            name: json.dumps(body | change) for name, change in changes.items()
        }
        name, text = choice.choice(list(texts.items()))
        headers = {"Content-Type": "application/json"}
        async with session.post(f"{self._url}/v1/completions", data=text, headers=headers) as reply:
            answer = await reply.text()
        if not (400 <= reply.status < 500 and "error" in answer):
            self.tally.faults[f"bad ({name}): status {reply.status}: {answer[:200]}"] += 1
