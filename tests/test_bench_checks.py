"""What the decode benchmark checks before it times anything, on small synthetic caches."""

import itertools
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import implementation

from topt_vllm.attention.common import Policy, Thetas
from topt_vllm.benchmarks import comparison
from topt_vllm.benchmarks.cases import Inputs, Shape, make_inputs, thetas_for
from topt_vllm.benchmarks.comparison import Target, compare
from topt_vllm.benchmarks.oracle import expect
from topt_vllm.cli.main import main


def small_case() -> Inputs:
    return make_inputs(Shape(2, 300, 4, 2, 32, 64, torch.bfloat16))


def test_synthetic_cases_take_screens(tmp_path: Path):
    report = tmp_path / "report.json"
    command = (
        "bench decode --batch 2 --seq-lens 400 --heads 4 --kv-heads 2 --head-dim 64 --keep 1.0 0.1 "
        f"--seconds 0 --k-screen off int8 --json {report}"
    )
    assert main(shlex.split(command)) == 0
    records = json.loads(report.read_text())
    found = [(r["keep_target"], r["k_screen"]) for r in records]
    assert found == [(1.0, "off"), (0.1, "off"), (0.1, "int8")]
    assert records[1]["v_rows_read"] == records[2]["v_rows_read"]


@pytest.mark.parametrize("group_keep", ["head", "union"])
@pytest.mark.parametrize("compensation", ["none", "vmean"])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_the_oracle_is_the_reference_operator(group_keep: Any, compensation: Any, softcap: float):
    policy = Policy(group_keep=group_keep, compensation=compensation, recent_tokens=3)
    inputs = replace(small_case(), softcap=softcap)
    thetas = thetas_for(inputs, 0.2, policy)
    out = torch.empty_like(inputs.query, dtype=torch.float32)
    implementation("reference").decode(
        inputs.query, inputs.cache, inputs.batch, thetas, policy, inputs.scale, softcap, out, None
    )
    expectation = expect(inputs, thetas, policy)
    assert expectation.ties == 0
    torch.testing.assert_close(out.double(), expectation.exact, atol=1e-5, rtol=1e-5)


def test_a_key_at_theta_is_counted_as_a_tie_and_may_fall_either_way():
    inputs, policy = small_case(), Policy()
    exact = thetas_for(inputs, 0.2, policy)
    score = inputs.scores(torch.float32)[0, 1].sort().values[-20]
    theta = exact.theta.clone()
    theta[1] = score
    outs = []
    for shifted in (theta, torch.nextafter(theta, torch.tensor(torch.inf))):
        thetas = Thetas(exact.lengths, shifted, exact.law)
        expectation = expect(inputs, thetas, policy)
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
        compare([inputs], [Target(1.0, [None])], ["off"], Policy(), 0)


def test_a_screen_that_keeps_other_keys_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    inputs, policy = small_case(), Policy()
    counts = itertools.count()
    monkeypatch.setattr(comparison, "_kept", lambda _: torch.tensor(next(counts)))
    monkeypatch.setattr(comparison, "take_turns", pytest.fail)
    with pytest.raises(RuntimeError, match="k_screen int8: keeps other keys"):
        compare([inputs], [Target(0.2, [thetas_for(inputs, 0.2, policy)])], ["int8"], policy, 0)


def test_thresholds_that_rounding_decides_about_are_refused(monkeypatch: pytest.MonkeyPatch):
    inputs, policy = small_case(), Policy()
    real = comparison.expect
    monkeypatch.setattr(comparison, "expect", lambda *given: replace(real(*given), ties=100))
    with pytest.raises(RuntimeError, match="rounding decides about 100 of"):
        compare([inputs], [Target(0.2, [thetas_for(inputs, 0.2, policy)])], ["off"], policy, 0)
