"""``topt-vllm``: what it prints, what it refuses, and how."""

import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from table_factory import make_identity, make_key_statistics, make_table
from tiny_models import SMALL, save_model, save_text
from transformers import LlamaConfig

from topt_vllm.cli.examples import EXAMPLES
from topt_vllm.cli.main import build_parser, main
from topt_vllm.config import TopThetaConfig
from topt_vllm.replay.model import examine
from topt_vllm.table.command import calibrate_command, default_output, serve_command
from topt_vllm.table.file import dump, load
from topt_vllm.table.schema import ThresholdTableError
from topt_vllm.table.search import find_table
from topt_vllm.table.words import name_of_model
from topt_vllm.verify.plan import read_model
from topt_vllm.verify.run import verify


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model and a text of 4000 tokens."""
    path = tmp_path_factory.mktemp("cli")
    save_model(path / "model", LlamaConfig(**SMALL))
    save_text(path / "text.txt", 4000)
    return path


def calibrate(folder: Path, *extra: str, output: str = "out.yaml", model: str = "model") -> list[str]:
    """A command line that works, with changes."""
    return shlex.split(
        f"calibrate --model {folder / model} --dataset {folder / 'text.txt'} --output {folder / output} "
        f"--num-samples 2 --max-seq-length 512 --k 16 {shlex.join(extra)}"
    )


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=120,
    )


def test_help_needs_nothing_heavy():
    code = (
        "import sys\nfrom topt_vllm.cli.main import main\ntry:\n    main(['--help'])\n"
        "except SystemExit:\n    print({'torch', 'transformers', 'vllm', 'triton'} & set(sys.modules))"
    )
    result = run("-c", code)
    assert result.stdout.endswith("set()\n"), result.stderr
    assert "calibrate" in result.stdout
    assert "inspect" in result.stdout


EVERY_EXAMPLE = [f"{command} {example}" for command, examples in EXAMPLES.items() for example in examples]


@pytest.mark.parametrize("example", EVERY_EXAMPLE)
def test_examples_of_the_help_are_command_lines(example: str):
    assert callable(build_parser().parse_args(shlex.split(example)).run)


def test_every_command_has_examples(capsys):
    for command in EXAMPLES:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        assert f"  topt-vllm {command} {EXAMPLES[command][0]}" in capsys.readouterr().out


def test_package_import_is_light():
    code = "import sys, topt_vllm; print({'torch', 'transformers', 'vllm', 'triton', 'numpy'} & set(sys.modules))"
    assert run("-c", code).stdout == "set()\n"


@pytest.mark.slow
@pytest.mark.parametrize("script", [["-m", "topt_vllm.cli.main", "calibrate"], ["scripts/calibrate.py"]])
def test_user_error_is_one_line_and_status_2(tmp_path, script):
    arguments = shlex.split(f"--model {tmp_path / 'none'} --dataset x.txt --output {tmp_path / 'o.yaml'}")
    root = Path(__file__).parent.parent
    script = [str(root / part) if part.endswith(".py") else part for part in script]
    result = run(*script, *arguments, HF_HUB_OFFLINE="1")
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("topt-vllm: error: --model ")


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Runs a command that must fail as the user's fault; returns its message."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("topt-vllm: error: ")
    return captured.err


REFUSED = {
    "no samples": (["--num-samples", "0"], "--num-samples is 0"),
    "k of zero": (["--k", "0", "16"], "--k is [0, 16]"),
    "k twice": (["--k", "16", "16"], "--k is [16, 16]"),
    "k too large": (["--k", "300"], "--k 300 needs sequences of more than 1024 tokens"),
    "context too short": (["--max-seq-length", "4096"], "is 4096, but the model's context is 2048"),
    "text too short": (
        ["--num-samples", "7"],
        "the text has 4000 tokens, and sequences of 512 tokens need 4096: 7 and 1 held back. Add text",
    ),
    "text too short to tune": (
        ["--num-samples", "6", "--budget", "auto"],
        "sequences of 512 tokens need 4608: 6, 2 more to tune on and 1 held back. Add text",
    ),
    "no such layer": (
        ["--dense-layers", "0", "9"],
        "[9] are not layers that get thresholds; those are 0 to 2",
    ),
    "all layers dense": (["--dense-layers", "0", "1", "2"], "nothing would be sparse"),
    "no such text": (["--dataset", "missing.txt"], "--dataset missing.txt: no such file"),
    "no such device": (["--device", "cuda:77"], "--device cuda:77 can't be used here"),
    "nonsense device": (
        ["--device", "gpu"],
        "--device gpu can't be used here: no such device; name cpu, cuda",
    ),
    "seed beyond torch's": (["--seed", str(1 << 63)], "its size must be below 2^62"),
    "no such folder": (["--output", "/nowhere/t.yaml"], "the folder /nowhere does not exist"),
}


@pytest.mark.parametrize(("extra", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_option_is_refused_before_the_weights(folder, capsys, monkeypatch, extra, message):
    monkeypatch.setattr("topt_vllm.calibration.calibrate.load_causal_lm", pytest.fail)
    assert message in refused(capsys, calibrate(folder, *extra))
    assert not (folder / "out.yaml").exists()


def test_hub_dataset_without_the_library(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refused(capsys, calibrate(folder, "--dataset", "some/dataset"))


def test_hub_dataset(folder, capsys, monkeypatch):
    """The library's own streaming call, with as many records as are needed and no more."""
    asked: list[object] = []

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        asked.append((name, config, split, streaming))
        for count in itertools.count():
            asked[1:] = [count]
            yield {"text": "some words " * 100}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert main(calibrate(folder, "--dry-run", "--dataset", "org/name:part:test")) == 0
    assert "org/name:part:test" in capsys.readouterr().out
    assert asked[0] == ("org/name", "part", "test", True)
    assert asked[1] < 100


def test_hub_dataset_without_texts(folder, capsys, monkeypatch):
    records = SimpleNamespace(load_dataset=lambda *_, **__: [{"question": "q", "answer": "a"}])
    monkeypatch.setitem(sys.modules, "datasets", records)
    message = refused(capsys, calibrate(folder, "--dataset", "org/name"))
    assert '--dataset org/name: records have no string "text", only question, answer' in message


def test_existing_table_is_refused_at_once(folder, capsys):
    (folder / "mine.yaml").write_text("mine", encoding="utf-8")
    message = refused(capsys, calibrate(folder, output="mine.yaml"))
    assert "mine.yaml exists; name another file, or give --force" in message
    assert (folder / "mine.yaml").read_text(encoding="utf-8") == "mine"


def test_a_text_is_no_place_for_the_table(folder, capsys):
    text = (folder / "text.txt").read_text()
    message = refused(capsys, calibrate(folder, "--force", output="text.txt"))
    assert "text.txt is a text of --dataset; name another file" in message
    assert (folder / "text.txt").read_text() == text


def test_output_that_nobody_reads_any_more_is_no_error(monkeypatch):
    """As of `topt-vllm bench decode | head -1`, where modes turn errors of the system into the user's."""

    def print_into_a_closed_pipe(_: object) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    # It is closed, so that Python's own flush at exit doesn't complain.
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr("topt_vllm.cli.bench_decode._run", print_into_a_closed_pipe)
    assert main(["bench", "decode"]) == 141


def test_dry_run_writes_nothing(folder, capsys, monkeypatch):
    monkeypatch.setattr("topt_vllm.calibration.calibrate.load_causal_lm", pytest.fail)
    assert main(calibrate(folder, "--dry-run", "--k", "32", "16")) == 0
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert printed["k"] == "16, 32"
    assert printed["lengths"] == "256, 512"
    assert printed["dense"] == "layers  layer 0"
    assert printed["sequences"] == "2 and 1 held back, of 512 tokens"
    assert not (folder / "out.yaml").exists()


def test_calibrate_ends_with_quality_and_the_command_to_serve(folder, capsys):
    assert main(calibrate(folder, "--k", "16", "32", output="done.yaml")) == 0
    out = capsys.readouterr().out
    assert "kept/k p5" in out
    assert "V rows read" in out
    assert "vllm serve" in out
    assert "--attention-backend TOPTHETA" in out
    assert str(folder / "done.yaml") in out
    table = load(folder / "done.yaml")
    assert [budget.k for budget in table.budgets] == [16, 32]
    assert table.calibration.data[0].name == "text.txt"


def test_calibrate_warns_of_a_table_that_skips_nothing(tmp_path, capsys):
    """Of a single layer, which is dense by default."""
    save_model(tmp_path / "model", LlamaConfig(**SMALL | {"num_hidden_layers": 1}))
    save_text(tmp_path / "text.txt", 1300)
    sizes = ("--num-samples", "1", "--max-seq-length", "300", "--k", "16")
    assert main(calibrate(tmp_path, *sizes)) == 0
    assert "warning: nothing is skipped with budget 16: all layers" in capsys.readouterr().err
    assert main(calibrate(tmp_path, *sizes, "--force", "--dense-layers")) == 0
    assert "warning" not in capsys.readouterr().err


def test_code_that_comes_with_a_model_is_run_where_it_is_asked_for(tmp_path, capsys):
    """By every command that loads a model."""
    config = {"model_type": "unheard-of", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "own.py").write_text("raise ValueError('it was run')", encoding="utf-8")
    text = save_text(tmp_path / "text.txt", 100)
    model = ["--model", str(tmp_path)]
    given = [*model, "--dataset", str(text)]
    for command in (
        ["calibrate", *given],
        ["calibrate", *given, "--k-screen-only"],
        ["evaluate", *given, "--rows", "0.1"],
        ["bench", "capture", *given, "--output", str(tmp_path / "cache")],
        ["bench", "serve", *given],
        ["bench", "engine", *model],
    ):
        assert main(command) == 2
        assert "it comes with code of its own; add --trust-remote-code" in capsys.readouterr().err
        assert main([*command, "--trust-remote-code"]) == 2
        assert "it was run" in capsys.readouterr().err
    (check,) = (c for c in verify(str(tmp_path), "none", run=pytest.fail) if c.name == "table")
    assert "add --trust-remote-code" in check.detail
    found = verify(str(tmp_path), "none", run=pytest.fail, trust_remote_code=True)
    assert "it was run" in next(check.detail for check in found if check.name == "table")


def test_inspect(tmp_path, capsys):
    dump(make_table(), tmp_path / "t.yaml")
    assert main(["inspect", str(tmp_path / "t.yaml"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"]["num_query_heads"] == 4
    assert facts["lengths"] == [256, 512, 1024]
    assert [budget["k"] for budget in facts["budgets"]] == [64, 128]
    assert facts["budgets"][0]["dense_layers"] == [0]
    assert facts["budgets"][0]["quality"]["kept_over_k"] == {"p5": 0.5, "p50": 1.0, "p95": 2.0}
    assert "layers" not in facts["budgets"][0]
    assert facts["key_statistics"] is None

    assert main(["inspect", str(tmp_path / "t.yaml")]) == 0
    text = capsys.readouterr().out
    for part in ("tiny (LlamaForCausalLM)", "256, 512, 1024 tokens", "25.0%", "sliding window"):
        assert part in text
    assert "  layer 0\n" in text
    assert "K screen     no statistics of K; topt-vllm calibrate --k-screen-only adds them" in text


def test_inspect_says_what_k_screens_let_through(tmp_path, capsys):
    table = make_table()
    quality = table.budgets[1].quality.model_copy(update={"layer_candidates": [1.0, 1.0, 0.0625]})
    budgets = [table.budgets[0], table.budgets[1].model_copy(update={"quality": quality})]
    statistics = make_key_statistics(table.model).model_copy(update={"seed": 7})
    dump(table.model_copy(update={"budgets": budgets, "key_statistics": statistics}), tmp_path / "t.yaml")
    assert main(["inspect", str(tmp_path / "t.yaml")]) == 0
    text = capsys.readouterr().out
    assert "K screen     statistics of K in 2 layers, seed 7" in text
    # Layer 0 is dense, and the other budget wasn't measured.
    assert re.search("candidates at 4 bits .*\n *128 +6.2%, at most 6.2% in layer 2\n\n", text)
    assert main(["inspect", str(tmp_path / "t.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["key_statistics"] == {"seed": 7, "layers": [0, 2]}


def test_a_table_does_not_steer_the_terminal(tmp_path, capsys):
    dump(make_table(make_identity(id="\x1b[31mtiny\n", revision="\x9b2J")), tmp_path / "t.yaml")
    assert main(["inspect", str(tmp_path / "t.yaml")]) == 0
    assert r"model        \x1b[31mtiny\n at \x9b2J (LlamaForCausalLM)" in capsys.readouterr().out
    with pytest.raises(ThresholdTableError, match=r"belongs to \\x1b\[31mtiny\\n, not to m:"):
        find_table(
            TopThetaConfig(thresholds=str(tmp_path / "t.yaml")), make_identity(num_kv_heads=4), "m", None
        )


def test_inspect_of_a_broken_table(tmp_path, capsys):
    (tmp_path / "t.yaml").write_text("schema_version: 9", encoding="utf-8")
    assert "schema_version is 9" in refused(capsys, ["inspect", str(tmp_path / "t.yaml")])
    assert "can't be read" in refused(capsys, ["inspect", str(tmp_path / "none.yaml")])


def test_a_model_has_the_name_of_its_folder_however_that_is_named(tmp_path, monkeypatch):
    save_model(tmp_path / "tiny", LlamaConfig(**SMALL))
    monkeypatch.chdir(tmp_path / "tiny")
    for path in (".", "../tiny/", str(tmp_path / "tiny")):
        assert examine(path).identity.id == read_model(path).identity.id == "tiny"
    assert name_of_model("org/name") == "name"


def test_command_lines_can_be_pasted(tmp_path):
    model = tmp_path / "my model"
    model.mkdir()
    words = shlex.split(calibrate_command(str(model)))
    assert words[:4] == ["topt-vllm", "calibrate", "--model", str(model)]
    assert default_output(str(model)) == model / "toptheta.yaml"
    assert default_output("org/name-7B") == Path("name-7B.yaml")

    found = shlex.split(serve_command(str(model), model / "toptheta.yaml"))
    assert found == ["vllm", "serve", str(model), "--attention-backend", "TOPTHETA"]
    named = shlex.split(serve_command(str(model), tmp_path / "it's.yaml"))
    assert json.loads(named[-1]) == {"toptheta": {"thresholds": str(tmp_path / "it's.yaml")}}
