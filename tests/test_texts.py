"""Texts as people hand them over: what is read of them, and what is refused by name."""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_models import byte_tokenizer, save_text

from topt_vllm.replay import text_files, text_formats
from topt_vllm.replay.options import ReplayError
from topt_vllm.replay.texts import cut_sequences, read_texts

TEXTS = ["first\ntext", "zweiter Text: ä €", 'a third, with commas; and "quotes"']


def read(path: Path | str, needed: int = 100, **options: Any) -> list[str]:
    return read_texts((str(path),), needed, **options)[0]


def table(delimiter: str) -> str:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(["id", "text"])
    writer.writerows(enumerate(TEXTS))
    return file.getvalue()


RECORDS = [{"id": index, "text": text} for index, text in enumerate(TEXTS)]
LINES = "\n".join(map(json.dumps, RECORDS)) + "\n"
FORMS = {
    "jsonl": ("t.jsonl", LINES),
    "ndjson": ("t.ndjson", LINES),
    "lines, no suffix": ("t", LINES),
    "lines called txt": ("t.txt", LINES),
    "lines called json": ("t.json", LINES),
    "lines with blank ones": ("t.jsonl", "\n" + LINES.replace("\n", "\r\n\r\n")),
    "array": ("t.json", json.dumps(RECORDS)),
    "array, indented": ("t.json", json.dumps(RECORDS, indent=2)),
    "array called jsonl": ("t.jsonl", json.dumps(RECORDS)),
    "array called txt": ("t.txt", json.dumps(RECORDS)),
    "array of texts": ("t.json", json.dumps(TEXTS)),
    "objects over several lines": ("t.json", "\n".join(json.dumps(record, indent=1) for record in RECORDS)),
    "csv": ("t.csv", table(",")),
    "csv with semicolons": ("T.CSV", table(";")),
    "tsv": ("t.tsv", table("\t")),
}


@pytest.mark.parametrize("bom", ["", "\ufeff"], ids=["plain", "with a byte order mark"])
@pytest.mark.parametrize(("name", "content"), FORMS.values(), ids=FORMS.keys())
def test_records_are_read_in_every_form(tmp_path: Path, name: str, content: str, bom: str):
    (tmp_path / name).write_bytes((bom + content).encode())
    assert read(tmp_path / name) == TEXTS


@pytest.mark.parametrize("text", ["[SCENE I] Elsinore.\n", "{ braces }", "[1] a reference", "", "[ "])
def test_plain_text_is_read_as_it_stands(tmp_path: Path, text: str):
    (tmp_path / "t.txt").write_text("\ufeff" + text, encoding="utf-8")
    assert "".join(read(tmp_path / "t.txt")) == text


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed_files_are_known_by_their_content(tmp_path: Path, suffix: str, compress: Any):
    for name, content, texts in (
        (f"t.jsonl{suffix}", LINES, TEXTS),
        (f"t.csv{suffix}", table(","), TEXTS),
        ("plain", "a text", ["a text"]),
    ):
        (tmp_path / name).write_bytes(compress(content.encode()))
        assert read(tmp_path / name) == texts
    whole = compress(random.Random(0).randbytes(5000).hex().encode())
    (tmp_path / f"cut.txt{suffix}").write_bytes(whole[:1000])
    with pytest.raises(ReplayError, match=f"cut.txt{suffix}: can't be read: "):
        read(tmp_path / f"cut.txt{suffix}")


def test_a_folder_is_its_text_files_in_order(tmp_path: Path):
    for name, text in (("b.txt", "b"), ("a.md", "a"), (".hidden.txt", "no"), ("c.png", "no")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"d"))
    (tmp_path / "inside.txt").mkdir()
    documents, sources = read_texts((str(tmp_path),), 100)
    assert documents == ["a", "b", "d"]
    assert [source.name for source in sources] == ["a.md", "b.txt", "d.txt.gz"]
    assert all(source.sha256 for source in sources)
    (tmp_path / "none").mkdir()
    with pytest.raises(ReplayError, match=r"no text files in this folder; those taken end in \.txt"):
        read(tmp_path / "none")


def test_a_pipe_is_read_once_and_only_as_far_as_needed(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write(content: bytes) -> None:
        with pipe.open("wb") as file:
            try:
                file.write(content)
            except BrokenPipeError:
                stopped.append(True)

    for content, texts in (
        (LINES.encode(), TEXTS),
        (gzip.compress(LINES.encode()), TEXTS),
        (b"text", ["text"]),
    ):
        stopped: list[bool] = []
        writer = threading.Thread(target=write, args=(content,))
        writer.start()
        documents, sources = read_texts((str(pipe),), 100)
        writer.join()
        assert (documents, stopped, sources[0].sha256) == (texts, [], None)
    writer = threading.Thread(target=write, args=("ä\n".encode() * (2 << 20),))
    writer.start()
    (found,) = read(pipe)
    writer.join()
    assert found == "ä\n" * (len(found) // 2)
    assert 1 << 20 <= len(found.encode()) < 1.1 * (1 << 20)
    assert stopped


def test_what_a_shell_gives_as_a_pipe():
    code = (
        "import sys\nfrom topt_vllm.replay.texts import read_texts\nprint(read_texts((sys.argv[1],), 9)[0])"
    )
    script = '"$0" -c "$1" /dev/stdin < <(sleep 0.2; printf text); "$0" -c "$1" <(printf other)'
    done = subprocess.run(["bash", "-c", script, sys.executable, code], capture_output=True, text=True)
    assert done.stdout == "['text']\n['other']\n", done.stderr


def test_a_pipe_without_a_writer_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_files, "WRITER_SECONDS", 0.1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ReplayError, match="a pipe that nobody writes to"):
        read(tmp_path / "pipe")


REFUSED = {
    "half a character": (
        "t.jsonl",
        b'{"text": "a"}\n{"text": "\\ud800"}',
        r"t\.jsonl:2: half of a character",
    ),
    "no text": ("t.jsonl", b'{"prompt": "a", "n": 1}', r"t\.jsonl:1: .*not keys 'prompt', 'n'; rename"),
    "a number for a text": (
        "t.jsonl",
        b'\n{"text": 3}',
        r't\.jsonl:2: an object with a string "text" was expected',
    ),
    "broken line": ("t.txt", b'{"text": "a"}\n{"text": ', r"t\.txt:2: not valid JSON"),
    "array of numbers": (
        "t.json",
        b"[1, 2]",
        r"record 1: an object with a string \"text\" was expected, not 1",
    ),
    "array of arrays": ("t.json", b"[" * 100_000, "record 1: not valid JSON: .*recursion"),
    "cut array": ("t.json", b'[{"text": "a"}, ', "record 2: not valid JSON: the file ends here"),
    "cut record": ("t.json", b'[{"text": "a"}, {"te', "record 2: not valid JSON"),
    "more than an array": ("t.json", b'[{"text": "a"}] x', "record 2: not valid JSON"),
    "an object of its own": ("t.json", b'{\n"data": []}', "record 1: .* not keys 'data'"),
    "no JSON": ("t.json", b"a text", "record 1: not valid JSON"),
    "empty JSON": ("t.json", b"", "record 1: not valid JSON: the file ends here"),
    "huge number": ("t.json", b"[" + b"9" * 9999 + b"]", "record 1: not valid JSON"),
    "csv without the column": (
        "t.csv",
        b"id,content\n1,x\n",
        "no column \"text\", only 'id', 'content'; rename",
    ),
    "csv with too few cells": ("t.csv", b"text,b\nx,1\ny\n", r"t\.csv:3: 1 cells, 2 expected"),
    "csv that never ends": ("t.csv", b'text\n"x', r"t\.csv:2: not valid CSV: unexpected end"),
    "empty csv": ("t.csv", b"", 'no column "text", only '),
    "parquet": ("t.parquet", b"PAR1", "reading Parquet needs `pip install pyarrow`"),
    "zip": ("t.txt", b"PK\x03\x04...", "it is a zip archive. Unpack"),
    "zstd": ("t.zst", b"\x28\xb5\x2f\xfd...", "it is compressed with zstd"),
    "tar": ("t.tar.gz", gzip.compress(bytes(257) + b"ustar"), "it is a tar archive"),
    "UTF-16": (
        "t.txt",
        "text".encode("utf-16"),
        "can't be read as UTF-8 text: it is UTF-16",
    ),
    "latin-1": ("t.txt", "caf\xe9 noir".encode("latin-1"), "can't be read as UTF-8 text: .* at byte 3"),
    "latin-1 csv": ("t.csv", "text\ncaf\xe9 noir".encode("latin-1"), "can't be read as UTF-8 text"),
    "zero bytes": ("t.txt", b"a\0b", "not a text: it has zero bytes"),
}


@pytest.mark.parametrize(("name", "content", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_text_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, message: str
):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ReplayError, match=message) as error:
        read(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_devices_are_refused(tmp_path: Path):
    for device in ("/dev/zero", "/dev/null"):
        with pytest.raises(ReplayError, match=f"{device}: a device or a socket"):
            read(device)


def test_parquet_is_read_by_column(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": TEXTS}), tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet") == TEXTS
    parquet.write_table(pyarrow.table({"id": [1]}), tmp_path / "t.parquet")
    with pytest.raises(ReplayError, match="no column \"text\", only 'id'"):
        read(tmp_path / "t.parquet")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and more")
    with pytest.raises(ReplayError, match="not valid Parquet"):
        read(tmp_path / "t.parquet")


def test_parquet_takes_the_column_that_is_named_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without the library: its own streaming calls."""

    class File:
        def __init__(self, stream: Any) -> None:
            self.schema_arrow = SimpleNamespace(names=stream.read()[4:].decode().split())

        def iter_batches(self, size: int, columns: list[str]) -> Any:
            assert columns == ["text"]
            yield SimpleNamespace(column=lambda _: SimpleNamespace(to_pylist=lambda: TEXTS))

    library = SimpleNamespace(ArrowException=OSError, parquet=SimpleNamespace(ParquetFile=File))
    monkeypatch.setitem(sys.modules, "pyarrow", library)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", library.parquet)
    (tmp_path / "t").write_bytes(b"PAR1 id text")
    assert read(tmp_path / "t") == TEXTS
    (tmp_path / "t").write_bytes(b"PAR1 id content")
    with pytest.raises(ReplayError, match="no column \"text\", only 'id', 'content'"):
        read(tmp_path / "t")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of some kilobytes are large."""
    monkeypatch.setattr("topt_vllm.replay.texts._READ_WHOLE", 3200)


def numbered(path: Path, count: int, form: str) -> Path:
    path.write_text("".join(form.format(number) + "\n" for number in range(count)), encoding="utf-8")
    return path


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("form", ["line {:06} ä", '{{"text": "line {:06} ä"}}'])
def test_a_large_file_is_read_in_stretches_over_all_of_it(tmp_path: Path, form: str):
    path = numbered(tmp_path / "t", 10_000, form)
    found = read(path, 0)
    lines = [line for text in found for line in text.split("\n") if line]
    numbers = [int(line.split()[1]) for line in lines]
    assert lines == [f"line {number:06} ä" for number in numbers]
    assert numbers == sorted(set(numbers))
    assert len(path.read_bytes()) * len(numbers) / 10_000 == pytest.approx(3200, rel=0.3)
    starts = [b for a, b in zip([-9, *numbers], numbers, strict=False) if b != a + 1]
    assert len(starts) == 16
    assert (starts[0], numbers[-1]) == (0, 9999)
    assert max(b - a for a, b in itertools.pairwise(starts)) < 1.1 * 10_000 / 15
    assert read(path, 0) == found
    (beginning,) = ["\n".join(read(path, 0, stretches=1))]
    assert "line 000040" in beginning
    assert "line 000300" not in beginning


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("name", ["t.json", "t.csv", "t.txt.gz"])
def test_of_what_can_only_be_read_on_the_beginning_is_read(tmp_path: Path, name: str):
    texts = [f"line {number:06} ä\n" for number in range(10_000)]
    if name == "t.json":
        (tmp_path / name).write_text(json.dumps([{"text": text} for text in texts]) + "never read")
    elif name == "t.csv":
        quoted = "".join(f'"{text}"\n' for text in texts)
        (tmp_path / name).write_text("text\n" + quoted + '"never read', encoding="utf-8")
    else:
        (tmp_path / name).write_bytes(gzip.compress("".join(texts).encode()))
    found = "".join(read(tmp_path / name, 0))
    assert "".join(texts).startswith(found)
    assert 2900 < len(found) < 3400


@pytest.mark.usefixtures("small_parts")
def test_lines_without_an_end_are_cut_between_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_formats, "_LONGEST_LINE", 64)
    (tmp_path / "t.txt").write_text("€" * 5000, encoding="utf-8")
    (tmp_path / "t.gz").write_bytes(gzip.compress(("€" * 5000).encode()))
    for name in ("t.txt", "t.gz"):
        found = "".join(read(tmp_path / name, 0))
        assert set(found) == {"€"}
        assert 3000 < len(found.encode()) < 3600


@pytest.mark.usefixtures("small_parts")
def test_records_longer_than_a_stretch_are_read_whole_and_once(tmp_path: Path):
    records = [f"{number} " * 300 for number in range(40)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in records))
    found = read(tmp_path / "t.jsonl", 0)
    assert set(found) <= set(records)
    assert len(found) == len(set(found)) >= 15


@pytest.mark.usefixtures("small_parts")
def test_small_files_are_whole_beside_large_ones(tmp_path: Path):
    small, large = save_text(tmp_path / "small.txt", 500), numbered(tmp_path / "large.txt", 9999, "line {}")
    documents, sources = read_texts((str(small), str(large)), 0)
    assert documents[0] == small.read_text()
    assert sum(map(len, documents)) == pytest.approx(3200, rel=0.3)
    assert [source.name for source in sources] == ["small.txt", "large.txt"]


@pytest.mark.usefixtures("small_parts")
def test_of_a_folder_of_many_files_as_many_are_read_as_are_needed(tmp_path: Path):
    for number in range(200):
        save_text(tmp_path / f"{number:03}.txt", 100)
    documents, sources = read_texts((str(tmp_path),), 0)
    assert [source.name for source in sources] == [f"{number:03}.txt" for number in range(0, 200, 6)]
    assert sum(map(len, documents)) == pytest.approx(3200, rel=0.1)


def test_a_document_is_never_larger_than_the_tokenizer_should_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(text_formats, "_LONGEST_DOCUMENT", 1000)
    path = numbered(tmp_path / "t", 500, "line {}")
    documents = read(path)
    assert "".join(documents) == path.read_text()
    assert max(map(len, documents)) <= 1010
    (tmp_path / "t").write_text(json.dumps({"text": "x" * 2500}))
    assert [len(text) for text in read(tmp_path / "t")] == [1000, 1000, 500]


def test_texts_up_to_a_mebibyte_give_the_samples_that_they_always_gave(tmp_path: Path):
    """Shipped tables were made from such: thresholds can be made again from the texts that they name."""
    path = save_text(tmp_path / "t.txt", 1 << 20)
    tokenizer = byte_tokenizer()
    stream = tokenizer(path.read_text())["input_ids"]
    found = cut_sequences(tokenizer, read(path), 2, 1000)
    assert found.calibration == [stream[:1000], stream[-2000:-1000]]
    assert found.held_back == stream[-1000:]
