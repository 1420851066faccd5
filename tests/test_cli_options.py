"""Command line arguments that dataclasses state."""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

from topt_vllm.calibration.options import CalibrationOptions
from topt_vllm.cli.main import build_parser, main
from topt_vllm.cli.options import add_options, read_options
from topt_vllm.evaluation.options import EvaluationOptions
from topt_vllm.replay.options import REQUIRED, option


@dataclass(frozen=True)
class Options:
    name: str = option(REQUIRED, "who")
    how_many: int = option(3, "count (default %(default)s)", group="numbers")
    sizes: tuple[float, ...] = option((1.0,), "sizes", group="numbers", flag="size", convert=sorted)
    kind: Literal["a", "b"] = option("a", "kind", choices=("a", "b"))
    loud: bool = option(False, "shout", group="numbers")
    path: Path | None = option(None, "where", metavar="FILE")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="p")
    groups = add_options(made, Options)
    groups["numbers"].add_argument("--other", help="not an option")
    return made


def test_what_is_given_is_read():
    numbers = ["--how-many", "4", "--size", "3", "2", "--loud", "--other", "z"]
    given = parser().parse_args(["--name", "n", "--kind", "b", "--path", "x/y", *numbers])
    assert read_options(Options, given) == Options("n", 4, [2.0, 3.0], "b", True, Path("x/y"))


def test_what_is_not_given_is_the_fields_default():
    assert read_options(Options, parser().parse_args(["--name", "n"])) == Options("n", sizes=[1.0])


def test_fields_that_follow_from_others_are_told():
    assert read_options(Options, parser().parse_args(["--name", "n"]), path=Path("z")).path == Path("z")


@pytest.mark.parametrize("wrong", [[], ["--name", "n", "--kind", "c"], ["--name", "n", "--how-many", "x"]])
def test_what_does_not_fit_is_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(wrong)
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "--model", "m", "--dataset", "t", "--rows", "0.1", "10%"],
        ["bench", "decode", "--keep", "0.1", "10%"],
        ["bench", "engine", "--shape", "llama-8b", "--keep", "0.1", "10%"],
    ],
)
def test_shares_may_be_written_as_percentages(command: list[str]):
    given = build_parser().parse_args(command)
    assert (given.rows if command[0] == "evaluate" else given.keep) == [0.1, 0.1]


@pytest.mark.parametrize(
    "command",
    [
        ["verify", "--model", "m", "--k-screen", "int4"],
        ["evaluate", "--model", "m", "--dataset", "t"],
        ["bench", "decode"],
    ],
)
def test_a_table_without_a_name_is_refused(command: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--thresholds", ""])
    assert "error: argument --thresholds: a table is expected, got ''" in capsys.readouterr().err


def test_help_lists_groups_names_and_defaults():
    shown = " ".join(parser().format_help().split())
    assert "--name NAME who" in shown
    assert "--kind {a,b} kind" in shown
    assert "--path FILE where" in shown
    numbers = shown[shown.index("numbers:") :]
    assert (
        "--how-many HOW_MANY count (default 3) --size SIZE [SIZE ...] sizes --loud shout --other" in numbers
    )


@pytest.mark.parametrize(
    ("command", "options"), [("calibrate", CalibrationOptions), ("evaluate", EvaluationOptions)]
)
def test_commands_default_to_what_python_defaults_to(command, options):
    args = build_parser().parse_args([command, "--model", "m", "--dataset", "t"])
    known = {"output": Path("o")} if options is CalibrationOptions else {}
    assert read_options(options, args, **known) == options("m", ("t",), **known)
    assert all(field.metadata["help"] for field in fields(options))
