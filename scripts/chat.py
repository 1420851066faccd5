#!/usr/bin/env python3
"""Talks to a running server in the terminal, and says after each answer what it cost.

/clear forgets the conversation, /exit or Ctrl-D ends it.
"""

import argparse
import sys
from pathlib import Path

from ask import Answer, ask, counters, served_model, share_read
from openai import BadRequestError, OpenAI, OpenAIError

Message = dict[str, str]


class Chat:
    """One conversation.

    Args:
        url: Of the server.
        text: What the model is told before the conversation begins; "" for nothing.
        max_tokens: Of an answer.
    """

    def __init__(self, url: str, text: str, max_tokens: int) -> None:
        self._url, self._max_tokens = url, max_tokens
        self._client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=900, max_retries=0)
        self._model = served_model(self._client)
        known = f" You know this text:\n\n{text}" if text else ""
        self._start: list[Message] = [
            {"role": "system", "content": f"You are a helpful assistant.{known}"},
        ]
        self._messages = list(self._start)

    def clear(self) -> None:
        """Forgets what was said."""
        self._messages = list(self._start)

    def say(self, words: str) -> None:
        """Sends the user's words, streams the answer and prints its cost; without one the turn is taken back."""
        known = len(self._messages)
        self._messages.append({"role": "user", "content": words})
        try:
            before = counters(self._url)
            answer = ask(self._client, self._model, self._messages, self._max_tokens)
            self._messages.append({"role": "assistant", "content": answer.text})
            print(cost(answer, share_read(self._url, before)))
        except KeyboardInterrupt:
            print("\n[interrupted]")
        except (OpenAIError, OSError, RuntimeError, ValueError) as error:
            too_long = isinstance(error, BadRequestError) and "maximum context length" in str(error)
            hint = " The conversation is too long for the model: /clear forgets it." if too_long else ""
            print(f"error: {error}{hint}", file=sys.stderr)
        finally:
            if self._messages[-1]["role"] == "user":
                del self._messages[known:]


def cost(answer: Answer, share: float | None) -> str:
    """One line about an answer."""
    read = f"{share:.1%} of V rows read" if share is not None else "no counters of TOPTHETA in /metrics"
    return (
        f"[{answer.prompt_tokens:,} tokens of context, {answer.tokens} of answer, "
        f"{answer.per_second:.1f} tokens/s, {read}]"
    )


def main(argv: list[str] | None = None) -> int:
    """Reads lines until there are no more."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server; default: %(default)s")
    parser.add_argument("--text", type=Path, help="text file that the model is told about first")
    parser.add_argument(
        "--characters", type=int, default=20_000, help="of the text to send; default: %(default)s"
    )
    parser.add_argument("--max-tokens", type=int, default=128, help="of an answer; default: %(default)s")
    options = parser.parse_args(argv)
    try:
        text = options.text.read_text(encoding="utf-8")[: options.characters] if options.text else ""
    except (OSError, UnicodeDecodeError) as error:
        print(f"error: --text {options.text} can't be read: {error}", file=sys.stderr)
        return 1
    try:
        chat = Chat(options.url, text, options.max_tokens)
    except (OpenAIError, OSError, ValueError) as error:
        print(f"error: {options.url}: {error}", file=sys.stderr)
        return 1
    while True:
        try:
            words = input("\nyou> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if words == "/exit":
            return 0
        if words == "/clear":
            chat.clear()
        elif words:
            chat.say(words)


if __name__ == "__main__":
    sys.exit(main())
