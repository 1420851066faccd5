"""What is in a model's folder, looked at before transformers does: files that aren't what their names say."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from topt_vllm.replay.options import ReplayError

_POINTER = b"version https://git-lfs.github.com/"
# A pointer has some 130 bytes.
_LARGEST_POINTER = 1024
_WEIGHTS = "model.safetensors"
_PICKLED = "pytorch_model.bin"
_INDEX = ".index.json"
_LARGEST_JSON = 256 << 20
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_WORKS = (
    "a folder in Hugging Face's format (config.json, *.safetensors, tokenizer files) or a hub id is needed"
)


def check_files(model: str) -> None:
    """Refuses what is no checkpoint in Hugging Face's format; hub ids pass.

    Args:
        model: Folder or hub id.

    Raises:
        ReplayError: No folder, a file, a folder without a configuration, or one whose files were never fetched.
    """
    folder = Path(model)
    # Names on the hub have one slash at most; transformers would speak of their grammar.
    if not folder.exists() and (model.startswith(("/", ".", "~")) or model.count("/") > 1):
        raise ReplayError(f"--model {model}: no such folder; {_WORKS}")
    if folder.exists() and not folder.is_dir():
        raise ReplayError(f"--model {model}: {_kind(folder)}; {_WORKS}")
    if not folder.is_dir():
        return
    files = [file for file in sorted(folder.iterdir()) if not file.is_dir()]
    # Whoever opens a pipe may wait for ever, and reads a device for ever.
    unread = [file.name for file in files if not file.is_file() or _is_too_large(file)]
    if unread:
        raise ReplayError(
            f"--model {model}: {unread[0]}: a broken link, a device or a pipe, or far too large"
        )
    pointers = [file.name for file in files if _is_pointer(file)]
    if pointers:
        raise ReplayError(
            f"--model {model}: {', '.join(pointers[:3])}: a Git LFS pointer, not the file itself; run "
            "`git lfs pull` in the folder, or download it"
        )
    if not (folder / "config.json").is_file():
        foreign = next((file for file in files if file.suffix == ".gguf"), None)
        found = f"it has {foreign.name}, {_kind(foreign)}" if foreign else "it has no config.json"
        raise ReplayError(f"--model {model}: {found}; {_WORKS}")


def check_weights(model: str) -> None:
    """Refuses a folder whose weights are missing or were cut off; hub ids pass.

    Args:
        model: Folder or hub id.

    Raises:
        ReplayError: The message names the file.
    """
    folder = Path(model)
    if not folder.is_dir():
        return
    index = folder / f"{_WEIGHTS}{_INDEX}"
    if (folder / _WEIGHTS).exists():
        files = [folder / _WEIGHTS]
    elif index.exists():
        files = [folder / name for name in _shards(index, model)]
    elif any((folder / name).exists() for name in (_PICKLED, f"{_PICKLED}{_INDEX}")):
        return
    else:
        raise ReplayError(
            f"--model {model}: the folder has no weights: no {_WEIGHTS}, {index.name} or {_PICKLED}"
        )
    for file in files:
        _check_safetensors(file, model)


def lacks_tokenizer(model: str) -> bool:
    """Whether a folder has none of the files that tokenizers come in."""
    folder = Path(model)
    return folder.is_dir() and not any((folder / name).exists() for name in TOKENIZERS)


def _kind(path: Path) -> str:
    if not path.is_file():
        return "a device or a pipe"
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return "a GGUF file, which can't be calibrated: name the checkpoint that it was made from"
    return "a file"


def _is_too_large(path: Path) -> bool:
    """Of what is read into memory: vocabularies of 250,000 tokens take 35 MB."""
    return path.suffix == ".json" and path.stat().st_size > _LARGEST_JSON


def _is_pointer(path: Path) -> bool:
    if path.stat().st_size > _LARGEST_POINTER:
        return False
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _shards(index: Path, model: str) -> list[str]:
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        return sorted(map(str, names))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ReplayError(
            f"--model {model}: {index.name} is not an index of weights: {error!r:.200}"
        ) from error


def _check_safetensors(path: Path, model: str) -> None:
    if not path.is_file():
        raise ReplayError(
            f"--model {model}: {path.name} is missing, which {_WEIGHTS}{_INDEX} names; download it"
        )
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ReplayError(
            f"--model {model}: {path.name} has {path.stat().st_size:,} bytes: it was cut off, or is no safetensors "
            f"file ({str(error)!r:.200}); download it again"
        ) from error
