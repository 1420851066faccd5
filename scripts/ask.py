#!/usr/bin/env python3
"""Asks a running server one long-context question, and says what answering it cost."""

import argparse
import json
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI, OpenAIError
from prometheus_client.parser import text_string_to_metric_families

QUESTION = "Which two families are enemies in Romeo and Juliet?"
READ, TOTAL = "toptheta:v_rows_read_total", "toptheta:v_rows_total"
EXPORT_SECONDS = 10.0


@dataclass(frozen=True)
class Answer:
    """One streamed answer.

    Attributes:
        text: What the model said.
        prompt_tokens: Length of the prompt.
        tokens: Length of the answer.
        first: Seconds until the first token.
        decode: Seconds from the first token to the last.
    """

    text: str
    prompt_tokens: int
    tokens: int
    first: float
    decode: float

    @property
    def per_second(self) -> float:
        """Tokens per second of decoding."""
        return (self.tokens - 1) / self.decode if self.decode > 0 else 0.0


def served_model(client: OpenAI) -> str:
    """Name of the server's model.

    Raises:
        ValueError: It has none, or isn't vLLM.
    """
    try:
        return client.models.list().data[0].id
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError("its /v1/models lists no model; name vLLM's own address with --url") from error


def counters(root: str) -> dict[str, float]:
    """Sums of the plugin's counters in the server's /metrics.

    Raises:
        ValueError: It is no such list.
    """
    with urllib.request.urlopen(f"{root}/metrics", timeout=30) as reply:
        families = list(text_string_to_metric_families(reply.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    return {name: sum(s.value for s in samples if s.name == name) for name in (READ, TOTAL)}


def share_read(root: str, before: dict[str, float]) -> float | None:
    """Share of V rows read since ``before``; the server exports its counters once a second.

    Returns:
        The share, or None when the counters did not move.
    """
    deadline = time.monotonic() + EXPORT_SECONDS
    last, now = before, before
    while time.monotonic() < deadline:
        time.sleep(1.5)
        last, now = now, counters(root)
        if now == last and now[TOTAL] > before[TOTAL]:
            return (now[READ] - before[READ]) / (now[TOTAL] - before[TOTAL])
    return None


def ask(client: OpenAI, model: str, messages: list[Any], max_tokens: int) -> Answer:
    """Streams the answer to the terminal."""
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        temperature=0.0,
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
    started = time.monotonic()
    arrivals: list[float] = []
    pieces: list[str] = []
    prompt_tokens = tokens = 0
    for chunk in stream:
        if chunk.usage is not None:
            prompt_tokens, tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        for choice in chunk.choices:
            if choice.delta.content:
                arrivals.append(time.monotonic())
                pieces.append(choice.delta.content)
                print(choice.delta.content, end="", flush=True)
    print()
    if not arrivals:
        raise RuntimeError("the server sent an empty answer")
    return Answer("".join(pieces), prompt_tokens, tokens, arrivals[0] - started, arrivals[-1] - arrivals[0])


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server; default: %(default)s")
    parser.add_argument("--text", type=Path, required=True, help="text file to ask about")
    parser.add_argument(
        "--characters", type=int, default=20_000, help="of the text to send; default: %(default)s"
    )
    parser.add_argument("--question", default=QUESTION, help="default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=128, help="of the answer; default: %(default)s")
    parser.add_argument("--result", type=Path, help="also write the numbers to this file, as JSON")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Asks, then prints answer, share of V rows read and speed."""
    options = parse(argv)
    client = OpenAI(base_url=f"{options.url}/v1", api_key="none", timeout=900, max_retries=0)
    try:
        text = options.text.read_text(encoding="utf-8")[: options.characters]
    except (OSError, UnicodeDecodeError) as error:
        print(f"error: --text {options.text} can't be read: {error}", file=sys.stderr)
        return 1
    try:
        # Not after minutes of asking.
        if options.result:
            options.result.open("a").close()
    except OSError as error:
        print(f"error: --result {options.result} can't be written: {error}", file=sys.stderr)
        return 1
    try:
        model = served_model(client)
        before = counters(options.url)
        print(
            f"{options.text.name}, its first {len(text):,} characters, and then: {options.question}\n",
            flush=True,
        )
        messages = [
            {"role": "system", "content": f"You are a helpful assistant. You know this play:\n\n{text}"},
            {"role": "user", "content": options.question},
        ]
        answer = ask(client, model, messages, options.max_tokens)
        share = share_read(options.url, before)
    except (OpenAIError, OSError, RuntimeError, ValueError) as error:
        print(f"error: asking {options.url} failed: {error}", file=sys.stderr)
        return 1
    if share is None:
        print(
            "error: the server's /metrics has no counters of TOPTHETA. It needs the backend, and",
            file=sys.stderr,
        )
        print("       PROMETHEUS_MULTIPROC_DIR set to an empty folder when it starts.", file=sys.stderr)
        return 1
    speed = answer.per_second
    print(f"\nPrompt              {answer.prompt_tokens:,} tokens, first token after {answer.first:.1f} s")
    print(f"Answer              {answer.tokens} tokens, {speed:.1f} per second")
    print(f"V rows read         {share:.1%} of all, every layer counted")
    if options.result:
        result = {
            "v_rows_read": round(share, 4),
            "decode_tokens_per_second": round(speed, 2),
            "answer": answer.text,
        }
        options.result.write_text(json.dumps(result, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
