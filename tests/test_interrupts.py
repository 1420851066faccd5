"""Ctrl-C, SIGTERM and two runs at once: nothing half written, no process left, and a run that goes on."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import SMALL, save_model, save_text
from transformers import LlamaConfig

from topt_vllm import output as output_module
from topt_vllm.calibration import calibrate as calibrate_module
from topt_vllm.calibration.options import CalibrationError, CalibrationOptions
from topt_vllm.calibration.partial import Partial
from topt_vllm.cli.main import main
from topt_vllm.output import in_one_step, write_text
from topt_vllm.table.file import load

# What a command does at each stage, stopped there by a signal to its own process.
STAGES = (
    "replay.model.examine",
    "replay.texts.read_texts",
    "replay.model.load_causal_lm",
    "calibration.partial.Partial.save",
    "calibration.budgets.measured",
    "table.file.dumps",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a text whose path needs quotes and has letters of other scripts."""
    path = tmp_path_factory.mktemp("wörk place 温") / "it's"
    save_model(path / "model", LlamaConfig(**SMALL))
    save_text(path / "tëxt.txt", 4000)
    return path


def command(folder: Path, output: Path, *extra: str) -> list[str]:
    given = ["--model", str(folder / "model"), "--dataset", str(folder / "tëxt.txt"), "--output", str(output)]
    return ["calibrate", *given, "--num-samples", "2", "--max-seq-length", "512", "--k", "16", *extra]


def stopped_at(stage: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the stage send this process a signal, wherever the calibrator has imported it to."""
    module, _, name = stage.rpartition(".")

    def stop(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)
        pytest.fail("not stopped")

    if "Partial" in module:
        save = Partial.save
        monkeypatch.setattr(Partial, name, lambda *given: (save(*given), stop()))
        return
    for place in [loaded for key, loaded in sys.modules.items() if key.startswith("topt_vllm.")]:
        if hasattr(place, name):
            monkeypatch.setattr(place, name, stop)


@pytest.fixture
def signals_as_in_a_shell() -> Iterator[None]:
    """Tests that run in the background, or under nohup, ignore some, and so would what they start."""
    wanted = {
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
    }
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals_as_in_a_shell")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name)
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_at_any_stage_leaves_a_run_that_can_go_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, number: int
):
    output = tmp_path / "täble.yaml"
    before = signal.getsignal(number)
    with pytest.MonkeyPatch.context() as patch:
        stopped_at(stage, number, patch)
        assert main(command(folder, output)) == 128 + number
    assert signal.getsignal(number) == before
    said = capsys.readouterr().err
    assert said.endswith("topt-vllm: interrupted\n")
    later = stage in STAGES[3:]
    assert (
        "täble.yaml.partial keeps what was found; the same command with --resume goes on" in said
    ) == later
    assert [path.name for path in tmp_path.iterdir()] == (["täble.yaml.partial"] if later else [])
    if number == signal.SIGTERM:
        assert main(command(folder, output, "--resume")) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["täble.yaml"]
        assert load(output).budgets[0].k == 16


def test_a_failed_write_keeps_what_was_found(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(output_module, "_link", full)
        assert main(command(folder, tmp_path / "t.yaml")) == 2
    assert capsys.readouterr().err.endswith("topt-vllm: error: [Errno 28] No space left on device\n")
    assert [path.name for path in tmp_path.iterdir()] == ["t.yaml.partial"]
    assert main(command(folder, tmp_path / "t.yaml", "--resume")) == 0


def test_two_runs_of_one_table_do_not_mix(folder: Path, tmp_path: Path):
    options = CalibrationOptions(
        str(folder / "model"),
        (str(folder / "tëxt.txt"),),
        num_samples=1,
        max_seq_length=512,
        ks=(16,),
        output=tmp_path / "t.yaml",
    )
    plan = calibrate_module.prepare(options)
    with (
        Partial(plan).held(),
        pytest.raises(CalibrationError, match=r"partial: another calibration is making this table"),
    ):
        calibrate_module.calibrate(plan)
    assert calibrate_module.calibrate(plan).budgets


def test_a_killed_command_takes_its_engine_along(tmp_path: Path):
    """The engine is a process group of its own; nobody would end it."""
    child = tmp_path / "child.py"
    child.write_text("import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(600)\n")
    code = f"""
import signal, topt_vllm.cli.verify as verify
from topt_vllm.cli.main import main
from topt_vllm.engines.process import ask
verify.run = lambda args: ask([{str(child)!r}], {{}}, False, 600)
print("status", main(["verify", "--model", "m"]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as process:
        while not (tmp_path / "pid").exists() or not (pid := (tmp_path / "pid").read_text()):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60)[0] == "status 143\n"
    assert not Path("/proc", pid).exists()


def test_files_are_written_in_one_step_and_as_the_umask_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = os.umask(0o077)
    try:
        write_text("mine", tmp_path / "private")
        os.umask(0o022)
        write_text("ours", tmp_path / "public")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("private", "public")] == [0o600, 0o644]
    with pytest.raises(ZeroDivisionError), in_one_step(tmp_path / "half") as temporary:
        temporary.write_text("ha" * (1 // 0))
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("public", "link"):
        with pytest.raises(FileExistsError, match="exists; name another file"):
            write_text("other", tmp_path / name)
    for place in (Path("/dev/null"), tmp_path):
        with pytest.raises(FileExistsError, match="a folder, a device or a pipe"):
            write_text("other", place, force=True)

    def refuse(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    write_text("linked", tmp_path / "without links")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "private", "public", "without links"]
    assert (tmp_path / "without links").read_text() == "linked"


def test_commands_run_outside_of_the_main_thread():
    """Where nobody may handle signals."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(main(["inspect", "/nowhere.yaml"])))
    thread.start()
    thread.join()
    assert found == [2]
