"""Budgets that follow a target: curves, the greedy path, the search, and whole runs on a tiny model."""

import random
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from table_factory import make_table
from tiny_models import KINDS, save_model, save_text

from topt_vllm.attention.common import Selection, Thetas
from topt_vllm.attention.reference import attend_row
from topt_vllm.calibration.allocation import Point, Step, greedy_path, hull, of_all_layers
from topt_vllm.calibration.calibrate import calibrate, prepare
from topt_vllm.calibration.options import CalibrationError, CalibrationOptions
from topt_vllm.calibration.plan import ladder
from topt_vllm.calibration.search import MAX_RUNS, Measured, Target, search
from topt_vllm.cli.main import main
from topt_vllm.replay.attention import RuleAttention
from topt_vllm.replay.dense_pass import DensePass
from topt_vllm.replay.model import Subject
from topt_vllm.replay.predictions import Losses
from topt_vllm.replay.replay import Replay
from topt_vllm.replay.scores import LayerCall
from topt_vllm.replay.top_theta import TopTheta
from topt_vllm.replay.whole_pass import observed
from topt_vllm.table.file import dump, load
from topt_vllm.table.identity import identify
from topt_vllm.table.schema import ThresholdTable


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One tiny model of each kind, each with a text."""
    made = {}
    for name, config in KINDS.items():
        made[name] = save_model(tmp_path_factory.mktemp("model"), config)
        save_text(made[name] / "text.txt", 3700)
    return made


def run(folder: Path, **changes: object) -> ThresholdTable:
    options = {"num_samples": 3, "max_seq_length": 600, "ks": (16, 64), "device": "cpu", "budget": "auto"}
    plan = CalibrationOptions(
        str(folder), (str(folder / "text.txt"),), output=folder / "out.yaml", **options | changes
    )
    return calibrate(prepare(plan))


def test_hull_leaves_out_what_a_mixture_beats():
    points = [
        Point(512, 0.0, 1.0),
        Point(64, 0.1, 0.5),
        Point(32, 0.9, 0.25),
        Point(16, 1.0, 0.1),
        Point(8, 3.0, 0.2),
    ]
    assert hull(points) == [Point(16, 1.0, 0.1), Point(64, 0.1, 0.5), Point(512, 0.0, 1.0)]


def test_greedy_path_is_optimal_among_all_choices():
    """Each place on the path loses least among all combinations that read no more, and is what it says."""
    generator = torch.Generator().manual_seed(0)
    curves = {}
    for head in range(4):
        losses = torch.rand(5, generator=generator).sort(descending=True).values.tolist()
        rows = torch.rand(5, generator=generator).sort().values.tolist()
        curves[0, head] = [
            Point(k, loss, row) for k, loss, row in zip((8, 16, 32, 64, 128), losses, rows, strict=True)
        ]
    path = greedy_path(curves)
    assert [step.rows for step in path.steps] == sorted(step.rows for step in path.steps)
    choices = [(sum(p.rows for p in c), sum(p.loss for p in c)) for c in product(*curves.values())]
    for place, step in enumerate(path.steps):
        assert step.loss <= min(loss for rows, loss in choices if rows <= step.rows + 1e-9) + 1e-9
        chosen = [next(p for p in curves[head] if p.k == k) for head, k in path.ks(place).items()]
        assert step.loss == pytest.approx(sum(point.loss for point in chosen))
        assert step.rows == pytest.approx(sum(point.rows for point in chosen))
    assert path.ks(len(path.moves)) == dict.fromkeys(curves, 128)


def ramp(steps: int = 40) -> list[Step]:
    return [Step(0.08 * 0.85**i, (i + 1) / steps) for i in range(steps)]


@pytest.mark.parametrize("factor", [0.2, 1.0, 1.7, 4.0])
def test_search_meets_a_loss_that_was_predicted_wrongly(factor):
    steps, known = ramp(), {}

    def measure(place: int) -> Measured:
        return Measured(100 * factor * steps[place].loss, 100 * steps[place].rows)

    found = search(steps, Target("loss", 1.0), measure, known)
    assert found.met
    assert len(known) <= MAX_RUNS
    assert 0.85 <= found.measured.loss <= 1.0


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.3])
def test_search_stays_within_rows_that_were_predicted_wrongly(factor):
    steps = ramp()

    def measure(place: int) -> Measured:
        return Measured(100 * steps[place].loss, 100 * factor * steps[place].rows)

    found = search(steps, Target("rows", 30.0), measure, {})
    assert found.met
    assert 30.0 - 2.5 * factor <= found.measured.rows <= 30.0


@pytest.mark.parametrize(("fixed", "target"), [(0.03, 5.0), (0.27, 30.0), (0.38, 40.0), (0.38, 45.0)])
def test_search_stays_within_rows_beside_layers_that_are_read_in_full(fixed, target):
    """Windows, and layers that are dense: their rows are an offset, and no factor."""
    sparse = ramp(200)

    def measure(place: int) -> Measured:
        return Measured(1.0, 100 * (fixed + (1 - fixed) * 1.1 * sparse[place].rows))

    found = search(of_all_layers(sparse, fixed), Target("rows", target), measure, {})
    assert found.met
    assert target - 1.1 <= found.measured.rows <= target


@pytest.mark.parametrize("kind", ["loss", "rows"])
def test_search_meets_what_can_be_met_where_the_ratio_drifts_along_the_path(kind):
    """Without noise: what is measured is a power of what was predicted."""
    source, missed = random.Random(0), []
    for _ in range(600):
        steps = [
            Step(loss, rows)
            for loss, rows in zip(
                sorted((10 ** source.uniform(-4, 0) for _ in range(200)), reverse=True),
                sorted(10 ** source.uniform(-2, 0) for _ in range(200)),
                strict=True,
            )
        ]
        factor, power = 10 ** source.uniform(-0.5, 0.5), source.uniform(0.5, 1.6)
        target = Target(kind, 10 ** source.uniform(0.3, 1.7))

        def measure(place: int, steps=steps, factor=factor, power=power) -> Measured:
            step = steps[place]
            return Measured(factor * (100 * step.loss) ** power, factor * (100 * step.rows) ** power)

        known: dict[int, Measured] = {}
        found = search(steps, target, measure, known)
        assert len(known) <= MAX_RUNS
        values = [getattr(measure(place), kind) for place in range(len(steps))]
        if not found.met and min(values) <= target.percent:
            missed.append((target, factor, power))
    assert not missed


def test_search_says_when_a_target_is_out_of_reach():
    steps, known = ramp(), {}
    found = search(steps, Target("loss", 1.0), lambda p: Measured(5.0 + steps[p].loss, p), known)
    assert not found.met
    assert len(known) <= MAX_RUNS


def test_search_uses_what_other_targets_have_measured():
    """A second search starts from the ratio that the first has found, and doesn't repeat a run."""
    steps, known, asked = ramp(), {}, []

    def measure(place: int) -> Measured:
        asked.append(place)
        return Measured(300 * steps[place].loss, 100 * steps[place].rows)

    search(steps, Target("loss", 1.0), measure, known)
    first = len(known)
    assert search(steps, Target("loss", 2.0), measure, known).met
    assert len(known) - first <= 2
    assert len(set(asked)) == len(asked) == len(known)


def test_ladder():
    assert ladder(100) == (1, 2, 4, 8, 16, 32)
    assert ladder(8192)[-1] == 4096


def test_replay_decodes_as_the_operator_would(folders):
    """One layer, one row: attention by hand from a whole dense pass's tensors gives the replayed prediction."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32)
    loud(model)
    subject = subject_of(model)
    replay = Replay(model, subject, tokens(), 1)
    found = replay.compare(attention(subject, {2: thresholds(8.0)}, replay)).losses()

    calls: list[LayerCall] = []
    observed(model, subject, tokens()[:-1], calls.append)
    call = calls[2]
    out = attend_row(call.query[:, -1], call.key, call.value, torch.full((4,), 8.0), Selection(), call.scale)
    replaced: list[torch.Tensor] = []

    def swap(_: torch.nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        changed = arguments[0].clone()
        changed[0, -1] = out.flatten()
        replaced.append(changed)
        return (changed,)

    handle = model.model.layers[2].self_attn.o_proj.register_forward_pre_hook(swap)
    with torch.inference_mode():
        logits = model(torch.tensor([tokens()[:-1]])).logits[:, -1]
    handle.remove()
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens()[-1:])).item()
    assert abs(found.nll) > 1e-3
    assert replay.dense_nll + found.nll == pytest.approx(nll, abs=1e-4)


def test_sparse_rows_change_what_later_rows_see(folders):
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32)
    loud(model)
    subject = subject_of(model)

    def losses(sequence: list[int], count: int) -> Losses:
        replay = Replay(model, subject, sequence, count)
        thetas = {layer: thresholds(8.0) for layer in (0, 1, 2)}
        return replay.compare(attention(subject, thetas, replay)).losses()

    both, first, alone = losses(tokens(), 2), losses(tokens()[:-1], 1), losses(tokens(), 1)
    # The first of two rows is the only row of the shorter sequence; the second is not what it is after dense rows.
    # Rounding is 1e-7 of divergences near 1.
    assert abs(2 * both.kl - first.kl - alone.kl) > 1e-5


def loud(model: transformers.PreTrainedModel) -> None:
    """Makes attention matter in a model with small random weights."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "v_proj" in name or "o_proj" in name or "lm_head" in name:
                parameter.mul_(20)


def tokens() -> list[int]:
    return torch.randint(0, 256, (301,), generator=torch.Generator().manual_seed(0)).tolist()


def thresholds(theta: float) -> Thetas:
    return Thetas(torch.tensor([1, 4096]), torch.full((4, 2), theta), torch.zeros(4, 2))


def subject_of(model: transformers.PreTrainedModel) -> Subject:
    identity = identify(model.config, "tiny")
    return Subject(identity, 32 if identity.sliding_window_layers else 0, 257)


def attention(subject: Subject, thetas: dict[int, Thetas], replay: Replay) -> RuleAttention:
    return RuleAttention(subject, dict.fromkeys(thetas, TopTheta(thetas)), replay.rows + 1)


@pytest.mark.slow
def test_auto_budgets_meet_their_targets_on_the_text_they_were_mended_on(folders, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the picture needs the extra `plot`")
    table = run(folders["llama"], target_rows=(30.0, 60.0), max_loss=(0.5,))
    assert [budget.key for budget in table.budgets] == [16, 64, "rows-30%", "rows-60%", "loss-0.5%"]
    constant, *_, little, much, close = table.budgets
    assert constant.quality.loss_pct is not None
    assert len(constant.quality.layer_rows_read) == 3
    # Held back text is another one, so the target is met about.
    assert little.quality.v_rows_read < 0.36
    assert little.quality.v_rows_read < much.quality.v_rows_read < 0.72
    assert much.quality.kl <= little.quality.kl
    for entry in little.layers:
        assert len(entry.k) == 4
    assert little.dense_layers == []
    dump(table, tmp_path / "table.yaml")
    assert load(tmp_path / "table.yaml") == table
    assert main(["inspect", str(tmp_path / "table.yaml"), "--plot", str(tmp_path / "table.png")]) == 0
    printed, said = capsys.readouterr()
    assert all(budget.key in printed for budget in (little, much, close))
    assert "k=16" in printed
    assert "k=rows" not in printed
    assert said.endswith(f"wrote {tmp_path / 'table.png'}\n")
    # The header of a PNG file.
    assert (tmp_path / "table.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["inspect", str(tmp_path / "table.yaml"), "--plot", str(tmp_path / "table.yaml")]) == 2
    assert load(tmp_path / "table.yaml") == table
    assert main(["inspect", str(tmp_path / "table.yaml"), "--plot", str(tmp_path / "table.odd")]) == 2
    assert "table.odd" in capsys.readouterr().err
    assert table.budget("loss-0.5%") is close
    assert table.budget(None) is close


def test_a_picture_without_a_suffix_is_a_png_and_nothing_lies_beside_it(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs the extra `plot`")
    dump(make_table(), tmp_path / "table.yaml")
    assert main(["inspect", str(tmp_path / "table.yaml"), "--plot", str(tmp_path / "picture")]) == 0
    assert (tmp_path / "picture").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["picture", "table.yaml"]


def test_a_dry_run_says_how_many_passes_will_be_made(folders, capsys, monkeypatch):
    folder, made, before = folders["llama"], [], DensePass.__init__
    monkeypatch.setattr(
        DensePass, "__init__", lambda *args, **given: made.append(0) or before(*args, **given)
    )
    command = ["calibrate", "--model", folder, "--dataset", folder / "text.txt", "--num-samples", 3]
    command += ["--max-seq-length", 600, "--budget", "auto", "--target-rows", "30%", "--max-loss", "90%"]
    command += ["--output", folder / "counted.yaml", "--device", "cpu"]
    assert main([*map(str, command), "--dry-run"]) == 0
    assert not made
    announced = capsys.readouterr().out
    assert main([*map(str, command)]) == 0
    assert f"{len(made)} passes, at most" in announced


def test_a_target_that_is_not_reached_is_said(folders, capsys):
    table = run(folders["llama"], target_rows=(0.1,))
    assert table.budget("rows-0.1%").quality.v_rows_read > 0.001
    said = capsys.readouterr().err
    assert "rows-0.1% was not reached; its budget is the nearest, a loss of" in said
    assert "of V rows, and the server's default" in said


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "gemma3, windows",
            {},
            r"600 tokens sliding windows alone read 13\.\d %.* or give a longer --max-seq",
        ),
        (
            "llama",
            {"dense_layers": (0, 1)},
            r"600 tokens --dense-layers 0 1 alone read 66\.7 %.* or give fewer",
        ),
    ],
)
def test_rows_that_are_read_whatever_is_allocated_are_refused(folders, kind, changes, message, monkeypatch):
    monkeypatch.setattr("topt_vllm.calibration.calibrate.load_causal_lm", lambda *_: pytest.fail("weights"))
    with pytest.raises(CalibrationError, match=f"--target-rows 5% 10%: at {message}"):
        run(folders[kind], target_rows=(5.0, 10.0, 70.0), **changes)


def test_auto_with_windowed_layers(folders):
    table = run(folders["gemma3, windows"], target_rows=(40.0,))
    quality = table.budgets[-1].quality
    assert [entry.layer for entry in table.budgets[-1].layers] == [1]
    assert quality.layer_rows_read[0] == quality.layer_rows_read[2] == 1.0
    assert quality.v_rows_read < 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_loss": (0.0,)}, "--max-loss is"),
        ({"max_loss": (1.0, 1.0000001)}, "different percentages above 0"),
        ({"target_rows": (100.0,)}, "--target-rows is"),
        ({"budget": "k", "max_loss": (1.0,)}, "targets of --budget auto"),
    ],
)
def test_options_that_are_refused(folders, changes, message):
    with pytest.raises(CalibrationError, match=message):
        run(folders["llama"], **changes)
