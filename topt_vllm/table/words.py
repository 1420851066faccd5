"""Layers, budgets and names in the words of tables and logs."""

import os
from collections.abc import Iterable


def layers_in_words(layers: Iterable[int]) -> str:
    """Layers with that word, without which a lone 0 would be read as their number; ``none`` without any."""
    numbers = sorted(layers)
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}" if numbers else "none"


def budget_in_words(key: int | str | None) -> str:
    """``k=64``, or the name."""
    return f"k={key}" if isinstance(key, int) else str(key)


def as_text(name: str) -> str:
    """Names of files are bytes, and needn't be text."""
    return name.encode("utf-8", "replace").decode("utf-8")


def name_of_model(model: str) -> str:
    """The last part of a hub id, or the name of a folder, which needn't be a part of its path: ``.``."""
    return os.path.basename(os.path.abspath(model))


def printable(text: str) -> str:
    """A stranger's text for the terminal, which may not be steered by it: as ``repr`` has it, without quotes."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
