"""Whole evaluations of tiny models: equal rows, records, needles, plot, and errors before anything is loaded."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import transformers
from table_factory import make_table
from tiny_models import SMALL, byte_tokenizer, save_model, save_text
from transformers import Gemma3TextConfig, LlamaConfig

from topt_vllm.calibration.model import load_causal_lm
from topt_vllm.cli.main import main
from topt_vllm.evaluation import perplexity
from topt_vllm.evaluation.needles import answer, hide
from topt_vllm.evaluation.options import RULES, EvaluationError, EvaluationOptions
from topt_vllm.evaluation.perplexity import check_head, compare, hidden_states
from topt_vllm.evaluation.plan import Plan, prepare
from topt_vllm.evaluation.rules.families import families
from topt_vllm.evaluation.rules.topk import TopK
from topt_vllm.evaluation.tuning import sample, spread_rows, tune
from topt_vllm.model_identity import identify
from topt_vllm.thresholds import dump

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
    return load_causal_lm(plan.loading)


def command(folder: Path, *more: str) -> list[str]:
    texts = [str(folder / name) for name in ("play.txt", "code.txt")]
    return [
        "evaluate",
        "--model",
        str(folder),
        "--dataset",
        *texts,
        "--max-seq-length",
        str(LONGEST),
        "--device",
        "cpu",
        *more,
    ]


@pytest.mark.parametrize("name", RULES)
def test_each_rule_is_tuned_to_its_target(plan, model, name):
    """Halfway between what its parameter can reach. A tile of 128 keys is a large step for BLASST."""
    (found,) = sample(model, plan.subject, plan.texts[0].tuning, [spread_rows(plan.first, LONGEST)])
    (family,) = families((name,), plan.table, LONGEST)
    few, many = (found.v_rows_read(family.make(x), frozenset()) for x in (family.few, family.many))
    target = (few + many) / 2
    tuned = tune(family, target, found, frozenset())
    assert few < tuned.v_rows_read < many
    assert tuned.v_rows_read == found.v_rows_read(tuned.rule, frozenset())
    assert tuned.v_rows_read == pytest.approx(target, abs=0.08 if name == "blasst" else 0.05)


def test_a_target_out_of_reach_gives_the_nearest(plan, model):
    (found,) = sample(model, plan.subject, plan.texts[0].tuning, [spread_rows(plan.first, LONGEST)])
    (family,) = families(("quest",), plan.table, LONGEST)
    tuned = tune(family, 1e-6, found, frozenset())
    assert tuned.parameter == 1


def test_the_sample_counts_as_the_run_does(plan, model):
    """Over all rows of one text the tuner's share is the evaluation's, where no layer feeds on a sparse one."""
    tokens, last = plan.texts[0].tuning, plan.subject.full_layers[-1]
    (found,) = sample(model, plan.subject, tokens, [torch.arange(plan.first - 1, LONGEST)])
    dense = frozenset(plan.subject.full_layers) - {last}
    _, counts = hidden_states(model, plan.subject, tokens, {last: TopK(9)}, plan.first)
    assert found.v_rows_read(TopK(9), dense) == pytest.approx(counts.shares()["v_rows_read"], abs=1e-9)


def test_comparison_is_the_models_own_loss(plan, model, monkeypatch):
    monkeypatch.setattr(perplexity, "_CHUNK_LOGITS", 257 * 7)
    tokens = plan.texts[0].sequences[0]
    check_head(model, tokens)
    dense, _ = hidden_states(model, plan.subject, tokens, {}, plan.first)
    found = compare(model, tokens, dense, dense, plan.first)
    given = torch.tensor([tokens])
    with torch.inference_mode():
        logits = model(given, use_cache=False).logits[0].float()
    expected = torch.nn.functional.cross_entropy(logits[:-1], given[0, 1:], reduction="none")[
        plan.first - 1 :
    ]
    torch.testing.assert_close(found.dense, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.loss, found.dense)
    assert found.agree.all()
    assert found.kl.abs().max() < 1e-5
    assert found.contexts.tolist() == list(range(plan.first, LONGEST))


def test_divergence_of_known_distributions(model):
    width = model.config.get_text_config().hidden_size
    states = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0))
    found = compare(model, [3, 1, 4, 1, 5], states[0], states[1], 2)
    with torch.inference_mode():
        p, q = (perplexity.log_probabilities(model, part)[1:4] for part in states)
    torch.testing.assert_close(found.kl, (p.exp() * (p - q)).sum(dim=-1), rtol=1e-4, atol=1e-5)
    assert found.dense.tolist() == pytest.approx(
        [-p[0, 4].item(), -p[1, 1].item(), -p[2, 5].item()], rel=1e-4
    )


def test_a_head_that_is_not_understood_is_refused(plan, model, monkeypatch):
    monkeypatch.setattr(perplexity, "log_probabilities", lambda model, hidden: torch.zeros(16, 257))
    with pytest.raises(EvaluationError, match="computes its logits in a way that is not known here"):
        check_head(model, plan.texts[0].sequences[0])


def test_needles_hold_the_fact_at_their_depth():
    tokenizer = byte_tokenizer()
    text = tokenizer("x" * 400)["input_ids"]
    for needle in hide(tokenizer, text, (256, 300), (0.0, 0.5, 1.0)):
        assert len(needle.prompt) + len(needle.question) == needle.length
        prompt = tokenizer.decode(needle.prompt)
        number = tokenizer.decode(needle.answers[0]).strip()
        assert f"is {number}." in prompt
        assert {len(tokens) for tokens in needle.answers} == {len(needle.answers[0])}
        assert not any(tokenizer.decode(tokens).strip() in prompt for tokens in needle.answers[1:])
        before = prompt.index("\n\nThe secret") / (prompt.count("x") - 1)
        assert before == pytest.approx(needle.depth, abs=0.02)


def test_needles_are_answered_as_a_plain_forward_pass_says(plan, model):
    """Dense answers against one pass over prompt, question and answer; a rule after another sees the same cache."""
    tokenizer = byte_tokenizer()
    (needle,) = hide(tokenizer, plan.texts[0].sequences[0], (260,), (0.5,))
    rules = dict.fromkeys(plan.subject.full_layers, TopK(3))
    found = [ours for ours, _ in answer(model, plan.subject, needle, [{}, rules, {}], plan.first)]
    for tokens, likelihood in zip(needle.answers, found[0].likelihoods, strict=True):
        given = torch.tensor([needle.prompt + needle.question + tokens])
        with torch.inference_mode():
            known = model(given, use_cache=False).logits[0].float().log_softmax(dim=-1)
        rows = torch.arange(given.shape[1] - len(tokens) - 1, given.shape[1] - 1)
        assert likelihood == pytest.approx(known[rows, torch.tensor(tokens)].sum().item(), rel=1e-3)
    assert found[2].likelihoods == pytest.approx(found[0].likelihoods, rel=1e-4)
    assert found[1].likelihoods != pytest.approx(found[0].likelihoods, rel=1e-4)


def test_command_writes_one_record_for_each_rule_target_and_text(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    out, picture = tmp_path / "out.json", tmp_path / "out.svg"
    more = [
        "--rows",
        "0.5",
        "0.8",
        "--k",
        "64",
        "--rules",
        "toptheta",
        "topk",
        "--needles",
        "256",
        "--depths",
        "0.5",
    ]
    assert main(command(folder, *more, "--json", str(out), "--plot", str(picture))) == 0
    records = json.loads(out.read_text())
    found = {(r["text"], r["rule"], r["rows_target"], r["k"]) for r in records}
    jobs = [
        ("toptheta", None, 64),
        *((rule, rows, None) for rule in ("toptheta", "topk") for rows in (0.5, 0.8)),
    ]
    assert found == {(text, *job) for text in ("play.txt", "code.txt", "needles") for job in jobs}
    assert len(records) == len(found)
    for record in records:
        assert set(KEYS) <= set(record)
        assert all(math.isfinite(record[key]) for key in KEYS[3:])
        assert 0 < record["v_rows_read"] <= 1
        ratio = record["perplexity"] / record["perplexity_dense"] - 1
        assert record["loss_pct"] == pytest.approx(100 * ratio, abs=1e-3)
        if record["text"] == "needles":
            assert record["cells"][0]["length"] == 256
        else:
            assert record["by_position"][0]["from"] == LENGTHS[0]
            assert record["by_position"][-1]["to"] == LONGEST - 1
    shipped = next(r for r in records if r["k"] == 64)
    assert shipped["dense_layers"] == [1]
    assert picture.read_text().startswith("<?xml")
    assert "toptheta" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rules", "topk", "magic"], "--rules magic: unknown; allowed: toptheta"),
        (["--rows", "0"], "shares lie above 0"),
        (["--rows"], "nothing to evaluate"),
        (["--k", "7"], "k is 7, but the table has budgets 64, 128"),
        (["--rules", "topk", "--k", "64"], "--rules names none of toptheta"),
        (["--rows", "0.3", "--dense-layers", "1"], "raise the target, or name fewer --dense-layers"),
        (["--dense-layers", "9"], r"--dense-layers \[9\] are not full-attention layers"),
        (["--dense-layers", "x"], "--dense-layers x: layer numbers, or none"),
        (["--needles", "64"], "--needles 64: prompts are longer than the table's first length, 64"),
        (["--depths", "2"], "--depths 2.0: 0 is the start"),
        (["--num-samples", "9"], "the text has 1400 tokens"),
        (["--thresholds", "none"], "an evaluation needs thresholds"),
        (["--json", "/nowhere/at/all.json"], "the folder does not exist"),
        (["--tune-on", "absent.txt"], "no such file"),
    ],
)
def test_errors_come_before_the_weights(folder, more, message, capsys, monkeypatch):
    monkeypatch.setattr(
        "topt_vllm.calibration.model.load_causal_lm", lambda options: pytest.fail("weights loaded")
    )
    monkeypatch.setattr(
        "topt_vllm.evaluation.run.load_causal_lm", lambda options: pytest.fail("weights loaded")
    )
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


def test_dry_run_loads_nothing(folder, capsys, monkeypatch):
    monkeypatch.setattr(
        "topt_vllm.evaluation.run.load_causal_lm", lambda options: pytest.fail("weights loaded")
    )
    assert main(command(folder, "--dry-run", "--tune-on", str(folder / "code.txt"))) == 0
    shown = capsys.readouterr().out
    assert "tuned on      code.txt" in shown
    assert "at 5%: none" in shown
