"""Hostile files for every command and option that takes one: a refusal in one line, never a traceback.

Nothing may be left half written, take long or fill memory. What is tried is counted; `pytest -s` prints it.
"""

import json
import os
import random
import resource
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from report_inputs import decoded, evaluated, served
from table_factory import make_table
from tiny_models import SMALL, save_model, save_text
from transformers import LlamaConfig

from topt_vllm.cli.main import main
from topt_vllm.engines.process import EngineError
from topt_vllm.replay import text_files
from topt_vllm.table.file import dump
from topt_vllm.table.identity import identify
from topt_vllm.verify import run as verify_run

pytestmark = pytest.mark.slow

# Of the processor: the first to need a library waits for it, and machines are shared. What only waits is stopped.
CPU_SECONDS, WAITED_SECONDS = 30.0, 240
MEGABYTES = 400
tried = 0


@pytest.fixture(scope="module", autouse=True)
def count() -> Iterator[None]:
    yield
    print(f"\nhostile inputs tried: {tried}")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good file of each kind."""
    folder = tmp_path_factory.mktemp("good")
    config = LlamaConfig(**SMALL, tie_word_embeddings=False)
    save_model(folder / "model", config)
    save_text(folder / "text.txt", 3000)
    records = [json.dumps({"text": f"{number} words " * 20}) for number in range(40)]
    (folder / "text.jsonl").write_text("\n".join(records))
    (folder / "text.json").write_text(f"[{', '.join(records)}]")
    (folder / "text.csv").write_text(
        "text,id\n" + "".join(f'"{n} words, {"more " * 30}",1\n' for n in range(40))
    )
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder / "model")
    dump(make_table(identify(config, "model"), lengths=[256, 512]), folder / "table.yaml")
    (folder / "evaluation.json").write_text(json.dumps([evaluated("toptheta", 0.5)]))
    (folder / "decode.json").write_text(json.dumps([decoded()]))
    (folder / "serve.json").write_text(json.dumps(served()))
    dump(make_table(), folder / "tiny.yaml")
    capture = f"bench capture --model {folder}/model --dataset {folder}/text.txt --seq-len 512"
    assert main([*shlex.split(capture), "--output", str(folder / "cache.safetensors")]) == 0
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No waiting for writers, no engines, no measurements: what lies behind the files is tested elsewhere."""

    def no_engine(*_: object, **__: object) -> None:
        raise EngineError("no engine is started here")

    def late(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, late)
    monkeypatch.setattr(text_files, "WRITER_SECONDS", 0.02)
    monkeypatch.setattr("topt_vllm.benchmarks.serve.serve", no_engine)
    monkeypatch.setattr("topt_vllm.benchmarks.engine.EngineBenchmark.run", no_engine)
    monkeypatch.setattr("topt_vllm.cli.bench_output._commit", lambda: None)
    monkeypatch.setattr(verify_run, "run_engine", no_engine)
    monkeypatch.setattr(verify_run.installation, "kernel", lambda: "not asked")
    checks = verify_run.verify
    monkeypatch.setattr(verify_run, "verify", lambda *given, **more: checks(*given, run=no_engine, **more))
    yield
    signal.signal(signal.SIGALRM, before)


# By option: the command with {} for a hostile file. Good files, where others are needed, lie in {good}.
READS = {
    "calibrate --model": "calibrate --model {} --dataset {good}/text.txt --output {out} --dry-run",
    "calibrate --dataset": "calibrate --model {good}/model --dataset {} --num-samples 1 --max-seq-length 300 "
    "--k 16 --output {out} --dry-run",
    "calibrate --k-screen-only": "calibrate --model {good}/model --dataset {good}/text.txt --output {} "
    "--num-samples 1 --max-seq-length 512 --k-screen-only --dry-run",
    "inspect": "inspect {}",
    "evaluate --model": "evaluate --model {} --dataset {good}/text.txt --thresholds {good}/table.yaml "
    "--max-seq-length 300 --rows --budget 64 --rules toptheta --dry-run",
    "evaluate --dataset": "evaluate --model {good}/model --thresholds {good}/table.yaml --dataset {} "
    "--max-seq-length 300 --rows --budget 64 --rules toptheta --dry-run",
    "evaluate --tune-on": "evaluate --model {good}/model --thresholds {good}/table.yaml --dataset {good}/text.txt "
    "--tune-on {} --max-seq-length 300 --rows 0.9 --rules toptheta --dry-run",
    "evaluate --thresholds": "evaluate --model {good}/model --dataset {good}/text.txt --thresholds {} "
    "--max-seq-length 300 --rows --budget 64 --rules toptheta --dry-run",
    "report": "report {} -o {out}",
    "report --evaluation": "report {good}/tiny.yaml --evaluation {} -o {out}",
    "report --bench": "report {good}/tiny.yaml --bench {} -o {out}",
    "verify --model": "verify --model {}",
    "verify --thresholds": "verify --model {good}/model --thresholds {}",
    "bench capture --model": "bench capture --model {} --dataset {good}/text.txt --seq-len 512 --output {out}",
    "bench capture --dataset": "bench capture --model {good}/model --dataset {} --seq-len 9999 --output {out}",
    "bench decode --cache": "bench decode --cache {} --thresholds {good}/table.yaml --layers 77",
    "bench decode --thresholds": "bench decode --cache {good}/cache.safetensors --thresholds {} --layers 77",
    "bench serve --model": "bench serve --model {} --dataset {good}/text.txt --concurrency 1 --prompt-tokens 64",
    "bench serve --dataset": "bench serve --model {good}/model --dataset {} --concurrency 1 --prompt-tokens 64",
    "bench engine --model": "bench engine --model {} --batch 1 --context 64",
}
WRITES = {
    "calibrate --output": "calibrate --model {good}/model --dataset {good}/text.txt --num-samples 1 "
    "--max-seq-length 300 --k 16 --output {} --dry-run",
    "calibrate --output --force": "calibrate --model {good}/model --dataset {good}/text.txt --num-samples 1 "
    "--max-seq-length 300 --k 16 --output {} --force --dry-run",
    "inspect --plot": "inspect {good}/table.yaml --plot {}",
    "evaluate --json": "evaluate --model m --dataset t --json {} --dry-run",
    "evaluate --plot": "evaluate --model m --dataset t --plot {} --dry-run",
    "report -o": "report {good}/tiny.yaml -o {}",
    "bench capture --output": "bench capture --model m --dataset t --output {}",
    **{
        f"bench {mode} --json": f"bench {mode} {more} --json {{}}"
        for mode, more in {
            "decode": "--cache c",
            "serve": "--model m --dataset t",
            "engine": "--model m",
            "compile": "",
            "autotune": "",
        }.items()
    },
}


def bound_socket(path: Path) -> None:
    # Its address may have 108 bytes.
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)
        server.bind(path.name)
        os.chdir(here)


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def endless_line(path: Path) -> None:
    path.write_bytes(b"[" * (8 << 20))


def folder_with(name: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
    def made(path: Path) -> None:
        path.mkdir()
        make(path / name)

    return made


def linked_to(place: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(place)


def forbidden(path: Path) -> None:
    """For all but root."""
    path.write_text("secret")
    path.chmod(0)


def forbidden_folder(path: Path) -> None:
    path.mkdir(mode=0)


def containing(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


PLACES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None,
    "empty": containing(b""),
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "socket": bound_socket,
    "huge": huge,
    "endless": endless_line,
    "forbidden": forbidden,
    "forbidden folder": forbidden_folder,
    "broken link": linked_to("nowhere"),
    "link to itself": linked_to("hostile.txt"),
    "link to zeros": linked_to("/dev/zero"),
    "link to null": linked_to("/dev/null"),
    "link to memory": linked_to("/proc/self/mem"),
    "folder with a pipe": folder_with("config.json", os.mkfifo),
    "folder with a pipe as text": folder_with("a.txt", os.mkfifo),
    "folder with a huge file": folder_with("config.json", huge),
    "folder with zeros": folder_with("config.json", linked_to("/dev/zero")),
    "folder with an empty file": folder_with("config.json", containing(b"")),
    "folder with a list": folder_with("config.json", containing(b"[]")),
    "folder with a number": folder_with("config.json", containing(b'{"model_type": 7}')),
    "folder with a word": folder_with(
        "config.json", containing(b'{"model_type": "llama", "hidden_size": "x"}')
    ),
    "folder with depth": folder_with("config.json", containing(b'{"a":' * 90_000)),
    "zero bytes": containing(bytes(5000)),
    "random bytes": containing(random.Random(0).randbytes(5000)),
    "not UTF-8": containing(b"caf\xe9 " * 2000),
    "half a character": containing(b'{"text": "\\udc00"}\n' * 999),
    "deep JSON": containing(b'[{"text":' * 90_000),
    "deep YAML": containing(b"a: [" * 90_000),
    "aliases": containing(b"a: &a [x]\nb: [*a, *a]\n"),
    "tag": containing(b"!!python/object/apply:os.system ['touch canary']"),
    "pickle": containing(b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94."),
    "safetensors that lie": containing((1 << 62).to_bytes(8, "little") + b"{}"),
    "GGUF": containing(b"GGUF" + bytes(64)),
    "zip": containing(b"PK\x03\x04" + bytes(64)),
    "cut gzip": containing(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03abc"),
}
NAMES = {
    "quotes and spaces": "a 'b' \"c\"",
    "newline": "a\nb",
    "not UTF-8": os.fsdecode(b"\xff\xfe"),
    "brackets": "{0} %s [x]*",
    "too long": "a" * 300,
    "far too long": "a" * 70_000,
    "in nothing": "missing/file.json",
    "in a file": "text.txt/file",
    "of a user": "~nobody-at-all/file",
    "address": "https://example.org/file",
    "control": "\x1b[31m\x07",
}
# Are texts, if strange ones.
FINE = {"endless", "deep YAML"}


def attempt(
    argv: list[str], folder: Path, capsys: pytest.CaptureFixture[str], allowed: tuple[int, ...]
) -> str:
    """Runs a command in a folder that it must leave as it is; returns what it said."""
    global tried
    tried += 1
    capsys.readouterr()
    before, started = listing(folder), time.process_time()
    signal.alarm(WAITED_SECONDS)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        status = main(argv)
    except SystemExit as stopped:
        status = stopped.code
    finally:
        signal.alarm(0)
    took = time.process_time() - started
    captured = capsys.readouterr()
    about = f"{shlex.join(argv)[:500]}\n{captured.out[-500:]}\n{captured.err[-2000:]}"
    assert status in allowed, f"status {status}: {about}"
    assert "Traceback" not in captured.out + captured.err, about
    assert took < CPU_SECONDS, about
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) >> 10
    assert grown < MEGABYTES, f"{grown} MB: {about}"
    assert status == 0 or listing(folder) == before, about
    assert not Path("canary").exists()
    if status == 2:
        # argparse shows its usage before; a command to paste may follow, behind four spaces.
        lines = captured.err[captured.err.index("topt-vllm") :].splitlines()
        assert "error: " in lines[0], about
        assert (
            len(lines) == 1 or lines[1].startswith("    topt-vllm ") or any("\n" in part for part in argv)
        ), about
    return captured.err


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_size) for path in folder.rglob("*"))


def command(form: str, hostile: str, good: Path, out: Path) -> list[str]:
    return [
        part.format(hostile, good=good, out=out) if part != "{}" else hostile for part in shlex.split(form)
    ]


def statuses(option: str) -> tuple[int, ...]:
    return (1,) if option.startswith("verify") else (2,)


@pytest.mark.parametrize("option", READS)
def test_what_is_no_file_of_the_kind_is_refused(
    option: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for kind, make in PLACES.items():
        path = tmp_path / "hostile.txt"
        make(path)
        is_text = option.endswith(("--dataset", "--tune-on"))
        allowed = (0, 2) if kind in FINE and is_text else statuses(option)
        attempt(command(READS[option], str(path), good, tmp_path / "out"), tmp_path, capsys, allowed)
        if path.is_dir():
            path.chmod(0o700)
            shutil.rmtree(path)
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("option", READS)
def test_names_of_files_are_only_names(
    option: str,
    good: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in NAMES.values():
        attempt(command(READS[option], name, good, tmp_path / "out"), tmp_path, capsys, statuses(option))


@pytest.mark.parametrize("option", WRITES)
def test_what_cannot_be_written_is_refused_before_the_work(
    option: str,
    good: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.png").write_text("mine")
    (tmp_path / "link.png").symlink_to("nowhere")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    names = [
        "/nowhere/file.png",
        "mine.png/file.png",
        "folder.png",
        "pipe.png",
        "/dev/null",
        "/dev/zero",
        "/",
    ]
    names += ["a" * 300 + ".png", "a/" * 5000 + ".png", "mine.png", "link.png"]
    replaces = "--force" in option or option == "inspect --plot"
    for name in names[:-2] if replaces else names:
        attempt(command(WRITES[option], name, good, tmp_path / "out"), tmp_path, capsys, (2,))
    assert (tmp_path / "mine.png").read_text() == "mine"
    for device in ("/dev/null", "/dev/zero"):
        assert not Path(device).is_file()


INSERTED = [b"[", b"{", b'"', b"\\ud800", b"1e999", b"null", b"\n"]


def changed(content: bytes, source: random.Random) -> bytes:
    """A good file with something wrong in it."""
    at = source.randrange(len(content))
    return source.choice(
        [
            lambda: content[:at],
            lambda: content[:at] + source.randbytes(3) + content[at:],
            lambda: content[:at] + bytes([content[at] ^ 1 << source.randrange(8)]) + content[at + 1 :],
            lambda: content[:at] + content[at + source.randrange(1, 200) :],
            lambda: content[:at] + source.choice(INSERTED) + content[at:],
            lambda: content[:at] + content[max(0, at - 300) :],
        ]
    )()


FUZZED = {
    "text.txt": ("calibrate --dataset", None),
    "text.jsonl": ("calibrate --dataset", None),
    "text.json": ("bench serve --dataset", None),
    "text.csv": ("evaluate --tune-on", None),
    "table.yaml": ("inspect", None),
    "tiny.yaml": ("report", None),
    "evaluation.json": ("report --evaluation", None),
    "decode.json": ("report --bench", None),
    "serve.json": ("report --bench", None),
    "cache.safetensors": ("bench decode --cache", 3000),
    "model/config.json": ("calibrate --model", None),
    "model/model.safetensors": ("bench capture --model", 3000),
    "model/tokenizer.json": ("bench serve --model", None),
    "model/tokenizer_config.json": ("evaluate --model", None),
}


@pytest.mark.parametrize("name", FUZZED)
def test_broken_files_are_refused(name: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Or read, where what is broken doesn't matter."""
    option, header = FUZZED[name]
    source, content = random.Random(name), (good / name).read_bytes()
    if "/" in name:
        shutil.copytree(good / "model", tmp_path / "model")
    for _ in range(12):
        hostile = tmp_path / name
        head = content[:header]
        hostile.write_bytes(changed(head, source) + content[len(head) :])
        given = hostile.parent if "/" in name else hostile
        attempt(command(READS[option], str(given), good, tmp_path / "out"), tmp_path, capsys, (0, 2))
        for path in tmp_path.glob("out"):
            path.unlink()
