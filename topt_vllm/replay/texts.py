"""From files to token sequences: what is calibrated on, and what is held back."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topt_vllm.replay.options import ReplayError
from topt_vllm.table.schema import TextSource

# Enough characters of a hub dataset for the tokens needed, whatever the tokenizer: dense scripts take fewer.
_CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True)
class Sequences:
    """Token sequences, all of one length.

    Attributes:
        calibration: Sequences that thresholds are taken from.
        held_back: The sequence that only measures them.
        tuning: The sequences that targets are tried on.
    """

    calibration: list[list[int]]
    held_back: list[int]
    tuning: list[list[int]]


def read_texts(names: tuple[str, ...], tokens_needed: int) -> tuple[list[str], list[TextSource]]:
    """Documents of all data sets in order, and where they came from.

    Args:
        names: Existing files, or hub datasets as ``name[:config[:split]]``.
        tokens_needed: Bounds how much of a hub dataset is read; files are read whole.

    Raises:
        ReplayError: A file or dataset can't be read.
    """
    documents: list[str] = []
    sources: list[TextSource] = []
    for name in names:
        path = Path(name)
        if path.is_file():
            found = _read_file(path)
            sources.append(TextSource(name=path.name, sha256=hashlib.sha256(path.read_bytes()).hexdigest()))
        else:
            found = _read_hub(name, tokens_needed * _CHARACTERS_PER_TOKEN)
            sources.append(TextSource(name=name, sha256=None))
        documents += found
    return documents, sources


def _read_file(path: Path) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReplayError(f"{path}: can't be read as UTF-8 text: {error}") from error
    if path.suffix != ".jsonl":
        return [content]
    return [
        _record_text(line, f"{path}:{number}")
        for number, line in enumerate(content.split("\n"), 1)
        if line.strip()
    ]


def _record_text(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ReplayError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ReplayError(f'{where}: an object with a string "text" was expected')
    return record["text"]


def _read_hub(name: str, characters: int) -> list[str]:
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith((".txt", ".jsonl")):
        raise ReplayError(f"--dataset {name}: no such file")
    try:
        import datasets
    except ImportError as error:
        raise ReplayError(
            f"--dataset {name}: no such file, and reading it from the hub needs `pip install datasets`"
        ) from error
    dataset, config, split = [*name.split(":"), None, None][:3]
    documents: list[str] = []
    try:
        for text in _hub_records(datasets, dataset, config, split):
            documents.append(text)
            characters -= len(text)
            if characters <= 0:
                break
    except Exception as error:  # the library raises errors of many kinds, from HTTP's to its own
        raise ReplayError(
            f"--dataset {name}: no such file, and the hub says: {type(error).__name__}: {error}"
        ) from error
    return documents


def _hub_records(library: Any, name: str | None, config: str | None, split: str | None) -> Iterator[str]:
    for record in library.load_dataset(name, config, split=split or "train", streaming=True):
        if not isinstance(record.get("text"), str):
            raise ReplayError(f'records have no string "text", only {", ".join(record)}')
        yield record["text"]


def cut_sequences(
    tokenizer: Any, documents: list[str], count: int, length: int, tuning: int = 0
) -> Sequences:
    """Cuts the documents, joined in order, into sequences.

    The last ``length`` tokens are held back. The tuning and calibration sequences are spread evenly over what lies
    before, without overlap, the tuning ones last. Each sequence starts with the tokens that the tokenizer puts
    before a text (BOS), because attention leans on them.

    Args:
        tokenizer: A transformers tokenizer.
        documents: Texts.
        count: Calibration sequences.
        length: Tokens per sequence.
        tuning: Sequences that targets are tried on.

    Raises:
        ReplayError: The text is too short.
    """
    prefix = _prefix(tokenizer)
    stream: list[int] = []
    for document in documents:
        stream += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    body = length - len(prefix)
    total = count + tuning
    needed = (total + 1) * body
    if len(stream) < needed:
        raise ReplayError(
            f"the text has {len(stream)} tokens; {total} calibration sequences and one held back of {length} "
            f"tokens need {needed}. Add text, or lower --num-samples or --max-seq-length"
        )
    slack = len(stream) - needed
    starts = [i * body + (slack * i // (total - 1) if total > 1 else 0) for i in range(total)]
    sequences = [prefix + stream[start : start + body] for start in starts]
    return Sequences(sequences[:count], prefix + stream[-body:], sequences[count:])


def _prefix(tokenizer: Any) -> list[int]:
    """Tokens put before any text, read off an example: tokenizers offer no common way to ask."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return next((full[:i] for i in range(len(full)) if full[i : i + len(plain)] == plain), [])
