"""From files to token sequences: what is calibrated on, and what is held back."""

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topt_vllm.replay import text_formats
from topt_vllm.replay.options import ReplayError
from topt_vllm.replay.text_files import TEXT_SUFFIXES, files_of, known_size, open_text
from topt_vllm.table.schema import TextSource
from topt_vllm.table.words import as_text

# Enough characters of a hub dataset for the tokens needed, whatever the tokenizer: dense scripts take fewer.
_CHARACTERS_PER_TOKEN = 16
# Of files twice that, so that the sequences have some text between them, and never less than a play or two.
_BYTES_PER_TOKEN = 32
_READ_WHOLE = 1 << 20
# Parts of a large file, evenly spread.
_STRETCHES = 16
_LARGEST_DIGESTED = 1 << 30


@dataclass(frozen=True)
class Sequences:
    """Token sequences, all of one length.

    Attributes:
        calibration: Sequences that thresholds are taken from.
        held_back: The sequence that only measures them; [] where none is needed and the text is too short.
        tuning: The sequences that targets are tried on.
    """

    calibration: list[list[int]]
    held_back: list[int]
    tuning: list[list[int]]


def read_texts(
    names: tuple[str, ...], tokens_needed: int, stretches: int = _STRETCHES
) -> tuple[list[str], list[TextSource]]:
    """Documents of all data sets in order, and where they came from.

    They are read whole where all together have 1 MiB, or 32 bytes for each token needed. Of larger ones each file
    gives its share of that, the small ones all they have: the beginning, or stretches that lie evenly over the file
    (see ``text_formats.py``). Chance has no part in it: the same files and sizes give the same documents.

    Args:
        names: Files, folders of files and pipes, or hub datasets as ``name[:config[:split]]``.
        tokens_needed: Bounds how much is read.
        stretches: Of a large file; with 1 its beginning is read.

    Raises:
        ReplayError: A file or dataset can't be read.
    """
    most = max(_READ_WHOLE, tokens_needed * _BYTES_PER_TOKEN)
    places = [place for name in names for place in _places(name, most)]
    sizes = [known_size(place) if isinstance(place, Path) else 0 for place in places]
    share = _fair_share([most if size is None else size for size in sizes], most)
    documents: list[str] = []
    sources: list[TextSource] = []
    for place in places:
        if isinstance(place, Path):
            with open_text(place) as file:
                documents += text_formats.documents(file, share, stretches)
            sources.append(TextSource(name=_source_name(place), sha256=_digest(place)))
        else:
            documents += _read_hub(place, tokens_needed * _CHARACTERS_PER_TOKEN)
            sources.append(TextSource(name=place, sha256=None))
    return documents, sources


def _places(name: str, most: int) -> list[Path | str]:
    """Files, evenly chosen where a folder has many more than are needed, or a hub dataset."""
    path = Path(name)
    if not path.exists():
        return [name]
    files = files_of(path)
    size = sum(file.stat().st_size for file in files)
    wanted = max(_STRETCHES, -(-len(files) * most // max(size, 1)))
    return list(files[:: max(1, len(files) // wanted)])


def _fair_share(sizes: list[int], most: int) -> int:
    """The largest number of bytes of each file, at most, with which all together are no more than ``most``."""
    left = most
    for index, size in enumerate(sorted(sizes)):
        share = left // (len(sizes) - index)
        if size > share:
            return share
        left -= size
    return most


def _source_name(path: Path) -> str:
    """A pipe's own name says nothing."""
    return as_text(path.name if path.is_file() else str(path))


def _digest(path: Path) -> str | None:
    """Of the file as it lies there; None for a pipe, and where that would take longer than what follows."""
    if not path.is_file() or path.stat().st_size > _LARGEST_DIGESTED:
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_hub(name: str, characters: int) -> list[str]:
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.lower().endswith(TEXT_SUFFIXES):
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
    except ReplayError as error:
        raise ReplayError(f"--dataset {name}: {error}") from error
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
    tokenizer: Any, documents: list[str], count: int, length: int, tuning: int = 0, hold_back: bool = True
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
        hold_back: Whether tokens have to be held back. Where they don't, they still are if the text has enough, so
            that the other sequences stay where they are.

    Raises:
        ReplayError: The text is too short.
    """
    prefix = _prefix(tokenizer)
    # A list of numbers takes ten times as much.
    stream = array("I")
    for document in documents:
        stream.extend(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
    body = length - len(prefix)
    total = count + tuning
    hold_back = hold_back or len(stream) >= (total + 1) * body
    needed = (total + hold_back) * body
    if len(stream) < needed:
        raise ReplayError(
            f"the text has {len(stream)} tokens, and sequences of {length} tokens need {needed}: "
            f"{counted(count, tuning, hold_back)}. Add text, or lower --num-samples or --max-seq-length"
        )
    slack = len(stream) - needed
    starts = [i * body + (slack * i // (total - 1) if total > 1 else 0) for i in range(total)]
    sequences = [prefix + stream[start : start + body].tolist() for start in starts]
    held_back = prefix + stream[-body:].tolist() if hold_back else []
    return Sequences(sequences[:count], held_back, sequences[count:])


def counted(count: int, tuning: int, hold_back: bool = True) -> str:
    """How many sequences there are of each kind, in words."""
    more = f", {tuning} more to tune on" if tuning else ""
    return f"{count}{more}{' and 1 held back' if hold_back else ''}"


def _prefix(tokenizer: Any) -> list[int]:
    """Tokens put before any text, read off an example: tokenizers offer no common way to ask."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return next((full[:i] for i in range(len(full)) if full[i : i + len(plain)] == plain), [])
