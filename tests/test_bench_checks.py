"""What the decode benchmark checks before it times anything, on small synthetic caches."""

import json
import platform
import re
import shlex
import subprocess
from argparse import ArgumentTypeError
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import implementation

from topt_vllm.attention.common import Selection, Thetas
from topt_vllm.attention.screen import refined_scores, screen_scores
from topt_vllm.benchmarks import comparison, devices, timing
from topt_vllm.benchmarks.cases import Inputs, Shape, make_inputs, thetas_for
from topt_vllm.benchmarks.comparison import ThetaSet, compare
from topt_vllm.benchmarks.devices import Cpu
from topt_vllm.benchmarks.lengths import describe_lengths, parse_lengths
from topt_vllm.benchmarks.oracle import expect
from topt_vllm.benchmarks.screens import NO_SCREEN, Screens, plain_transform, specified, ties, with_screen
from topt_vllm.benchmarks.timing import Call, Variant, take_turns
from topt_vllm.cli import bench_output
from topt_vllm.cli.main import main

SHAPE = Shape((300, 300), 4, 2, 32, 64, torch.bfloat16)
TRANSFORM = plain_transform(SHAPE)


def small_case() -> Inputs:
    return make_inputs(SHAPE)


def ragged_case(**changes: Any) -> Inputs:
    return make_inputs(Shape((700, 33, 64, 300), 4, 2, 32, 64, torch.bfloat16, **changes))


@pytest.mark.parametrize(("text", "lengths"), [("1x131072+2x4096", (131072, 4096, 4096)), ("3x1", (1, 1, 1))])
def test_lengths_are_read_and_written(text: str, lengths: tuple[int, ...]):
    assert parse_lengths(text) == lengths
    assert describe_lengths(lengths) == text


@pytest.mark.parametrize("text", ["", "4096", "0x5", "1x0", "1x5+", "1x5,2x6", "-1x5"])
def test_what_is_no_lengths_is_refused_with_an_example(text: str):
    with pytest.raises(ArgumentTypeError, match=r"no COUNTxLENGTH.*1x131072\+15x4096"):
        parse_lengths(text)


def test_a_ragged_batch_has_the_blocks_that_its_lengths_need():
    inputs = ragged_case()
    shape, table = inputs.shape, inputs.batch.block_table
    assert shape.sequence_blocks == (11, 1, 1, 5)
    assert table.shape == (4, 11)
    used = torch.cat([row[:count] for row, count in zip(table, shape.sequence_blocks, strict=True)])
    assert sorted(used.tolist()) == list(range(18))
    assert [row.shape for row in inputs.scores(torch.float32)] == [(4, n) for n in shape.lengths]


def test_every_length_of_a_ragged_batch_reads_the_share():
    inputs, selection = make_inputs(Shape((2048, 1024, 1024), 4, 2, 32, 64, torch.bfloat16)), Selection()
    thetas = thetas_for(inputs, 0.1, selection)
    assert thetas is not None
    assert thetas.lengths.tolist() == [1024, 2048]
    for n in (1024, 2048):
        alike = [row for row in inputs.scores(torch.float32) if row.shape[1] == n]
        kept = torch.stack(alike) >= thetas.at(n)[:, None]
        kept[:, :, n - inputs.shape.rows_behind_sums(n) :] = True
        assert float(kept.unflatten(1, (2, 2)).any(dim=2).float().mean()) == pytest.approx(0.1, abs=0.01)


def bench_decode(options: str, folder: Path) -> list[dict[str, Any]]:
    """The records of `topt-vllm bench decode`, which checks and hardly times."""
    report = folder / "report.json"
    assert main(shlex.split(f"bench decode {options} --seconds 0 --json {report}")) == 0
    return json.loads(report.read_text())


@pytest.mark.parametrize("options", ["", "--k-screen off int4+4", "--compensation none", "--group-keep head"])
def test_ragged_batches_are_checked_and_timed(tmp_path: Path, options: str):
    shape = "--ragged 1x700+3x130 2x64 --heads 4 --kv-heads 2 --head-dim 32 --block-size 64"
    records = bench_decode(f"{shape} --keep 1.0 0.2 {options}", tmp_path)
    assert {record["lengths"] for record in records} == {"1x700+3x130", "2x64"}
    full = records[0]
    assert (full["batch"], full["seq_len"]) == (4, 700)
    assert full["bytes_moved"] == 2 * (700 + 3 * 130) * 2 * 32 * 2
    assert records[1]["v_rows_read"] < 0.4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ragged 1x700 --batch 2", "leave out --batch and --seq-lens"),
        ("--ragged 1x700 --seq-lens 64", "leave out --batch and --seq-lens"),
        ("--ragged 1x10 --keep 0.1", "too few scores"),
        ("--ragged 1x700 --cache some.safetensors", "--ragged describes a synthetic cache"),
    ],
)
def test_ragged_batches_that_mean_nothing_are_refused(
    options: str, message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(shlex.split(f"bench decode {options}")) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("decode --kv-heads 0", "--kv-heads 0: at least 1 is needed"),
        ("decode --heads -8", "--heads -8: at least 1"),
        ("decode --batch 4 0", "--batch 0: at least 1"),
        ("decode --seq-lens 64 -5", "--seq-lens -5: at least 1"),
        ("decode --threads 0", "--threads 0: at least 1"),
        ("decode --seconds nan", "--seconds nan: at least 0"),
        ("decode --head-dim 65", "--head-dim 65: a multiple of 16 is needed"),
        ("decode --block-size 100", "--block-size 100: a multiple of 16"),
        ("decode --device cuda --head-dim 65", "--head-dim 65: a multiple of 8"),
        ("decode --keep 1.0 --k-screen int4+4", "where every row is kept there is nothing to screen"),
        ("autotune --batch 0", "--batch 0: at least 1"),
        ("autotune --kv-heads 3", "--heads 32 is not a multiple of --kv-heads 3"),
        ("engine --shape llama-8b --tokens 1", "--tokens 1: at least 2"),
        ("engine --shape llama-8b --batch 0", "--batch 0: at least 1"),
        ("engine --shape llama-8b --keep 0.1 0.1", "a share is named twice"),
        ("engine --model /no/such/folder", "no config.json"),
        ("serve --model m --dataset t --concurrency 0", "--concurrency 0: at least 1"),
        ("serve --model m --dataset t --max-tokens 1", "--max-tokens 1: at least 2"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(
    options: str, message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(shlex.split(f"bench {options}")) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("bench decode --k-screen off int3", "invalid choice: 'int3' (choose from"),
        (
            "bench decode --k-screen-margin wide",
            "'wide': a number of standard deviations is expected, or hard",
        ),
        ("bench serve --model m --dataset t --toptheta [1]", "'[1]': a JSON object is expected, such as '{"),
        ("bench serve --model m --dataset t --toptheta null", "'null': a JSON object is expected"),
        (
            "calibrate --model m --dataset t --max-loss little",
            "'little': a percentage is expected, such as 1%",
        ),
        ("evaluate --model m --dataset t --rules topk magic", "--rules: invalid choice: 'magic'"),
        ("evaluate --model m --dataset t --tasks multikey magic", "--tasks: invalid choice: 'magic'"),
        ("evaluate --model m --dataset t --rows few", "'few': a share is expected, such as 0.1 or 10%"),
        ("bench decode --keep few%", "'few%': a share is expected, such as 0.1 or 10%"),
        ("bench autotune --keep 0", "'0': a share above 0 and up to 1 is expected"),
        (
            "bench engine --shape llama-8b --keep few",
            "'few': a share above 0 and up to 1 is expected, or none",
        ),
        ("bench engine --shape llama-8b --keep 0", "'0': a share above 0 and up to 1 is expected, or none"),
        ("bench engine --shape llama-8b --engine []", "'[]': a JSON object is expected"),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(
    command: str, message: str, capsys: pytest.CaptureFixture[str]
):
    """Those of users, not names of functions."""
    with pytest.raises(SystemExit):
        main(shlex.split(command))
    assert message in capsys.readouterr().err


def test_a_kernel_that_cannot_be_built_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def prepare(device_type: str) -> None:
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr("topt_vllm.attention.cpu.launcher.prepare", prepare)
    assert main(["bench", "decode", "--json", str(tmp_path / "out.json")]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "topt-vllm: error: no C++ compiler found\n")


def test_synthetic_cases_take_screens(tmp_path: Path):
    shape = "--batch 2 --seq-lens 400 --heads 4 --kv-heads 2 --head-dim 64"
    records = bench_decode(f"{shape} --keep 1.0 0.1 --k-screen off int4+4", tmp_path)
    found = [(r["keep_target"], r["k_screen"]) for r in records]
    assert found == [(1.0, "off"), (0.1, "off"), (0.1, "int4+4")]
    assert records[2]["v_rows_read"] == pytest.approx(records[1]["v_rows_read"], rel=0.1)
    assert records[2]["loss"] == pytest.approx(records[1]["loss"], rel=0.1)


@pytest.mark.parametrize(("screen", "margin"), [("int4+4", 2.5), ("int4", 0.0)])
@pytest.mark.parametrize("compensation", ["none", "vmean"])
def test_what_rounding_decides_behind_a_screen_is_allowed_for(screen: Any, margin: float, compensation: Any):
    """θ at what a screen says of a key: whether that is kept is rounding's to say, and it moves the output."""
    selection = Selection(group_keep="head", compensation=compensation)
    shape = Shape((1200,), 2, 1, 64, 64, torch.bfloat16)
    inputs = make_inputs(shape)
    exact = inputs.scores(torch.float32)[0][0]
    transform = plain_transform(shape)
    inputs = with_screen(implementation("reference"), inputs, screen, transform, margin)
    keys = transform.encode(inputs.gather(0, 0, torch.float32)[0][None])
    queries = transform.queries(inputs.query[0])
    upper = screen_scores(queries, keys, margin, inputs.scale)[1][0]
    # What is said of a key, and what else has to keep it.
    said, other = upper, exact
    if screen == "int4+4":
        said, other = refined_scores(queries, keys, inputs.scale)[0], upper
    score = said[:1100][other[:1100] > said[:1100]].sort().values[-30]

    def specified_at(theta: torch.Tensor) -> tuple[torch.Tensor, float]:
        thetas = thetas_for(inputs, 0.1, selection)
        assert thetas is not None
        thetas = replace(thetas, theta=torch.stack([theta, thetas.theta[1, 0]])[:, None])
        return specified(inputs, thetas, selection).double(), ties(inputs, thetas, selection)

    _, allowed = specified_at(score)
    (kept, _), (dropped, _) = specified_at(score - 2e-6), specified_at(score + 2e-6)
    # To a thousandth, for the softmax is of other scores.
    assert 0 < float((kept - dropped).abs().max()) <= 1.001 * allowed
    assert specified_at(score + 1e-3)[1] < allowed


@pytest.mark.parametrize("group_keep", ["head", "union"])
@pytest.mark.parametrize("compensation", ["none", "vmean"])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("make", [small_case, ragged_case])
def test_the_oracle_is_the_reference_operator(
    make: Callable[[], Inputs], group_keep: Any, compensation: Any, softcap: float
):
    selection = Selection(group_keep=group_keep, compensation=compensation, recent_tokens=3)
    inputs = replace(make(), softcap=softcap)
    thetas = thetas_for(inputs, 0.2, selection)
    out = torch.empty_like(inputs.query, dtype=torch.float32)
    implementation("reference").decode(inputs.arguments(thetas, selection, out))
    expectation = expect(inputs, thetas, selection)
    assert expectation.ties == 0
    torch.testing.assert_close(out.double(), expectation.exact, atol=1e-5, rtol=1e-5)


def test_a_key_at_theta_is_counted_as_a_tie_and_may_fall_either_way():
    inputs, selection = small_case(), Selection()
    exact = thetas_for(inputs, 0.2, selection)
    score = inputs.scores(torch.float32)[0][1].sort().values[-20]
    theta = exact.theta.clone()
    theta[1] = score
    outs = []
    for shifted in (theta, torch.nextafter(theta, torch.tensor(torch.inf))):
        thetas = Thetas(exact.lengths, shifted, exact.law)
        expectation = expect(inputs, thetas, selection)
        assert expectation.ties == 1
        outs.append(expectation)
    assert outs[0].error(outs[1].exact) <= outs[0].allowed
    assert not torch.equal(outs[0].exact, outs[1].exact)


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    inputs = small_case()
    real = comparison.expect
    monkeypatch.setattr(
        comparison, "expect", lambda *given: replace(real(*given), exact=real(*given).exact + 0.5)
    )
    monkeypatch.setattr(comparison, "take_turns", pytest.fail)
    with pytest.raises(RuntimeError, match=r"error 0\.5.* against float64.*not timed"):
        compare([inputs], [ThetaSet(1.0, [None])], NO_SCREEN, [TRANSFORM], Selection(), 0)


def test_a_screen_that_is_not_the_reference_operators_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    inputs, selection = small_case(), Selection()
    monkeypatch.setattr(comparison, "specified", lambda inputs, *_: torch.zeros(inputs.query.shape))
    monkeypatch.setattr(comparison, "take_turns", pytest.fail)
    target = ThetaSet(0.2, [thetas_for(inputs, 0.2, selection)])
    with pytest.raises(RuntimeError, match=r"k_screen int4\+4: error .* not timed"):
        compare([inputs], [target], Screens(["int4+4"]), [TRANSFORM], selection, 0)


def test_thresholds_that_rounding_decides_about_are_refused(monkeypatch: pytest.MonkeyPatch):
    inputs, selection = small_case(), Selection()
    real = comparison.expect
    monkeypatch.setattr(comparison, "expect", lambda *given: replace(real(*given), ties=100))
    target = ThetaSet(0.2, [thetas_for(inputs, 0.2, selection)])
    with pytest.raises(RuntimeError, match="rounding decides about 100 of"):
        compare([inputs], [target], NO_SCREEN, [TRANSFORM], selection, 0)


def test_a_call_goes_over_copies_until_caches_hold_little_of_them(monkeypatch: pytest.MonkeyPatch):
    """And a record tells what one of them takes."""
    inputs = small_case()
    other = deepcopy(inputs)
    assert other.cache.key.untyped_storage().data_ptr() == other.memory.data_ptr()
    assert torch.equal(other.cache.key, inputs.cache.key)
    assert torch.equal(other.cache.value, inputs.cache.value)
    for part in ("key", "value", "value_sums"):
        assert getattr(other.cache, part).data_ptr() != getattr(inputs.cache, part).data_ptr()
    monkeypatch.setattr(devices, "_COLD_BYTES", 2 * inputs.memory.nbytes + 1)
    monkeypatch.setattr(Cpu, "measure", lambda self, call: 6.0)
    thetas = thetas_for(inputs, 0.2, Selection())
    records = compare(
        [inputs], [ThetaSet(0.2, [thetas])], Screens(["off", "int4+4"]), [TRANSFORM], Selection(), 0
    )
    assert [(record["copies"], record["ms"]) for record in records] == [(3, 2000.0)] * 2


def test_a_kernel_comes_after_itself_when_it_is_timed():
    called: list[str] = []

    def measured(call: Call) -> float:
        called.append("timed")
        call()
        return 1.0

    variants = [Variant(name, partial(called.append, name), []) for name in ("a", "b", "c")]
    take_turns(variants[:2], 0, variants[2], measured)
    assert called[:10] == ["a", "timed", "a", "b", "timed", "b", "c", "timed", "c", "a"]
    assert [len(variant.seconds) for variant in variants] == [7, 7, 2]


def test_a_wrong_rival_is_left_out_with_the_reason():
    def wrong(layers: Any) -> tuple[list[Variant], dict[str, str]]:
        outs = [torch.empty_like(inputs.query) for inputs in layers]
        return [Variant("wrong", lambda: [out.fill_(0.5) for out in outs], outs)], {"absent": "not here"}

    class Device(Cpu):
        rivals = staticmethod(wrong)

    [record] = compare(
        [small_case()], [ThetaSet(1.0, [None])], NO_SCREEN, [TRANSFORM], Selection(), 0, Device()
    )
    assert record["platform"] is None
    assert record["left_out"]["absent"] == "not here"
    assert "against float64" in record["left_out"]["wrong"]


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        ("cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\n", "AMD EPYC (family 26, model 2)"),
        ("processor\t: 0\nCPU part\t: 0xd4f\n", platform.processor()),
        ("processor\t: 0\nmodel name\t: ARMv8\n", "ARMv8"),
    ],
)
def test_records_name_the_processors_generation(
    lines: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "cpuinfo").write_text(lines)
    monkeypatch.setattr(timing, "_PROCESSORS", tmp_path / "cpuinfo")
    assert timing.machine()["cpu"] == name


def test_the_commit_is_that_of_the_source_tree_or_none(tmp_path, monkeypatch):
    """Slim images have no git, and an installed package may lie in somebody else's tree."""
    package = tmp_path / "tree" / "lib" / "topt_vllm" / "cli"
    package.mkdir(parents=True)
    git = ["git", "-C", str(tmp_path / "tree"), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(bench_output, "__file__", str(package / "bench_output.py"))
    assert bench_output._commit() is None
    (tmp_path / "tree" / ".git").rename(tmp_path / "tree" / "lib" / ".git")
    assert re.fullmatch("[0-9a-f]{4,}", bench_output._commit())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bench_output._commit() is None
