"""Calibrations that can't be done, and ones that were killed: what is said, and what is taken up again."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import SMALL, save_model, save_text
from transformers import LlamaConfig

from topt_vllm.calibration import collect as collect_module
from topt_vllm.calibration.calibrate import calibrate, prepare
from topt_vllm.calibration.options import CalibrationError, CalibrationOptions
from topt_vllm.calibration.partial import Partial
from topt_vllm.cli.main import main
from topt_vllm.replay.model import check_device
from topt_vllm.replay.options import ReplayError
from topt_vllm.table.file import dump, dumps

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny model with a text."""
    save_text(save_model(tmp_path, LlamaConfig(**SMALL)) / "text.txt", 3300)
    return tmp_path


def options(folder: Path, **changes: object) -> CalibrationOptions:
    given = {"num_samples": 2, "max_seq_length": 600, "ks": (16,), "device": "cpu"} | changes
    return CalibrationOptions(str(folder), (str(folder / "text.txt"),), output=folder / "out.yaml", **given)


def test_tokenizer_of_another_model(folder):
    transformers.AutoModelForCausalLM.from_config(LlamaConfig(**SMALL | {"vocab_size": 90})).save_pretrained(
        folder
    )
    with pytest.raises(
        CalibrationError, match=r"makes token \d+, but the model has 90 tokens.*another model"
    ):
        prepare(options(folder))


def test_weights_that_make_dense_attention_fail(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = math.nan
    model.save_pretrained(folder)
    with pytest.raises(ReplayError, match="dense attention predicts the held-back text with a loss of nan"):
        calibrate(prepare(options(folder)))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: you tried"),
    ],
)
def test_out_of_memory_names_remedies(folder, monkeypatch, error):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(collect_module, "kth_scores", fail)
    with pytest.raises(CalibrationError, match=r"out of memory with sequences of 600 tokens.*--resume"):
        calibrate(prepare(options(folder)))


@pytest.mark.parametrize("command", ["calibrate", "evaluate"])
def test_a_model_that_is_too_large_names_remedies(folder, monkeypatch, capsys, command):
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    module = {"calibrate": "calibration.calibrate", "evaluate": "evaluation.run"}[command]
    dump(calibrate(prepare(options(folder))), folder / "out.yaml")
    monkeypatch.setattr(f"topt_vllm.{module}.load_causal_lm", fail)
    more = {
        "calibrate": ["--num-samples", "2", "--force", "--output", str(folder / "out.yaml")],
        "evaluate": [
            "--thresholds",
            str(folder / "out.yaml"),
            "--rules",
            "toptheta",
            "--rows",
            "--budget",
            "16",
        ],
    }
    arguments = [command, "--model", str(folder), "--dataset", str(folder / "text.txt")]
    assert main([*arguments, "--max-seq-length", "600", "--device", "cpu", *more[command]]) == 2
    said = capsys.readouterr().err
    assert "out of memory with sequences of 600 tokens" in said
    assert "--device auto" in said


def test_other_errors_are_not_taken_for_memory(folder, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(collect_module, "kth_scores", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        calibrate(prepare(options(folder)))


_KILLED = """
import sys, time
from pathlib import Path
from topt_vllm.calibration import partial
from topt_vllm.calibration.calibrate import calibrate, prepare
from topt_vllm.calibration.options import CalibrationOptions
folder, last = Path(sys.argv[1]), sys.argv[2]
save = partial.Partial.save
def save_and_wait(self, name, result):
    save(self, name, result)
    if name == last:
        print("saved", flush=True)
        time.sleep(600)
partial.Partial.save = save_and_wait
given = dict(num_samples=2, max_seq_length=600, ks=(16,), device="cpu", budget="auto", target_rows=(30.0,))
given["output"] = folder / "out.yaml"
calibrate(prepare(CalibrationOptions(str(folder), (str(folder / "text.txt"),), **given)))
"""


@pytest.mark.parametrize("last", ["sequence-0000", "sensitivity-0001"])
def test_killed_run_goes_on_and_gives_the_same_table(folder, monkeypatch, last):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    asked = options(folder, budget="auto", target_rows=(30.0,))
    whole = dumps(calibrate(prepare(asked)))
    assert not (folder / "out.yaml.partial").exists()

    with subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(folder), last], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"saved\n"
        os.kill(process.pid, signal.SIGKILL)
    left = {path.stem for path in (folder / "out.yaml.partial").iterdir()}
    assert last in left

    looked_at = []
    original = collect_module.kth_scores
    monkeypatch.setattr(
        collect_module,
        "kth_scores",
        lambda call, *rest: looked_at.append(call.layer) or original(call, *rest),
    )
    resumed = calibrate(prepare(options(folder, budget="auto", target_rows=(30.0,), resume=True)))
    assert dumps(resumed) == whole
    assert len(looked_at) == (3 if last == "sequence-0000" else 0)
    assert not (folder / "out.yaml.partial").exists()


@pytest.fixture
def killed(folder, monkeypatch) -> None:
    """What a run leaves that ended at once."""

    def fail(*_: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(collect_module, "kth_scores", fail)
        with pytest.raises(RuntimeError, match="killed"):
            calibrate(prepare(options(folder)))


@pytest.mark.parametrize("kept", [0, 100, -1])
@pytest.mark.usefixtures("killed")
def test_a_damaged_result_is_made_anew(folder, kept):
    """As a disk leaves it that was full, or a machine that lost power."""
    partial = Partial(prepare(options(folder, resume=True)))
    partial.save("result", {"numbers": torch.ones(100)})
    assert partial.load("result") is not None
    path = partial.folder / "result.pt"
    path.write_bytes(path.read_bytes()[:kept])
    assert partial.load("result") is None


@pytest.mark.usefixtures("killed")
def test_what_the_same_run_found_is_not_thrown_away_unasked(folder):
    partial = Partial(prepare(options(folder, resume=True)))
    partial.save("result", torch.ones(1))
    with pytest.raises(
        CalibrationError, match=r"out.yaml.partial has what .* add --resume to go on .* or remove"
    ):
        calibrate(prepare(options(folder)))
    assert partial.load("result") is not None
    calibrate(prepare(options(folder, seed=5)))


@pytest.mark.usefixtures("killed")
def test_resume_refuses_what_other_weights_left(folder):
    os.utime(folder / "model.safetensors", ns=(1, 1))
    with pytest.raises(CalibrationError, match=r"out.yaml.partial was left by a run with another model"):
        calibrate(prepare(options(folder, resume=True)))


@pytest.mark.usefixtures("killed")
def test_resume_refuses_what_another_run_left_meanwhile(folder):
    """Which had the folder while this one loaded its model."""
    resumed = Partial(prepare(options(folder, resume=True)))
    (folder / "out.yaml.partial" / "digest").write_text("another's")
    with pytest.raises(CalibrationError, match="was left by a run with another"), resumed.held():
        pass


@pytest.mark.usefixtures("killed")
def test_resume_refuses_what_other_options_left(folder):
    with pytest.raises(CalibrationError, match=r"out.yaml.partial was left by .*, or remove that folder"):
        calibrate(prepare(options(folder, seed=5, resume=True)))
    # Without --resume it starts over.
    assert calibrate(prepare(options(folder, seed=5))).budgets[0].quality is not None


def test_all_gpus_need_a_package_of_their_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("topt_vllm.replay.model.find_spec", lambda name: None)
    with pytest.raises(ReplayError, match="--device auto needs the package accelerate"):
        check_device("auto")
