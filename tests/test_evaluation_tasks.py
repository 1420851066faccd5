"""Tasks after RULER and generated text: what prompts say, batches, records, errors before anything is loaded."""

import json
import math
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from table_factory import make_table
from tiny_models import SMALL, byte_tokenizer, save_model, save_text
from transformers import Gemma3TextConfig, LlamaConfig

from topt_vllm.cli.main import main
from topt_vllm.evaluation.cases import Case, answer, batches
from topt_vllm.evaluation.generation import sampled
from topt_vllm.evaluation.options import TASKS, EvaluationError, EvaluationOptions
from topt_vllm.evaluation.rules.topk import TopK
from topt_vllm.evaluation.task_records import scores, summary
from topt_vllm.evaluation.tasks.haystack import Haystack
from topt_vllm.evaluation.tasks.making import make_cases
from topt_vllm.replay.attention import RuleAttention
from topt_vllm.replay.dense_pass import DensePass
from topt_vllm.replay.generation import generate
from topt_vllm.replay.model import examine, load_causal_lm
from topt_vllm.table.file import dump
from topt_vllm.table.identity import identify

LENGTH = 1900
LONG = ("--max-seq-length", "400")
GEMMA = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
CONFIGS = {"llama": LlamaConfig(**SMALL), "gemma3": Gemma3TextConfig(**SMALL, **GEMMA)}


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS.keys())
def folder(request, tmp_path_factory) -> Path:
    """A model with its table and a text."""
    made = save_model(tmp_path_factory.mktemp("model"), request.param)
    identity = identify(transformers.AutoConfig.from_pretrained(made), "tiny")
    dump(make_table(identity, lengths=[64, 128, 256], dense_layers=(1,)), made / "toptheta.yaml")
    save_text(made / "play.txt", 4000)
    return made


@pytest.fixture(scope="module")
def model(folder):
    return load_causal_lm(str(folder), "cpu", "float32")


def made(task: str, count: int = 7, length: int = LENGTH) -> list[Case]:
    tokenizer = byte_tokenizer()
    text = tokenizer((Path(__file__).parent / "test_evaluation_tasks.py").read_text())["input_ids"]
    return make_cases(task, tokenizer, text[:4000], length, count)


def read(case: Case) -> tuple[str, str, list[str]]:
    """Prompt, question and answers."""
    decode = byte_tokenizer().decode
    return decode(case.prompt), decode(case.question), [decode(tokens).strip() for tokens in case.answers]


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_stands_in_the_prompt_and_has_as_many_tokens(task):
    cases = made(task)
    assert len(cases) == 7
    assert cases == made(task)
    for case in cases:
        prompt, _, answers = read(case)
        assert len(case.prompt) + len(case.question) <= case.length == LENGTH
        assert len(set(answers)) == 6
        assert all(found in prompt for found in answers)
        assert len({len(tokens) for tokens in case.answers}) == 1
    assert len({tuple(case.question) for case in cases if case.prompt is cases[0].prompt}) > 1


def test_multikey_asks_for_the_number_of_its_key():
    for case in made("multikey"):
        prompt, question, answers = read(case)
        key = re.search(r"of the (\w+)\?", question)[1]
        assert f"The secret number of the {key} is {answers[0]}." in prompt


def test_variables_lead_to_the_value_over_four_hops():
    for case in made("variables"):
        prompt, question, answers = read(case)
        name = re.search(r"variable (\w+)\?", question)[1]
        assert question.endswith(f"VAR {name} =")
        hops = 0
        while not name.isdecimal():
            found = re.search(rf"VAR {name} = (?:VAR )?(\w+)\n", prompt)
            prompt, name, hops = prompt[: found.start()], found[1], hops + 1
        assert (name, hops) == (answers[0], 5)


def test_common_words_stand_ten_times_as_often_as_the_others():
    for case in made("common-words"):
        prompt, question, answers = read(case)
        listed = re.search(r"List of words: ([^.]*)\.", prompt)[1]
        assert len(listed) > 0.8 * LENGTH
        counts = Counter(listed.split(", "))
        named = re.search(r"are (.*),$", question)[1].split(", ")
        assert {word for word, count in counts.items() if count == 30} == {answers[0], *named}
        assert {count for word, count in counts.items() if word not in (answers[0], *named)} == {3}


def test_frequent_words_are_asked_for_by_rank():
    for case in made("frequent-words"):
        prompt, question, answers = read(case)
        counts = Counter(re.search(r"List of words: ([^.]*)\.", prompt)[1].split(", "))
        named = [word.strip() for word in question.rpartition(" are")[2].split(",") if word]
        ranked = [word for word, _ in counts.most_common()]
        assert ranked[: len(named) + 1] == [*named, answers[0]]
        assert all(counts[answers[0]] > counts[wrong] for wrong in answers[1:])


def test_questions_are_about_one_person_s_paragraph_in_other_words():
    for case in made("questions"):
        prompt, question, answers = read(case)
        name = re.search(r"Answer: (\w+ \w+)", question)[1]
        (paragraph,) = [part for part in prompt.split("\n\n") if name in part]
        assert re.search(rf"\b{answers[0]}\b", paragraph)
        assert not any(wrong in paragraph for wrong in answers[1:])
        assert question.partition("Answer: ")[2] not in prompt


def test_a_prompt_too_short_and_words_without_likes_are_refused():
    with pytest.raises(EvaluationError, match=r"--task-lengths 900: too short for questions, whose facts"):
        made("questions", length=900)
    haystack = Haystack("questions", byte_tokenizer(), [], LENGTH, random.Random(0))
    with pytest.raises(EvaluationError, match="no more than 2 have equally many tokens, and --tasks needs 3"):
        haystack.alike(["one", "two", "three", "one"], 3)


@pytest.mark.parametrize("task", ["multikey", "frequent-words"])
def test_a_batch_answers_as_its_cases_one_by_one(folder, model, task):
    subject = examine(str(folder))
    cases = made(task, count=3)
    prompt = DensePass(model, subject, cases[0].prompt)
    rules = dict.fromkeys(subject.full_layers, TopK(3))

    def run(batch: list[Case]) -> tuple[list, RuleAttention]:
        contexts = batch[0].contexts.repeat(len(batch))
        right, wrong = (RuleAttention(subject, rules, contexts) for _ in range(2))
        return answer(prompt, batch, right, wrong), right

    for batch in batches(cases):
        together, counted = run(batch)
        apart = [run([case]) for case in batch]
        for mine, ((alone,), _) in zip(together, apart, strict=True):
            assert mine.likelihoods == pytest.approx(alone.likelihoods, rel=1e-4)
        for name in ("v_rows", "v_rows_read", "elements", "elements_kept", "sparse"):
            assert getattr(counted.counts, name) == sum(getattr(found.counts, name) for _, found in apart)


def test_generation_is_the_model_s_own_greedy_text_and_a_rule_s_that_keeps_all(folder, model):
    subject = examine(str(folder))
    tokens = list(byte_tokenizer()((folder / "play.txt").read_text())["input_ids"][:150])
    prompt = DensePass(model, subject, tokens[:-1])

    def greedy(_: int, probabilities: torch.Tensor) -> int:
        return int(probabilities.argmax())

    found = generate(prompt, tokens[-1], 40, greedy)
    known = list(tokens)
    for _ in range(40):
        with torch.inference_mode():
            known.append(int(model(torch.tensor([known]), use_cache=False).logits[0, -1].argmax()))
    assert found == known[150:]

    contexts = torch.arange(150, 190)
    every = RuleAttention(subject, dict.fromkeys(subject.full_layers, TopK(10**6)), contexts)
    assert generate(prompt, tokens[-1], 40, greedy, every) == found
    assert every.counts.v_rows_read == every.counts.v_rows
    few = RuleAttention(subject, dict.fromkeys(subject.full_layers, TopK(2)), contexts)
    assert generate(prompt, tokens[-1], 40, greedy, few) != found
    assert few.counts.elements_kept < every.counts.elements_kept


def test_tokens_are_drawn_as_often_as_they_are_likely_and_alike_at_a_step():
    probabilities = torch.tensor([0.5, 0.3, 0.2]).log()
    drawn = Counter(sampled(step, probabilities) for step in range(2000))
    for token, share in enumerate((0.5, 0.3, 0.2)):
        # Four standard deviations.
        assert drawn[token] / 2000 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 2000))
    assert sampled(7, probabilities) == sampled(7, probabilities + 1)


def test_a_task_counts_by_exact_answers_where_dense_attention_gives_them():
    def answered(exact: bool, dense: bool, margin: float) -> dict:
        ours = {"exact": exact, "retrieved": exact, "margin": margin}
        return ours | {"exact_dense": dense, "retrieved_dense": True, "margin_dense": 1.0}

    found = scores([answered(False, True, 0.5), answered(False, False, 1.0), answered(True, False, 0.0)])
    assert (found["exact"], found["exact_dense"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert found["judged_by"] == "exact"
    assert (found["margin"], found["margin_difference"]) == (0.5, -0.5)
    assert found["margin_difference_se"] == pytest.approx(0.5 / math.sqrt(3), abs=1e-5)
    poor = scores([answered(True, False, 2.0)])
    assert (poor["judged_by"], poor["margin_difference_se"]) == ("margin", None)
    facts = {"rule": "toptheta", "rows_target": None, "k": 64, "k_screen": "int4"}
    records = [facts | {"task": "multikey", "context": length} | found for length in (1024, 4096)]
    records += [facts | {"task": "questions", "context": length} | poor for length in (1024, 4096)]
    records += [facts | {"text": "play.txt"}]
    _, title, head, first, second, *_ = summary(records).split("\n")
    assert title == "toptheta at k=64, K screen int4"
    assert head.split() == ["1024", "tokens", "4096", "tokens"]
    assert re.fullmatch(r"multikey( +exact 33% → 33%){2}", first)
    assert re.fullmatch(r"questions( +margin \+1\.00 → \+2\.00 \(±nan\)){2}", second)
    assert summary(records[-1:]) == ""
    # Targets within a percent of each other stay apart.
    near = [records[0] | {"rows_target": share} for share in (0.061, 0.064)]
    assert {"toptheta at 6.1%, K screen int4", "toptheta at 6.4%, K screen int4"} < set(
        summary(near).split("\n")
    )


def command(folder: Path, *more: str) -> list[str]:
    text = ("--dataset", str(folder / "play.txt"), "--device", "cpu", "--skip-texts")
    return ["evaluate", "--model", str(folder), *text, *more]


def test_command_writes_a_record_for_each_task_length_and_text(folder, tmp_path, capsys):
    out = tmp_path / "out.json"
    asked = ("--rules", "toptheta", "--rows", "--budget", "64", "--tasks", *TASKS, "--task-cases", "2")
    more = ("--task-lengths", str(LENGTH), "--lengths", "400", "--generate", "30", "--json", str(out))
    assert main(command(folder, *asked, *more)) == 0
    *tasks, generated = json.loads(out.read_text())
    assert [record["task"] for record in tasks] == list(TASKS)
    for record in tasks:
        assert (record["text"], record["context"], record["cases"]) == (record["task"], LENGTH, 2)
        assert record["margin_difference"] == pytest.approx(
            record["margin"] - record["margin_dense"], abs=1e-5
        )
        assert record["judged_by"] in ("exact", "margin")
        assert 0 < record["v_rows_read"] <= 1
        assert 0.5 < record["kv_bytes_read"] <= 1
        assert len(record["answers"]) == 2
    assert (generated["text"], generated["context"], generated["tokens"]) == ("generated", 400, 30)
    assert generated["first_context"] == 370
    assert 0 <= generated["tokens_until_difference"] <= 30
    assert generated["free_perplexity_dense"] == pytest.approx(generated["perplexity_dense"], rel=1e-5)
    assert generated["free_perplexity"] > 1
    assert 0 < generated["free_loss_pct_se"] < 100
    printed = capsys.readouterr().out
    assert f"{LENGTH} tokens\nmultikey  " in printed
    assert "its own text: perplexity" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], r"--skip-texts .* leaves nothing to evaluate; name --needles, --tasks or --generate"),
        (["--tasks", "multikey", "--task-cases", "0"], "--task-cases is 0; it must be at least 1"),
        (
            [*LONG, "--tasks", "multikey", "--task-lengths", "64"],
            "--task-lengths 64: prompts are longer than the",
        ),
        (
            ["--generate", "9", "--task-cases", "3"],
            "--task-lengths and --task-cases are for --tasks; name some",
        ),
        (["--tasks", "multikey"], "--task-lengths 4096: the model's context is 2048 tokens"),
        (["--tasks", "questions", "--task-lengths", "700"], "--task-lengths 700: too short for questions"),
        (["--generate", "1"], "--generate is 1; it must be at least 2, or 0"),
        (["--generate", "337", "--lengths", "400"], "has 336 tokens behind the table's first length, 64"),
        (
            ["--generate", "9", "--rules", "topk", "sift"],
            "--generate decodes token by token, and --rules sift",
        ),
    ],
)
def test_errors_come_before_the_weights(folder, more, message, capsys, monkeypatch):
    monkeypatch.setattr("topt_vllm.evaluation.run.load_causal_lm", lambda *_: pytest.fail("weights loaded"))
    assert main(command(folder, *more)) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error


def test_models_with_a_state_generate_nothing(folder, monkeypatch, capsys):
    subject = replace(examine(str(folder)), stateful=True)
    monkeypatch.setattr("topt_vllm.evaluation.plan.examine", lambda *_, **__: subject)
    assert main(command(folder, "--generate", "9", "--lengths", "400")) == 2
    assert "--generate decodes from K and V alone" in capsys.readouterr().err


def test_options_in_python():
    assert EvaluationOptions("m", ("t",), tasks=("multikey",)).task_lengths == (4096,)
