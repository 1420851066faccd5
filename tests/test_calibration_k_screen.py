"""What K screens need: statistics of K from known keys, and tables to which they are added."""

import math
import shlex
from pathlib import Path

import pytest
import torch
from table_factory import make_table
from tiny_models import SMALL, save_model, save_text
from transformers import AutoConfig, Gemma3TextConfig

from topt_vllm.attention.common import KeyScreen
from topt_vllm.attention.reference import screened
from topt_vllm.calibration.calibrate import calibrate, prepare
from topt_vllm.calibration.collect import late_rows
from topt_vllm.calibration.k_screen import add_key_statistics
from topt_vllm.calibration.k_screen import prepare as prepare_screen
from topt_vllm.calibration.key_statistics import SKIPPED_TOKENS, key_statistics, key_sums
from topt_vllm.calibration.options import CalibrationError, CalibrationOptions
from topt_vllm.calibration.summary import describe
from topt_vllm.cli.main import main
from topt_vllm.replay import scores as scores_module
from topt_vllm.replay.model import load_causal_lm
from topt_vllm.replay.scores import LayerCall
from topt_vllm.replay.whole_pass import observed
from topt_vllm.table.file import dump, dumps, load
from topt_vllm.table.identity import identify
from topt_vllm.table.schema import ThresholdTable

WINDOWS = {"sliding_window": 32, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
LENGTH = 320


def call(seed: int) -> LayerCall:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(6, 40, 8, generator=generator)
    key = 5 + torch.randn(2, 40, 8, generator=generator)
    key[..., 3], query[..., 5] = 7.0, 0.0
    return LayerCall(1, query, key, key, 0.5)


def test_statistics_of_known_keys():
    calls = [call(0), call(1)]
    (layer,) = key_statistics({1: sum(key_sums(each.query, each.key) for each in calls)}, seed=0).layers
    keys = torch.cat([each.key[:, SKIPPED_TOKENS:] for each in calls], dim=1).double()
    queries = torch.cat([each.query.unflatten(0, (2, 3)).flatten(1, 2) for each in calls], dim=1).double()
    mean, variance, power = keys.mean(1), keys.var(1, correction=0), queries.square().mean(1)
    torch.testing.assert_close(torch.tensor(layer.mean).double(), mean, rtol=1e-4, atol=0)
    # A constant channel and one that the queries don't use count as a ten-thousandth of the mean.
    variance[:, 3], power[:, 5] = 1e-4 * variance.mean(-1), 1e-4 * power.mean(-1)
    expected = (variance / power) ** 0.25
    expected /= expected.log().mean(-1, keepdim=True).exp()
    torch.testing.assert_close(torch.tensor(layer.scale).double(), expected, rtol=1e-4, atol=0)
    assert all(number == float(f"{number:.5g}") for row in layer.mean + layer.scale for number in row)


def test_a_large_mean_costs_no_digits():
    narrow = call(2)
    narrow.key.mul_(1e-3).add_(300.0)
    (layer,) = key_statistics({1: key_sums(narrow.query, narrow.key)}, seed=0).layers
    one, wide = (
        torch.tensor(layer.scale),
        torch.tensor(key_statistics({1: key_sums(call(2).query, call(2).key)}, 0).layers[0].scale),
    )
    kept = [channel for channel in range(8) if channel != 3]
    # 300 is stored in steps of 3e-5.
    torch.testing.assert_close(one[:, kept], wide[:, kept], rtol=0.05, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_keys_that_are_no_numbers_name_the_layer(value):
    broken = call(0)
    broken.key[1, 9, 2] = value
    with pytest.raises(CalibrationError, match="layer 1: its keys or queries aren't finite"):
        key_statistics({1: key_sums(broken.query, broken.key)}, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = save_model(tmp_path_factory.mktemp("model"), Gemma3TextConfig(**SMALL, **WINDOWS))
    save_text(made / "text.txt", 3 * LENGTH)
    return made


def options(folder: Path, **changes: object) -> CalibrationOptions:
    facts: dict = {"num_samples": 2, "max_seq_length": LENGTH, "device": "cpu", "output": folder / "t.yaml"}
    return CalibrationOptions(str(folder), (str(folder / "text.txt"),), **facts | changes)


@pytest.fixture
def whole(folder) -> ThresholdTable:
    return calibrate(prepare(options(folder, ks=(16, 32), dense_layers=())))


def bare(table: ThresholdTable) -> ThresholdTable:
    """As an earlier release wrote it."""
    budgets = []
    for budget in table.budgets:
        facts = budget.quality.model_dump(exclude={"layer_candidates"})
        budgets.append(budget.model_copy(update={"quality": type(budget.quality)(**facts)}))
    facts = {name: getattr(table, name) for name in table.model_fields_set - {"key_statistics"}}
    return ThresholdTable(**facts | {"budgets": budgets})


def test_calibrate_writes_what_is_added_to_a_table(folder, whole, monkeypatch):
    """On the same texts, and to the byte; what was there before stays as it was."""
    before = bare(whole)
    assert "key_statistics" not in dumps(before)
    dump(before, folder / "t.yaml")
    added = add_key_statistics(prepare_screen(options(folder, k_screen_only=True)))
    assert dumps(added) == dumps(whole)
    assert [entry.layer for entry in whole.key_statistics.layers] == [0, 2]
    added_lines = [line for line in dumps(whole).splitlines() if "layer_candidates" in line]
    assert dumps(before).splitlines() == [
        line for line in dumps(whole).split("key_statistics:")[0].splitlines() if line not in added_lines
    ]
    (folder / "t.yaml").unlink()


def test_candidates_are_the_reference_s(folder, whole, monkeypatch):
    monkeypatch.setattr(scores_module, "_CHUNK_ELEMENTS", 5000)
    plan = prepare(options(folder, ks=(16, 32), dense_layers=()))
    model = load_causal_lm(str(folder), "cpu", "float32")
    transforms, tokens = whole.key_statistics.transforms(), plan.sequences.held_back
    budget = whole.budgets[0]
    counted: dict[int, float] = {}

    def observe(found: LayerCall) -> None:
        pairs = candidates = 0
        for row in late_rows(LENGTH, 0, 255).tolist():
            screen = KeyScreen("int4", transforms[found.layer], torch.empty(0))
            query, key = found.query[:, row], found.key[:, : row + 1]
            theta = budget.thetas(whole.lengths)[found.layer].at(row + 1)
            nothing = torch.zeros(row + 1, dtype=torch.bool)
            exact = torch.zeros(4, row + 1)
            _, passed, _ = screened(exact, query, key, screen, theta, nothing, found.scale, found.softcap)
            pairs, candidates = pairs + passed.numel(), candidates + int(passed.sum())
        counted[found.layer] = candidates / pairs

    observed(model, plan.subject, tokens, observe)
    shares = budget.quality.layer_candidates
    assert shares[1] == 1.0
    for layer in (0, 2):
        assert shares[layer] == pytest.approx(counted[layer], abs=2e-3)
        assert shares[layer] < 1


def command(folder: Path, *more: str) -> list[str]:
    given = f"calibrate --k-screen-only --model {folder} --dataset {folder / 'text.txt'} --device cpu"
    return [*shlex.split(given), "--num-samples", "1", "--max-seq-length", "256", *more]


def test_the_command_adds_without_force_and_twice_gives_the_same(folder, tmp_path, capsys):
    path = tmp_path / "table.yaml"
    identity = identify(AutoConfig.from_pretrained(folder), "tiny")
    table = make_table(identity, lengths=[64, 256], dense_layers=(2,))
    budgets = [table.budgets[0].model_copy(update={"quality": None}), table.budgets[1]]
    dump(table.model_copy(update={"budgets": budgets}), path)
    assert main(command(folder, "--output", str(path))) == 0
    assert "its thresholds are what they were" in capsys.readouterr().out
    once = path.read_text()
    found = load(path)
    # Nothing was held back for the first budget.
    assert found.budgets[0].quality is None
    assert found.budgets[1].quality.layer_candidates[1:] == [1.0, 1.0]
    assert "candidates" in describe(found)
    assert main(command(folder, "--output", str(path))) == 0
    assert path.read_text() == once


def test_there_has_to_be_a_table_of_the_model(folder, tmp_path, capsys):
    path = tmp_path / "table.yaml"
    assert main(command(folder, "--output", str(path))) == 2
    error = capsys.readouterr().err
    assert f"adds to a table, and {path} is none" in error
    assert f"topt-vllm calibrate --model {folder} --dataset {folder}/text.txt --output {path}" in error
    dump(make_table(), path)
    assert main(command(folder, "--output", str(path))) == 2
    error = capsys.readouterr().err
    assert "this table belongs to tiny, not to" in error
    # Another model's table isn't to be replaced.
    assert error.endswith(f"--output {tmp_path / 'table-new.yaml'}\n")
    assert load(path) == make_table()


def test_a_table_that_cannot_be_replaced_is_refused_before_the_work(folder, tmp_path, monkeypatch):
    path = tmp_path / "table.yaml"
    dump(make_table(identify(AutoConfig.from_pretrained(folder), "tiny"), lengths=[64, 256]), path)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(
        CalibrationError, match=rf"--output {path}: the folder {tmp_path} can't be written to"
    ):
        prepare_screen(options(folder, output=path, k_screen_only=True))


def test_sequences_have_to_reach_the_thresholds(folder, tmp_path):
    path = tmp_path / "table.yaml"
    identity = identify(AutoConfig.from_pretrained(folder), "tiny")
    dump(make_table(identity, lengths=[512, 1024]), path)
    with pytest.raises(CalibrationError, match=r"--max-seq-length is 320, but .* has thresholds from 512"):
        prepare_screen(options(folder, output=path, k_screen_only=True))
    dump(make_table(identity, lengths=[LENGTH, 1024]), path, force=True)
    with pytest.raises(CalibrationError, match="and none of a held-back text would be measured"):
        prepare_screen(options(folder, output=path, k_screen_only=True))


@pytest.mark.parametrize(
    ("more", "flags"),
    [
        (["--k", "32"], "--k"),
        (["--budget", "auto", "--max-loss", "1%"], "--budget, --max-loss"),
        (["--k", "16", "--dense-layers", "0"], "--k, --dense-layers"),
        (["--force", "--resume"], "--force, --resume"),
    ],
)
def test_options_of_thresholds_are_refused(folder, more, flags, capsys):
    assert main(command(folder, *more)) == 2
    error = capsys.readouterr().err
    assert flags in error
    assert "not with --k-screen-only, which leaves thresholds as they are" in error


def test_dry_run_changes_nothing(folder, tmp_path, capsys):
    path = tmp_path / "table.yaml"
    identity = identify(AutoConfig.from_pretrained(folder), "tiny")
    dump(make_table(identity, lengths=[64, 256]), path)
    before = path.read_bytes()
    assert main(command(folder, "--output", str(path), "--dry-run")) == 0
    assert "2 passes" in capsys.readouterr().out
    assert path.read_bytes() == before


def test_statistics_of_an_8b_model_stay_small():
    generator = torch.Generator().manual_seed(0)
    sums = {layer: torch.rand(6, 8, 128, generator=generator).double() + 1 for layer in range(2)}
    statistics = key_statistics(sums, seed=0)
    table = make_table().model_copy(update={"key_statistics": statistics})
    assert 16 * (len(dumps(table)) - len(dumps(make_table()))) < 1_000_000
