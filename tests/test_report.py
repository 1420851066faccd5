"""``topt-vllm report``: what the page says, what it refuses, and how it looks in a browser."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, chromium
from report_inputs import OF_TINY, decoded, evaluated, needles, served, task
from table_factory import make_identity, make_table

from topt_vllm.cli.main import main
from topt_vllm.report.loss_plot import Point, Series, draw, symbol
from topt_vllm.report.svg import Scale
from topt_vllm.table.file import dump
from topt_vllm.table.schema import ThresholdTable

ATTACK = '</title><script>alert("x")</script><img src=x onerror=alert(1)>\'&\u202e'


def richer(table: ThresholdTable, **changes: Any) -> ThresholdTable:
    """The table with a quality that has every key."""
    known = {
        "rows": 256,
        "loss_pct": 0.62,
        "kl": 0.0089,
        "agreement": 0.953,
        "layer_rows_read": [1.0, 0.2, 0.05],
    }
    budgets = []
    for budget in table.budgets:
        assert budget.quality is not None
        quality = budget.quality.model_copy(update=known)
        budgets.append(budget.model_copy(update={"quality": quality} | changes))
    return table.model_copy(update={"budgets": budgets})


def write(folder: Path, name: str, content: Any) -> str:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def report(folder: Path, *more: str) -> int:
    return main(["report", str(folder / "t.yaml"), *more, "-o", str(folder / "r.html")])


def page(folder: Path) -> str:
    return (folder / "r.html").read_text(encoding="utf-8")


class Texts(HTMLParser):
    """What a page shows, and its elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.shown: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        # One line of words, whatever spaces are used.
        self.all = " ".join(" ".join(self.shown).replace("\u202f", "").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.shown.append(data)

    def attributes(self, tag: str, name: str) -> list[str | None]:
        return [attributes.get(name) for element, attributes in self.elements if element == tag]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A table and every kind of file."""
    dump(richer(make_table()), tmp_path / "t.yaml")
    records = [
        evaluated("toptheta", 0.25),
        evaluated("topk", 1.95),
        evaluated("sparsev", 7.5, loss_pct_se=float("nan")),
        evaluated("toptheta", -0.05, None),
        needles(),
        task(1024, 0.6, 0.7),
        task(2048, 0.1, 0.2) | {"loss_pct_se": None},
    ]
    write(tmp_path, "e.json", records)
    write(tmp_path, "b.json", [decoded(), decoded(keep_target=1.0, v_rows_read=1.0, ratio_keep_all=1)])
    write(tmp_path, "s.json", served())
    return tmp_path


def everything(folder: Path) -> tuple[str, ...]:
    return "--evaluation", str(folder / "e.json"), "--bench", str(folder / "b.json"), str(folder / "s.json")


def test_the_page_says_what_the_files_say(folder, capsys):
    assert report(folder, *everything(folder)) == 0
    assert capsys.readouterr().out.startswith(f"wrote {folder / 'r.html'}")
    texts = Texts(page(folder))
    for part in (
        "tiny (LlamaForCausalLM)",
        make_identity().fingerprint,
        "play.txt",
        "2026-01-31 by topt-vllm 0, torch 2",
        "256, 512, 1024 tokens",
        "k=64, k=128; the default is k=128",
        "reads 25.0 % of V rows, loses +0.62 % of perplexity, keeps 95.3 %",
        "layer 0 reads the most, 100.0 %",
        "toptheta loses +0.25 ± 0.31 % at 10.2 %, and the best other rule, topk, +1.95 ± 0.31 % at 10.2 %",
        "−0.05 ± 0.31 %",
        "toptheta with k=64 retrieves 3 of 4 facts, dense attention 4 of 4",
        "◐ +3.2",
        "○ −1.8",
        "● +9.5",
        "toptheta with k=64: 1 of 2 cases are judged by exact answers, 60 % there, dense attention 70 %",
        "multikey 1024 toptheta k=64 10.2 % 60 % 70 % −0.75 −0.50 exact",
        "multikey 2048 toptheta k=64 10.2 % 10 % 20 % −0.75 −0.50 lead",
        "1.221 (1.200 to 1.300)",
        "(1 measured) are 3.39× as fast as vLLM's own kernel: 1.88× from the kernel, 1.80× from skipping",
        '8 × 7000 + 128 tokens {"k": 64} 90.6 31.8 2.85×',
        "abacus",
        "topt-vllm evaluate --model tiny",
    ):
        assert part in texts.all, part
    assert "nan" not in texts.all
    assert "yet. With" not in texts.all


def test_k_screens_are_told_apart(folder):
    screened = {"k_screen": "int4", "candidates": 0.1231, "kv_bytes_read": 0.1757}
    plain = {"k_screen": "off", "candidates": 1.0, "kv_bytes_read": 0.5511}
    records = [evaluated("toptheta", 0.25, **plain), evaluated("toptheta", 0.27, **screened)]
    grids = [needles() | plain, needles() | screened]
    write(folder, "e.json", [*records, evaluated("topk", 1.95), *grids])
    assert report(folder, *everything(folder)) == 0
    texts = Texts(page(folder))
    for part in (
        "toptheta, K screen int4 10 % of V rows 10.2 % 12.3 % 17.6 % +0.27 ± 0.31 %",
        "toptheta 10 % of V rows 10.2 % 100.0 % 55.1 % +0.25 ± 0.31 %",
        "topk 10 % of V rows 10.2 % – – +1.95 ± 0.31 %",
        "toptheta loses +0.25 ± 0.31 % at 10.2 %, and the best other rule, topk",
        "toptheta, K screen int4, k=64",
    ):
        assert part in texts.all.replace("\u00a0", " "), part


def test_more_rules_than_colours_look_different():
    looks = [str(symbol(0, 0, style, "dot")) for style in range(12)]
    assert len(set(looks)) == len(looks)
    drawn = str(draw([Series(style, [Point(1, 1)], True) for style in range(12)], "twelve"))
    assert set(re.findall(r"\bs\d+", drawn)) == {f"s{style}" for style in range(6)}


def test_every_drawing_says_what_it_shows(folder):
    assert report(folder, *everything(folder)) == 0
    texts = Texts(page(folder))
    drawings = [attributes for element, attributes in texts.elements if element == "svg"]
    labels = [str(found["aria-label"]) for found in drawings if found.get("role") == "img"]
    # Two maps, two curves, the table's budgets, the text, the bars.
    assert len(labels) == 7
    assert all(re.search(r"\d", label) for label in labels)
    # The rest are symbols of legends.
    assert all("aria-hidden" in found for found in drawings if found.get("role") != "img")
    headings = [element for element, _ in texts.elements if element in ("h1", "h2", "h3")]
    assert headings.count("h1") == 1
    assert all(int(after[1]) <= int(before[1]) + 1 for before, after in pairwise(headings))


def test_a_table_alone_says_how_to_get_the_rest(tmp_path):
    dump(make_table(), tmp_path / "t.yaml")
    assert report(tmp_path) == 0
    texts = Texts(page(tmp_path)).all
    for command in (
        "topt-vllm evaluate --model MODEL_FOLDER --dataset TEXT.txt --rows 0.05 0.1 0.2 --budget 128 --json E.json",
        "topt-vllm evaluate --model MODEL_FOLDER --dataset TEXT.txt --needles 1024 4096 --budget 128 --json E.json",
        "topt-vllm evaluate --model MODEL_FOLDER --dataset TEXT.txt --tasks multikey --budget 128 --json E.json",
        "topt-vllm bench decode",
        "topt-vllm bench serve",
    ):
        assert command in texts


def test_a_table_without_quality_or_sparse_layers(tmp_path):
    bare = make_table(dense_layers=(0, 2))
    budgets = [budget.model_copy(update={"quality": None}) for budget in bare.budgets]
    dump(bare.model_copy(update={"budgets": budgets}), tmp_path / "t.yaml")
    assert report(tmp_path) == 0
    texts = Texts(page(tmp_path)).all
    assert "was not measured" in texts
    assert "This table doesn't say which layers read how much" in texts
    assert "All layers of budget k=128 are dense." in texts


@pytest.mark.slow
def test_a_large_model_takes_few_bytes(tmp_path):
    identity = make_identity(num_layers=80, num_query_heads=64, num_kv_heads=8, sliding_window_layers=[])
    dump(make_table(identity), tmp_path / "t.yaml")
    assert report(tmp_path) == 0
    cells = 2 * 80 * 64
    assert len(page(tmp_path)) < 50 * cells


ODD = {
    "every row read": {"v_rows_read": 1.0, "layer_rows_read": [1.0, 1.0, 1.0], "loss_pct": 0.0},
    "none read": {"v_rows_read": 0.0, "layer_rows_read": [0.0, 0.0, 0.0], "loss_pct": 1e308, "rows": 0},
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
def test_any_quality_that_loads_is_shown(tmp_path, odd):
    table = richer(make_table(ks=(64,)))
    quality = table.budgets[0].quality
    assert quality is not None
    budget = table.budgets[0].model_copy(update={"quality": quality.model_copy(update=odd)})
    dump(table.model_copy(update={"budgets": [budget]}), tmp_path / "t.yaml")
    assert report(tmp_path) == 0


def test_the_same_files_give_the_same_page(folder):
    assert report(folder, *everything(folder)) == 0
    first = page(folder)
    assert report(folder, *everything(folder), "--force") == 0
    assert page(folder) == first


def test_what_files_say_is_never_markup(tmp_path):
    name = "'; $(reboot) <script>'"
    table = richer(
        make_table(make_identity(id=ATTACK, revision=ATTACK, architecture=ATTACK), ks=(64,)),
        k=None,
        name=name,
    )
    origin = table.calibration.model_copy(
        update={
            "data": [table.calibration.data[0].model_copy(update={"name": ATTACK})],
            "options": {ATTACK: ATTACK},
        }
    )
    dump(table.model_copy(update={"calibration": origin}), tmp_path / "t.yaml")
    origin_of_records = {key: ATTACK if isinstance(value, str) else value for key, value in OF_TINY.items()}
    origin_of_records["fingerprint"] = make_identity().fingerprint
    changes: dict[str, Any] = {"text": ATTACK, "provenance": origin_of_records}
    records = [evaluated(ATTACK, 1.0, **changes), evaluated("toptheta", 1.0, None, k=ATTACK, **changes)]
    evaluation = write(tmp_path, "<b>.json", records)
    case = decoded(
        k=ATTACK, platform=ATTACK, k_screen=ATTACK, cache_dtype=ATTACK, provenance=origin_of_records
    )
    engine = served(provenance=origin_of_records)
    engine["settings"] = engine["settings"] | {"toptheta": {ATTACK: ATTACK}, "platform_backend": ATTACK}
    bench = [write(tmp_path, "b.json", [case]), write(tmp_path, "s.json", engine)]
    assert report(tmp_path, "--evaluation", evaluation, "--bench", *bench) == 0
    texts = Texts(page(tmp_path))
    assert {"script", "img", "b"}.isdisjoint(element for element, _ in texts.elements)
    assert not any(name.startswith("on") for _, attributes in texts.elements for name in attributes)
    assert 'alert("x")' in texts.all
    # A name that a shell would run is quoted where it stands in a command to paste.
    assert "--budget ''\"'\"'; $(reboot) <script>'\"'\"''" in texts.all


def test_the_page_refers_to_nothing_outside(folder):
    assert report(folder, *everything(folder)) == 0
    texts = Texts(page(folder))
    links = [
        value for name in ("href", "src") for tag, a in texts.elements if (value := a.get(name)) is not None
    ]
    assert links
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert not re.search(r"url\(|@import|https?:", page(folder))


def other_model() -> dict[str, Any]:
    return OF_TINY | {"model": "huge", "fingerprint": "sha256:" + "1" * 64}


REFUSED: dict[str, tuple[str, Any, str]] = {
    "no JSON": ("--evaluation", "{oops", "in.json: not JSON"),
    "deep": ("--evaluation", "[" * 100_000, "in.json: not JSON"),
    "long number": ("--evaluation", "[" + "9" * 5000 + "]", "in.json: not JSON"),
    "empty": (
        "--evaluation",
        [],
        "holds no records; --evaluation takes what `topt-vllm evaluate --json` writes",
    ),
    "a bench for an evaluation": ("--evaluation", [decoded()], "in.json: [0].text: missing key"),
    "an evaluation for a bench": ("--bench", [evaluated("topk", 1.0)], "in.json: [0].batch: missing key"),
    "another bench": ("--bench", {"rows": 3}, "in.json: platform: missing key"),
    "not finite": (
        "--evaluation",
        [evaluated("topk", float("inf"))],
        "[0].loss_pct: Input should be a finite number",
    ),
    "no time": ("--bench", [decoded(ms=0)], "[0].ms: Input should be greater than 0"),
    "no ratio": ("--bench", [decoded(ratio_keep_all=5e-324)], "[0].ratio_keep_all: Input should be greater"),
    "more than all": ("--evaluation", [evaluated("topk", 1.0, v_rows_read=1.5)], "[0].v_rows_read: "),
    "half a character": ("--evaluation", [evaluated("\ud800", 1.0)], "in.json: not JSON"),
    "evaluation of another model": (
        "--evaluation",
        [evaluated("topk", 1.0, provenance=other_model())],
        "in.json is about another model: 'huge'",
    ),
    "replay of another model": (
        "--bench",
        [decoded(model="huge", fingerprint=other_model()["fingerprint"])],
        "in.json is about another model: 'huge'",
    ),
}


@pytest.mark.parametrize(("option", "content", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_file_is_refused(folder, capsys, option, content, message):
    (folder / "r.html").write_text("mine", encoding="utf-8")
    assert report(folder, option, write(folder, "in.json", content), "--force") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("topt-vllm: error: ")
    assert captured.err.count("\n") == 1
    assert len(captured.err) < 1000
    assert message in captured.err
    assert page(folder) == "mine"


def test_missing_files_and_devices_are_refused(folder, capsys):
    for path in ("none.json", ".", "/dev/zero"):
        assert report(folder, "--bench", str(folder / path)) == 2
        assert capsys.readouterr().err.startswith("topt-vllm: error: ")
    assert main(["report", str(folder / "none.yaml"), "-o", str(folder / "r.html")]) == 2
    assert "can't be read" in capsys.readouterr().err
    assert main(["report", str(folder / "t.yaml"), "-o", str(folder / "no" / "r.html")]) == 2
    assert f"the folder {folder / 'no'} does not exist" in capsys.readouterr().err
    assert main(["report", str(folder / "t.yaml"), "-o", str(folder)]) == 2
    assert "is a folder, a device or a pipe; name a file" in capsys.readouterr().err
    assert not (folder / "r.html").exists()


def test_an_existing_page_stays_without_force(folder, capsys):
    (folder / "r.html").write_text("mine", encoding="utf-8")
    assert report(folder) == 2
    assert (
        "r.html exists; name another file, or give --force where the command has it"
        in capsys.readouterr().err
    )
    assert page(folder) == "mine"
    assert main(["report", str(folder / "t.yaml"), "-o", str(folder / "t.yaml"), "--force"]) == 2
    assert "t.yaml is read for the report; name another file for the page" in capsys.readouterr().err
    assert report(folder, "--force") == 0
    assert page(folder).startswith("<!DOCTYPE html>")


def test_files_that_may_not_belong_together_are_noted(folder):
    older = {
        key: value for key, value in OF_TINY.items() if key not in ("model", "fingerprint", "table_sha256")
    }
    old = write(folder, "old.json", [evaluated("topk", 1.0, provenance=older)])
    engine = served()
    engine["settings"] = engine["settings"] | {"model": "/models/other"}
    assert (
        report(
            folder, "--evaluation", old, str(folder / "e.json"), "--bench", write(folder, "s.json", engine)
        )
        == 0
    )
    texts = Texts(page(folder)).all
    assert "old.json doesn't say which model it evaluates" in texts
    assert "s.json served /models/other; whether that is the table's model isn't known." in texts
    assert "e.json was evaluated with another table file of the same model, t.yaml" in texts


def luminance(colour: str) -> float:
    """Relative luminance as WCAG defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_have_contrast():
    style = (Path(__file__).parent.parent / "topt_vllm" / "report" / "style.css").read_text(encoding="utf-8")
    palettes = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in style.split("@media")[:2]]
    for colours in palettes:
        for ground in ("back", "box"):
            assert min(contrast(colours[name], colours[ground]) for name in ("text", "soft", "link")) >= 4.5
        assert min(contrast(colours["text"], colours[name]) for name in ("hit", "near", "miss")) >= 4.5
        assert min(contrast(colours[f"s{style}"], colours["back"]) for style in range(6)) >= 3


def test_ticks_are_round_apart_and_inside():
    assert Scale(0, 10, 0, 100).ticks(20) == [0, 2, 5, 10]
    assert Scale(-0.3, 0.4, 0, 70).ticks(18) == [-0.2, 0, 0.2]
    assert Scale(7.0, 7.0 + 1e-9, 0, 100).ticks(20) == []


# Elements whose content is cut off or that reach out of the page, apart from boxes that scroll by themselves.
_OVERFLOWING = """[...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll") &&
  e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.outerHTML.slice(0, 200))"""
_LAYOUT = "[document.documentElement.scrollWidth, window.innerWidth]"
_OPEN_ALL = "document.querySelectorAll('details').forEach(d => d.open = true)"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed (Debian: apt-get install chromium)")
def test_a_browser_shows_it_without_complaint(folder):
    long = write(folder, "long.json", [evaluated("topk", 1.0, text="w" * 300), evaluated("x" * 300, 1e9)])
    assert report(folder, *everything(folder), "--evaluation", long) == 0
    backgrounds = set()
    with chromium(folder) as browser:
        for width, dark in ((360, False), (360, True), (1280, True)):
            browser.open(folder / "r.html", width, dark)
            browser.value(_OPEN_ALL)
            scrolled, shown = browser.value(_LAYOUT)
            assert scrolled <= shown == width
            assert browser.value(_OVERFLOWING) == []
            requested = [event["request"]["url"] for event in browser.happened("Network.requestWillBeSent")]
            assert requested == [(folder / "r.html").as_uri()]
            for complaint in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
                assert browser.happened(complaint) == []
            backgrounds.add((dark, browser.value("getComputedStyle(document.body).backgroundColor")))
    assert len(backgrounds) == 2
