"""Whole evaluations of tiny models: equal rows, records, needles, plot, and errors before anything is loaded."""

import hashlib
import json
import math
import os
import random
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from table_factory import make_table
from tiny_models import SMALL, byte_tokenizer, save_model, save_text
from transformers import Gemma3TextConfig, LlamaConfig

from topt_vllm.cli.main import main
from topt_vllm.evaluation.cases import answer
from topt_vllm.evaluation.needles import hide
from topt_vllm.evaluation.options import RULES, EvaluationError, EvaluationOptions
from topt_vllm.evaluation.plan import Plan, prepare
from topt_vllm.evaluation.records import quality, spread
from topt_vllm.evaluation.rules.families import families
from topt_vllm.evaluation.rules.topk import TopK
from topt_vllm.evaluation.tasks.haystack import Haystack
from topt_vllm.evaluation.tuning import sample, spread_rows, tune
from topt_vllm.replay import predictions
from topt_vllm.replay.attention import Counts, RuleAttention
from topt_vllm.replay.dense_pass import DensePass
from topt_vllm.replay.model import load_causal_lm
from topt_vllm.replay.predictions import Comparison
from topt_vllm.replay.replay import Replay
from topt_vllm.table.file import dump, load
from topt_vllm.table.identity import identify
from topt_vllm.table.schema import TextSource

LENGTHS = [64, 128, 256]
LONGEST = 320
GEMMA = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
CONFIGS = {"llama": LlamaConfig(**SMALL), "gemma3": Gemma3TextConfig(**SMALL, **GEMMA)}
MEASURES = ["perplexity_dense", "perplexity", "loss_pct", "kl", "agreement", "dropped_mass"]
KEYS = ["rule", "text", "rows_target", "v_rows_read", "elements_kept", *MEASURES]


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS.keys())
def folder(request, tmp_path_factory) -> Path:
    """A model with its table and two texts."""
    made = save_model(tmp_path_factory.mktemp("model"), request.param)
    identity = identify(transformers.AutoConfig.from_pretrained(made), "tiny")
    dump(make_table(identity, lengths=LENGTHS, dense_layers=(1,)), made / "toptheta.yaml")
    save_text(made / "play.txt", 1400)
    save_text(made / "code.txt", 1400)
    return made


def options(folder: Path, **changes) -> EvaluationOptions:
    facts = {"max_seq_length": LONGEST, "device": "cpu", "dense_layers": (), "rows": (0.6,)}
    return EvaluationOptions(str(folder), (str(folder / "play.txt"),), **facts | changes)


@pytest.fixture(scope="module")
def plan(folder) -> Plan:
    return prepare(options(folder))


@pytest.fixture(scope="module")
def model(plan):
    return load_causal_lm(plan.options.model, "cpu", "float32")


@pytest.fixture
def no_weights(monkeypatch):
    """The test fails when it loads any."""

    def fail(*_):
        pytest.fail("weights loaded")

    # In this order: importing the second after patching the first would give it the wrong one for good.
    for module in ("topt_vllm.evaluation.run", "topt_vllm.replay.model"):
        monkeypatch.setattr(f"{module}.load_causal_lm", fail)


def command(folder: Path, *more: str) -> list[str]:
    texts = [str(folder / name) for name in ("play.txt", "code.txt")]
    given = shlex.split(f"evaluate --model {folder} --max-seq-length {LONGEST} --device cpu")
    return [*given, "--dataset", *texts, *more]


@pytest.mark.parametrize("name", RULES)
def test_each_rule_is_tuned_to_its_target(plan, model, name):
    """Halfway between what its parameter can reach. A tile of 128 keys is a large step for BLASST."""
    (found,) = sample(model, plan.subject, plan.texts[0].tuning, [spread_rows(LENGTHS[0], LONGEST)])
    (family,) = families((name,), plan.table, LONGEST)
    few, many = (found.v_rows_read(family.make(x), frozenset()) for x in (family.few, family.many))
    target = (few + many) / 2
    tuned = tune(family, target, found, frozenset())
    assert few < tuned.v_rows_read < many
    assert tuned.v_rows_read == found.v_rows_read(tuned.rule, frozenset())
    assert tuned.v_rows_read == pytest.approx(target, abs=0.08 if name == "blasst" else 0.05)


def test_a_target_out_of_reach_gives_the_nearest(plan, model):
    (found,) = sample(model, plan.subject, plan.texts[0].tuning, [spread_rows(LENGTHS[0], LONGEST)])
    (family,) = families(("quest",), plan.table, LONGEST)
    tuned = tune(family, 1e-6, found, frozenset())
    assert tuned.parameter == 1


def test_the_sample_counts_as_the_run_does(plan, model):
    """Over all decoded rows of one text the tuner's share is the run's, where no layer feeds on a sparse one."""
    tokens, last = plan.texts[0].tuning, plan.subject.full_layers[-1]
    replay = Replay(model, plan.subject, tokens, 40)
    (found,) = sample(model, plan.subject, tokens, [replay.rows])
    dense = frozenset(plan.subject.full_layers) - {last}
    used = RuleAttention(plan.subject, {last: TopK(9)}, replay.rows + 1)
    replay.compare(used)
    assert found.v_rows_read(TopK(9), dense) == pytest.approx(used.counts.shares()["v_rows_read"], abs=1e-9)


def test_comparison_is_the_models_own_loss(plan, model, monkeypatch):
    monkeypatch.setattr(predictions, "_LOGITS", 257 * 7)
    tokens = plan.texts[0].sequences[0]
    replay = Replay(model, plan.subject, tokens, 40)
    found = replay.compare(RuleAttention(plan.subject, {}, replay.rows + 1))
    given = torch.tensor([tokens])
    with torch.inference_mode():
        logits = model(given, use_cache=False).logits[0].float()
    expected = torch.nn.functional.cross_entropy(logits[:-1], given[0, 1:], reduction="none")[-40:]
    torch.testing.assert_close(found.dense, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.loss, found.dense)
    assert found.agree.all()
    assert found.kl.abs().max() < 1e-5


def test_divergence_of_known_distributions():
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]]), torch.tensor([[0.25, 0.5, 0.25]] * 2)
    found = predictions.compared(p.log(), q.log(), torch.tensor([1, 2]))
    assert found.dense.tolist() == pytest.approx([-math.log(0.25), -math.log(0.1)])
    assert found.loss.tolist() == pytest.approx([-math.log(0.5), -math.log(0.25)])
    second = 0.2 * math.log(0.8) + 0.7 * math.log(1.4) + 0.1 * math.log(0.4)
    assert found.kl.tolist() == pytest.approx([0.25 * math.log(2), second])
    assert found.agree.tolist() == [False, True]
    losses = found.losses()
    rise = [math.log(0.25 / 0.5), math.log(0.1 / 0.25)]
    assert losses.loss_pct == pytest.approx(100 * math.expm1(sum(rise) / 2))
    assert losses.agreement == 0.5


def test_standard_error_is_that_of_paired_block_means():
    """A difference that is the same in every row has none, however much the losses themselves vary."""
    dense = torch.rand(256, generator=torch.Generator().manual_seed(0)) * 5
    counts = Counts(v_rows=1, elements=1)
    steady = quality("topk", Comparison(dense, dense + 0.1, dense, dense > 9), counts)
    assert steady["loss_pct"] == pytest.approx(100 * math.expm1(0.1), abs=1e-3)
    assert steady["loss_pct_se"] == pytest.approx(0, abs=1e-4)
    # Eight blocks of 32 alike rows: 256 rows are worth eight.
    blocks = torch.tensor([0.0, 0.2] * 4).repeat_interleave(32)
    found = quality("topk", Comparison(dense, dense + blocks, dense, dense > 9), counts)
    expected = math.exp(0.1) * 100 * math.sqrt(0.01 * 8 / 7 / 8)
    assert found["loss_pct_se"] == pytest.approx(expected, rel=1e-3)


def test_spread_of_kept_keys():
    assert spread(torch.arange(101.0).flip(0)) == {"p5": 5.0, "p50": 50.0, "p95": 95.0}


def test_needles_hold_the_fact_at_their_depth():
    tokenizer = byte_tokenizer()
    text = tokenizer("x" * 2000)["input_ids"]
    depths = (0.0, 0.5, 1.0)
    needles = hide(tokenizer, text, (500, 900), depths)
    assert [(needle.length, needle.depth) for needle in needles] == [
        (length, depth) for length in (500, 900) for depth in depths
    ]
    for needle in needles:
        decoded = len(needle.question) + len(needle.answers[0]) - 1
        assert needle.length - 3 <= len(needle.prompt) + decoded <= needle.length
        prompt, question = tokenizer.decode(needle.prompt), tokenizer.decode(needle.question)
        number = tokenizer.decode(needle.answers[0]).strip()
        fact = f"\n\nThe{question.partition('The')[2]} {number}."
        assert prompt.count(fact) == 1
        assert {len(tokens) for tokens in needle.answers} == {len(needle.answers[0])}
        # Of five wrong answers two are those of the other facts, likelier than what stands nowhere.
        wrong = [tokenizer.decode(tokens).strip() in prompt for tokens in needle.answers[1:]]
        assert wrong == [True, True, False, False, False]
        before = prompt[: prompt.index(fact)].count("x") / (prompt.count("x") - 1)
        assert before == pytest.approx(needle.depth, abs=0.02)


def test_needles_share_prompts_and_no_two_of_one_have_the_same_place():
    tokenizer = byte_tokenizer()
    text = tokenizer("x" * 2000)["input_ids"]
    needles = hide(tokenizer, text, (1000,), tuple(i / 12 for i in range(13)))
    prompts = {id(needle.prompt): needle.prompt for needle in needles}
    assert len(prompts) == 2
    for prompt in prompts.values():
        sharing = [needle for needle in needles if needle.prompt is prompt]
        assert len({tuple(needle.question) for needle in sharing}) == len(sharing)
        assert tokenizer.decode(prompt).count("secret") == len(sharing)


def test_needles_are_answered_as_a_plain_forward_pass_says(plan, model):
    """Dense answers against one pass over prompt, question and answer; a rule before leaves no trace."""
    tokenizer = byte_tokenizer()
    (needle,) = hide(tokenizer, plan.texts[0].sequences[0], (260,), (0.5,))
    prompt = DensePass(model, plan.subject, needle.prompt)
    rules = dict.fromkeys(plan.subject.full_layers, TopK(3))
    right, wrong = (RuleAttention(plan.subject, rules, needle.contexts) for _ in range(2))
    (sparse,) = answer(prompt, [needle], right, wrong)
    (dense,) = answer(prompt, [needle], None, None)
    for tokens, likelihood in zip(needle.answers, dense.likelihoods, strict=True):
        given = torch.tensor([needle.prompt + needle.question + tokens])
        with torch.inference_mode():
            known = model(given, use_cache=False).logits[0].float().log_softmax(dim=-1)
        rows = torch.arange(given.shape[1] - len(tokens) - 1, given.shape[1] - 1)
        assert likelihood == pytest.approx(known[rows, torch.tensor(tokens)].sum().item(), rel=1e-3)
    assert sparse.likelihoods != pytest.approx(dense.likelihoods, rel=1e-4)
    assert dense.retrieved == (dense.likelihoods[0] == max(dense.likelihoods))
    # Question and right answer are counted, once each.
    asked = len(needle.question) + len(needle.answers[0]) - 1
    assert right.counts.sparse == 4 * len(rules) * asked
    assert right.counts.elements_kept < right.counts.elements


@pytest.mark.slow
def test_command_writes_one_record_for_each_rule_target_and_text(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    out, picture = tmp_path / "out.json", tmp_path / "out.svg"
    more = shlex.split(
        "--rows 0.5 0.8 --budget 64 --rules toptheta topk --needles 256 --depths 0.5 --lengths 128 320 "
        "--decode-rows 100"
    )
    assert main(command(folder, *more, "--json", str(out), "--plot", str(picture))) == 0
    records = json.loads(out.read_text())
    found = {(r["text"], r["context"], r["rule"], r["rows_target"], r["k"]) for r in records}
    jobs = [
        ("toptheta", None, 64),
        *((rule, rows, None) for rule in ("toptheta", "topk") for rows in (0.5, 0.8)),
    ]
    texts = [("play.txt", 128), ("play.txt", LONGEST), ("code.txt", 128), ("code.txt", LONGEST)]
    assert found == {(*text, *job) for text in (*texts, ("needles", 256)) for job in jobs}
    assert len(records) == len(found)
    for record in records:
        assert set(KEYS) <= set(record)
        assert re.fullmatch("sha256:[0-9a-f]{64}", record["provenance"]["fingerprint"])
        assert re.fullmatch("[0-9a-f]{64}", record["provenance"]["table_sha256"])
        assert all(math.isfinite(record[key]) for key in KEYS[3:])
        assert 0 < record["v_rows_read"] <= 1
        ratio = record["perplexity"] / record["perplexity_dense"] - 1
        assert record["loss_pct"] == pytest.approx(100 * ratio, abs=1e-3)
        if record["text"] == "needles":
            assert record["cells"][0]["length"] == 256
        else:
            # No rows below the table's first length, 64, though 100 were asked for.
            rows = 64 if record["context"] == 128 else 100
            assert record["decode_rows"] == record["tokens"] == rows
            assert record["by_position"][0]["from"] == record["first_context"] == record["context"] - rows
            assert record["by_position"][-1]["to"] == record["context"] - 1
            assert record["loss_pct_se"] >= 0
        assert (record["tuned_on"] is None) == (record["k"] is not None)
        assert ("kept_over_k" in record) == (record["k"] is not None and record["text"] != "needles")
    shipped = next(r for r in records if r["k"] == 64)
    assert shipped["dense_layers"] == [1]
    assert 0 < shipped["kept_over_k"]["p5"] <= shipped["kept_over_k"]["p50"] <= shipped["kept_over_k"]["p95"]
    assert picture.read_text().startswith("<?xml")
    assert "toptheta" in capsys.readouterr().out


def test_needles_alone(folder, tmp_path):
    out = tmp_path / "out.json"
    only = ["--needles", "260", "--depths", "0", "1", "--needles-only", "--rows", "0.6", "--rules", "topk"]
    assert main(command(folder, *only, "--json", str(out))) == 0
    (record,) = json.loads(out.read_text())
    assert record["text"] == "needles"
    assert [(cell["length"], cell["depth"]) for cell in record["cells"]] == [(260, 0.0), (260, 1.0)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--needles-only"],
            r"--skip-texts \(or --needles-only\) leaves nothing to evaluate; name --needles, --tasks",
        ),
        (["--rows", "0"], "shares lie above 0"),
        (["--rows"], "nothing to evaluate"),
        (["--budget", "7"], "budget is 7, but the table has budgets 64, 128"),
        (["--k", "7"], "budget is 7, but the table has budgets 64, 128"),
        (["--rules", "topk", "--budget", "64"], "--budget 64 .* --rules names none of toptheta"),
        (
            ["--rows", "0.3", "--dense-layers", "1"],
            "raise the target, or name longer --lengths or fewer --dense",
        ),
        (
            ["--dense-layers", "1"],
            r"the default --rows 0.05 0.1 0.2: at 320 tokens dense layers \[1\] and sliding windows alone read",
        ),
        (
            ["--rules", "toptheta", "topk", "--rows", "--budget", "64"],
            "--rules topk are tuned to targets, and",
        ),
        (["--tune-on", "t", "--rows", "--budget", "64"], "--tune-on is for the targets of --rows"),
        (["--depths", "0.5"], "--depths is where facts stand in the prompts of --needles; name those"),
        (["--dense-layers", "9"], r"--dense-layers \[9\] are not full-attention layers"),
        (["--rows", "--budget", "64", "--dense-layers", "1"], "--dense-layers is for the targets of --rows"),
        (["--json", "o.svg", "--plot", "o.svg"], "--json and --plot are one file, o.svg"),
        (["--dense-layers", "x"], "--dense-layers x: layer numbers, or none"),
        (["--decode-rows", "1"], "--decode-rows is 1; it must be at least 2"),
        (["--lengths", "64"], "--lengths 64: contexts are longer than the table's first length, 64"),
        (["--lengths", "999"], "at most as long as --max-seq-length, 320"),
        (["--needles", "64"], "--needles 64: prompts are longer than the table's first length, 64"),
        (["--needles", "120"], "--needles 120: too short for 5 facts and a question"),
        (["--depths", "2"], "--depths 2.0: 0 is the start"),
        (["--lengths", "-5"], "--lengths -5: contexts are longer"),
        (["--max-seq-length", "0"], "--max-seq-length is 0, but the table's first length is 64"),
        (["--lengths", "128", "9999"], "--lengths 9999: the model's context is"),
        (["--needles", "9999"], "--needles 9999: the model's context is"),
        (["--num-samples", "9"], "play.txt: the text has 1400 tokens"),
        (["--thresholds", "none"], "an evaluation needs thresholds"),
        (["--json", "/nowhere/at/all.json"], "the folder /nowhere/at does not exist"),
        (["--tune-on", "absent.txt"], "error: --tune-on absent.txt: no such file"),
        (["--tune-on", os.devnull], f"error: --tune-on {os.devnull}: a device"),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_errors_come_before_the_weights(folder, more, message, capsys):
    assert main(command(folder, *more)) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error


def test_outputs_are_not_replaced(folder, tmp_path, capsys):
    existing = tmp_path / "out.json"
    existing.write_text("mine")
    assert main(command(folder, "--json", str(existing))) == 2
    assert f"--json {existing} exists; name another file" in capsys.readouterr().err
    assert existing.read_text() == "mine"


def test_a_text_that_the_table_was_calibrated_on_is_named(folder, tmp_path, capsys):
    """Its losses say nothing about other texts."""
    text, other = folder / "play.txt", tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    table = load(folder / "toptheta.yaml")
    source = TextSource(name="other name.txt", sha256=hashlib.sha256(text.read_bytes()).hexdigest())
    seen = table.calibration.model_copy(update={"data": [source]})
    dump(table.model_copy(update={"calibration": seen}), tmp_path / "seen.yaml")
    named = ["--thresholds", str(tmp_path / "seen.yaml"), "--dataset", str(text), str(other), "--dry-run"]
    assert main(command(folder, *named, "--rows", "0.9")) == 0
    warned = capsys.readouterr().err
    assert "calibrated on play.txt" in warned
    assert "other.txt" not in warned


@pytest.mark.usefixtures("no_weights")
def test_texts_of_the_same_name_are_told_apart(folder, tmp_path):
    """Records, plots and reports go by the name."""
    for name in ("play", "code"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.txt").write_bytes((folder / f"{name}.txt").read_bytes())
    texts = tuple(str(tmp_path / name / "test.txt") for name in ("play", "code"))
    found = prepare(replace(options(folder), dataset=texts)).texts
    assert [text.name for text in found] == list(texts)
    (alone,) = prepare(replace(options(folder), dataset=texts[:1])).texts
    assert alone.name == "test.txt"


def test_dry_run_loads_nothing(folder, tmp_path, capsys):
    (tmp_path / "other.txt").write_text((folder / "code.txt").read_text()[::-1])
    more = ["--dry-run", "--rows", "0.6", "--tune-on", str(tmp_path / "other.txt")]
    assert main(command(folder, *more)) == 0
    shown = capsys.readouterr().out
    assert "tuned on      other.txt" in shown
    assert "at 60%" in shown


@pytest.mark.usefixtures("no_weights")
def test_targets_that_windows_alone_exceed_are_refused(folder, capsys):
    """Nothing could be tuned to them. Where contexts are short, windows read the most."""
    windows = bool(load(folder / "toptheta.yaml").model.sliding_window_layers)
    for rows, lengths, refused in ((0.1, (128, 320), True), (0.1, (320,), False), (0.9, (128, 320), False)):
        asked = ["--dry-run", "--rows", str(rows), "--lengths", *map(str, lengths)]
        assert main(command(folder, *asked)) == 2 * (windows and refused), (rows, lengths)
    capsys.readouterr()
    # Needles' prompts have rules of their own, and texts that are skipped have none.
    asked = ["--dry-run", "--rows", "0.085", "--depths", "0"]
    assert main(command(folder, *asked, "--needles", "260")) == 2 * windows
    assert (
        "alone read 9.0%; raise the target, or name longer --needles\n" in capsys.readouterr().err
    ) == windows
    skipped = ["--needles", "320", "--lengths", "128", "--skip-texts"]
    assert main(command(folder, *asked, *skipped)) == 0


@pytest.mark.usefixtures("no_weights")
def test_default_targets_that_windows_alone_exceed_are_left_out(folder, capsys):
    windows = bool(load(folder / "toptheta.yaml").model.sliding_window_layers)
    assert main(command(folder, "--dry-run")) == 0
    shown, said = capsys.readouterr()
    note = "note: left out of the default --rows: 0.05, for at 320 tokens sliding windows alone read 7.7%\n"
    assert (note in said) == ("at 5%" not in shown) == windows
    assert "at 10%" in shown


@pytest.mark.usefixtures("no_weights")
def test_a_text_needs_no_tokens_to_tune_on_where_nothing_is_tuned_on_it(folder, tmp_path):
    save_text(tmp_path / "other.txt", 1000)
    asked = ["--max-seq-length", "1000", "--rules", "toptheta", "--dry-run"]
    for more, refused in (
        (["--rows", "--budget", "64"], False),
        (["--rows", "0.9", "--tune-on", str(tmp_path / "other.txt")], False),
        (["--rows", "0.9"], True),
    ):
        assert main(command(folder, *asked, *more)) == 2 * refused, more


@pytest.mark.usefixtures("no_weights")
def test_lengths_with_other_rotations_are_not_compared(tmp_path, capsys):
    """One dense pass serves all lengths, and transformers' longrope turns K by the length of the pass."""
    factors = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    model = save_model(
        tmp_path,
        transformers.Phi3Config(
            **SMALL, pad_token_id=0, original_max_position_embeddings=200, rope_parameters=factors
        ),
    )
    identity = identify(transformers.AutoConfig.from_pretrained(model), "tiny")
    dump(make_table(identity, lengths=LENGTHS), model / "toptheta.yaml")
    save_text(model / "play.txt", 1400)
    save_text(model / "code.txt", 1400)
    asked = ["--rows", "--budget", "64", "--rules", "toptheta", "--dry-run"]
    for more, refused in (
        (["--lengths", "128", "320"], True),
        (["--lengths", "260", "320"], False),
        (["--generate", "150"], True),
        (["--skip-texts", "--needles", "203", "--depths", "0"], True),
        (["--skip-texts", "--needles", "320", "--depths", "0"], False),
        (["--skip-texts", "--needles", "170", "320", "--depths", "0"], False),
        # One pass serves to tune for all prompts.
        (["--skip-texts", "--needles", "170", "320", "--depths", "0", "--rows", "0.5"], True),
        (["--lengths", "320", "--needles", "170", "--depths", "0", "--rows", "0.5"], True),
    ):
        assert main(command(model, *asked, *more)) == 2 * refused, more
        assert ("(longrope)" in capsys.readouterr().err) == refused


@pytest.mark.usefixtures("no_weights")
def test_answers_end_within_the_context(tmp_path):
    model = save_model(tmp_path, LlamaConfig(**SMALL | {"max_position_embeddings": 320}))
    identity = identify(transformers.AutoConfig.from_pretrained(model), "tiny")
    dump(make_table(identity, lengths=LENGTHS), model / "toptheta.yaml")
    save_text(model / "play.txt", 1400)
    save_text(model / "code.txt", 1400)
    needles = prepare(options(model, needles=(320,), depths=(0.0,), skip_texts=True)).needles
    assert [int(needle.contexts[-1]) for needle in needles] == [320]


def test_a_tokenizer_that_tells_no_numbers_apart_is_refused():
    with pytest.raises(EvaluationError, match="tells 1 numbers of five digits apart, and 3 are needed"):
        Haystack(
            "", lambda text, **_: {"input_ids": [0] * len(text.split())}, [], 0, random.Random(0)
        ).numbers(3)


@pytest.mark.usefixtures("no_weights")
def test_a_text_is_not_tuned_on_and_evaluated(folder, capsys):
    play = str(folder / "play.txt")
    for name in (play, f"{folder}/../{folder.name}/play.txt"):
        assert main(command(folder, "--dry-run", "--tune-on", name)) == 2
        assert "play.txt is evaluated too; leave it out" in capsys.readouterr().err
