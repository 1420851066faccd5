"""topt-vllm verify: each check can fail, a damaged table fails cleanly, and a real engine passes."""

import json
import math
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from topt_vllm.backend import compat
from topt_vllm.cli.main import main
from topt_vllm.engines.process import EngineError, ask
from topt_vllm.table.file import load
from topt_vllm.verify import engine, forcing, installation, plan, verdicts
from topt_vllm.verify.checks import CheckError
from topt_vllm.verify.engine import Forced, Request
from topt_vllm.verify.near_ties import compare
from topt_vllm.verify.run import verify

SHIPPED = Path(__file__).parent.parent / "configs" / "SmolLM2-135M-Instruct.yaml"


def test_tokens_may_differ_at_a_near_tie_only():
    stock = [[1, 2, 3], [1, 2, 3], [1, 2, 3]]
    ours = [[1, 2, 3], [1, 9, 9], [1, 9, 3]]
    # Steps of bfloat16 are 1/8 at 17; a difference of two is rounding.
    logits = [[(17.0, 3.0)] * 3, [(17.0, 3.0), (17.0, 16.75), (17.0, 3.0)], [(17.0, 16.5)] * 3]
    found = compare(ours, stock, logits, "bfloat16")
    assert (found.equal, found.ties) == (1, 1)
    assert len(found.wrong) == 1
    assert found.wrong[0].startswith("prompt 2, step 1: token 9 instead of 2")
    assert len(compare(ours, stock, logits, "float32").wrong) == 2
    around_zero = [[(0.0, -0.001)] * 3, [(0.0, 0.0)] * 3, [(0.0, -1.0)] * 3]
    found = compare(ours, stock, around_zero, "bfloat16")
    assert (found.equal, found.ties, len(found.wrong)) == (1, 1, 1)


def totals(read: float = 40.0, dense: float = 0.0, **counts: float) -> dict[str, float]:
    return {
        "toptheta:v_rows_total": 100.0,
        "toptheta:v_rows_read_total": read,
        "toptheta:decode_rows_total": 10.0,
        "dense_rows:no_thresholds": dense,
        **counts,
    }


def test_verdict_on_tokens():
    stock = {"tokens": [[1, 2]], "logits": [[(17.0, 3.0)] * 2], "dtype": "bfloat16", "totals": None}
    ours = {"tokens": [[1, 2]], "totals": totals(100.0, 10.0)}
    assert "1 prompts, 2 steps each, 1 equal" in verdicts.tokens(ours, stock)
    with pytest.raises(CheckError, match="token 3 instead of 2"):
        verdicts.tokens(ours | {"tokens": [[1, 3]]}, stock)
    with pytest.raises(CheckError, match="must read every V row"):
        verdicts.tokens(ours | {"totals": totals(99.0)}, stock)
    with pytest.raises(CheckError, match="although stock vLLM was asked for"):
        verdicts.tokens(ours, stock | {"totals": totals()})


@pytest.mark.parametrize(
    ("counted", "wrong"),
    [
        (totals(100.0, 4.0, **{"dense_rows:sliding_window": 6.0, "platform_rows:sliding_window": 6.0}), None),
        (
            totals(100.0, 4.0, **{"dense_rows:short_context": 6.0}),
            "another reason than θ = −inf: short_context",
        ),
        (totals(100.0, 10.0, **{"platform_rows:no_thresholds": 10.0}), "with itself.*reason: no_thresholds"),
        (totals(100.0, 0.0), "kernel decoded no row"),
        (None, "must read every V row; the counters say None"),
    ],
)
def test_theta_minus_infinity_is_a_check_of_our_kernel(counted: dict[str, float] | None, wrong: str | None):
    """Only layers with a window may be the platform's; otherwise stock vLLM was compared with itself."""
    stock = {"tokens": [[1, 2]], "logits": [[(17.0, 3.0)] * 2], "dtype": "bfloat16", "totals": None}
    ours = {"tokens": [[1, 2]], "totals": counted}
    if wrong is None:
        assert "1 equal" in verdicts.tokens(ours, stock)
        return
    with pytest.raises(CheckError, match=wrong):
        verdicts.tokens(ours, stock)


def test_our_kernel_is_named_on_gpus(monkeypatch: pytest.MonkeyPatch):
    """What ``auto`` does with layers without thresholds is the adapter's business there."""
    assert plan.no_table() == {"thresholds": "none"}
    monkeypatch.setattr(plan, "device_type", lambda: "cuda")
    assert plan.no_table() == {"thresholds": "none", "implementation": "triton"}


def test_verdict_on_rows():
    assert (
        verdicts.rows_skipped(totals(40.0, 2.0), None)
        == "40.0% of V rows read; dense rows: no_thresholds 20.0%"
    )
    with pytest.raises(CheckError, match=r"100 of 100 V rows were read; dense rows: no_thresholds 100\.0%"):
        verdicts.rows_skipped(totals(100.0, 10.0), None)
    with pytest.raises(CheckError, match="counted no decoded row"):
        verdicts.rows_skipped(totals() | {"toptheta:decode_rows_total": 0.0}, None)


@pytest.mark.parametrize(
    ("rise", "promised", "passes"),
    [
        (0.0, 0.5, True),
        (1.4, 0.5, True),
        (1.7, 0.5, False),
        (5.9, None, True),
        (6.2, None, False),
        (-3.0, 0.5, True),
    ],
)
def test_verdict_on_loss(rise: float, promised: float | None, passes: bool):
    """Every token loses the same, so the standard error is 0 and one point of tolerance is left."""
    prefilled = [-2.0 - 0.01 * i for i in range(64)]
    decoded = [value - math.log1p(rise / 100) for value in prefilled]
    if passes:
        assert f"perplexity {rise:+.2f} %" in verdicts.loss(decoded, prefilled, promised)
        return
    with pytest.raises(CheckError, match="Calibrate again"):
        verdicts.loss(decoded, prefilled, promised)


def test_noise_excuses_no_large_loss():
    """Half of the tokens lose everything: the standard error is as large as the loss."""
    decoded = [-2.0 if i % 2 else -20.0 for i in range(16)]
    with pytest.raises(CheckError, match=r"limit 3\.50 %"):
        verdicts.loss(decoded, [-2.0] * 16, 0.5)


def test_a_loss_that_is_not_a_number_fails():
    with pytest.raises(CheckError, match="no finite log-probability"):
        verdicts.loss([-2.0, math.nan, -2.0], [-2.0, -2.0, -2.0], 0.5)


def test_a_missing_or_wrong_vllm_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(installation.metadata, "requires", lambda _: ["vllm>=900", 'x>1; extra == "test"'])
    with pytest.raises(CheckError, match=r"vllm .* is installed, >=900 is needed"):
        installation.install()
    monkeypatch.setattr(installation.metadata, "requires", lambda _: ["no-such-distribution"])
    with pytest.raises(CheckError, match="no-such-distribution is not installed"):
        installation.install()


def test_an_environment_that_shuts_the_plugin_out_is_named(monkeypatch: pytest.MonkeyPatch):
    assert "vllm.platform_plugins" in installation.entry_points()
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    with pytest.raises(CheckError, match="VLLM_PLUGINS is 'another'"):
        installation.entry_points()


def engine_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Lets another program stand in for Python, and so for the engine."""
    program = tmp_path / "engine"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_an_engine_that_hangs_or_fails_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    request = Request({}, [])
    engine_script(tmp_path, monkeypatch, "cat >/dev/null; sleep 60")
    with pytest.raises(EngineError, match="no result within 0 s"):
        engine.run(request, 0.2)
    engine_script(tmp_path, monkeypatch, "cat >/dev/null; echo 'x.ConfigError: no table' >&2; exit 3")
    with pytest.raises(EngineError, match=r"exit status 3: x\.ConfigError: no table"):
        engine.run(request, 20)
    engine_script(tmp_path, monkeypatch, "cat >/dev/null; echo noise; echo 'RESULT {\"totals\": null}'")
    assert engine.run(request, 20) == {"totals": None}


_SHARES_MEMORY = """
import json, os, sys, time
from multiprocessing.shared_memory import SharedMemory
sys.stdin.read()
memory = SharedMemory(create=True, size=64)
print("RESULT", json.dumps([memory.name, os.environ.get("PROMETHEUS_MULTIPROC_DIR")]), flush=True)
time.sleep(60)
"""


def test_an_engine_leaves_no_shared_memory_and_counts_in_no_server_s_metrics(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/nowhere")
    name, metrics = ask(["-c", _SHARES_MEMORY], {}, False, 60)
    assert metrics is None
    assert not Path("/dev/shm", name).exists()


class FakeEngine:
    """Answers as a good installation does, with a table that raises perplexity by ``rise`` percent."""

    def __init__(self, rise: float = 1.0) -> None:
        self.rise = rise
        self.settings: list[Any] = []

    def __call__(self, request: Request, timeout: float) -> dict[str, Any]:
        self.settings.append(request.engine.get("additional_config"))
        if isinstance(request.forced, Forced):
            decoded = len(request.forced.tokens) - request.forced.first
            return {
                "totals": totals(),
                "prefilled": [-2.0] * decoded,
                "decoded": [-2.0 - math.log1p(self.rise / 100)] * decoded,
            }
        ours = "additional_config" in request.engine
        return {
            "tokens": [[1] * request.max_tokens for _ in request.prompts],
            "logits": [[(17.0, 3.0)] * request.max_tokens for _ in request.prompts],
            "dtype": "bfloat16",
            "totals": totals(100.0, 10.0) if ours else None,
        }


def outcome(model: Path, thresholds: str | None, run: Any, k_screen: str | None = None) -> dict[str, Any]:
    return {check.name: check for check in verify(str(model), thresholds, run, k_screen)}


@pytest.mark.slow
def test_all_checks_pass_and_ask_for_what_a_server_would_run(smollm2: Path):
    run = FakeEngine()
    found = outcome(smollm2, None, run)
    assert list(found) == [
        "install", "entry_points", "kernel", "table", "engine", "tokens", "rows_skipped", "loss"
    ]  # fmt: skip
    assert all(check.passed for check in found.values()), found
    assert "budget loss-0.2% (its last, a server's default)" in found["table"].detail
    shipped = load(Path(__file__).parent.parent / "configs" / "SmolLM2-135M-Instruct.yaml")
    stated = shipped.budget("loss-0.2%").quality
    assert stated is not None
    assert found["rows_skipped"].detail.startswith(
        "budget loss-0.2%, contexts of 1536 to 1728 tokens: 40.0% of V rows read (the table's own text: "
        f"{stated.v_rows_read:.1%} at up to 8192 tokens; the share falls as contexts grow)"
    )
    assert run.settings == [None, {"toptheta": {"thresholds": "none"}}, {"toptheta": {}}]
    screened = FakeEngine()
    outcome(smollm2, None, screened, "int4+4")
    assert screened.settings == [
        None,
        {"toptheta": {"thresholds": "none"}},
        {"toptheta": {"k_screen": "int4+4"}},
    ]
    without = outcome(smollm2, "none", FakeEngine())
    assert list(without) == ["install", "entry_points", "kernel", "table", "engine", "tokens"]
    assert all(check.passed for check in without.values())


def test_a_k_screen_needs_thresholds(capsys: pytest.CaptureFixture[str]):
    assert main(["verify", "--model", "m", "--thresholds", "none", "--k-screen", "int4"]) == 2
    assert "--k-screen int4: θ = −inf leaves nothing to screen" in capsys.readouterr().err


@pytest.mark.slow
def test_a_k_screen_that_cannot_be_is_said_before_engines_start(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(plan, "device_type", lambda: "cpu")
    table = tmp_path / "old.yaml"
    table.write_text(SHIPPED.read_text(encoding="utf-8").partition("key_statistics:")[0], encoding="utf-8")
    model = plan.read_model(str(smollm2))
    with pytest.raises(CheckError, match=f"--k-screen-only --output {re.escape(str(table))}"):
        plan.read_table(model, str(table), "int4+4")
    with pytest.raises(ValueError, match="has no K screen 'int4'; it has: "):
        plan.read_table(model, None, "int4")
    assert plan.read_table(model, None, "int4+4")[0] is not None


@pytest.mark.slow
def test_damaged_tables_fail_cleanly(smollm2: Path, tmp_path: Path):
    text = SHIPPED.read_text(encoding="utf-8")
    damaged = {
        "truncated": text[: len(text) // 2],
        "of another model": text.replace("fingerprint: sha256:4", "fingerprint: sha256:5"),
    }
    for name, content in damaged.items():
        table = tmp_path / f"{name}.yaml"
        table.write_text(content, encoding="utf-8")
        found = outcome(smollm2, str(table), FakeEngine())
        assert str(table) in found["table"].detail
        assert [check.name for check in found.values() if not check.passed] == [
            "table",
            "rows_skipped",
            "loss",
        ]
    found = outcome(smollm2, str(SHIPPED), FakeEngine(rise=300.0))
    assert [check.name for check in found.values() if not check.passed] == ["loss"]


def test_a_dead_engine_fails_what_needs_it(smollm2: Path):
    def dies(request: Request, timeout: float) -> dict[str, Any]:
        raise EngineError("exit status 1: out of memory")

    found = outcome(smollm2, None, dies)
    failed = [check.name for check in found.values() if not check.passed]
    assert failed == ["engine", "tokens", "rows_skipped", "loss"]
    assert "stock vLLM: exit status 1: out of memory" in found["engine"].detail


def test_a_model_that_is_not_there_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", "--model", str(tmp_path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is False
    assert [check["name"] for check in report["checks"] if check["passed"]] == [
        "install",
        "entry_points",
        "kernel",
    ]
    assert set(report["checks"][0]) == {"name", "passed", "detail"}


def test_the_text_is_long_enough_for_the_table(smollm2: Path):
    model = plan.read_model(str(smollm2))
    table, _ = plan.read_table(model, None)
    assert table is not None
    forced = plan.forced_text(model, table)
    assert forced.first >= 1536
    assert len(forced.tokens) - forced.first == 192
    late = table.model_copy(update={"lengths": [8192]})
    with pytest.raises(CheckError, match="skips from 8192 tokens on"):
        plan.forced_text(model, late)


@pytest.mark.parametrize("v2", [False, True], ids=["V1", "V2"])
def test_tokens_are_forced_in_the_way_of_the_model_runner(v2: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compat, "uses_v2_runner", lambda engine: v2)
    way = forcing.forcing_of({"model": "any"})
    assert way.engine == (
        {"enable_trace_replay": True}
        if v2
        else {"logits_processors": ["topt_vllm.verify.forced_tokens:ForcedTokens"]}
    )
    assert way.sampling([7, 9]) == (
        {"trace_decode_token_ids": [7, 9]} if v2 else {"extra_args": {"forced_tokens": [7, 9]}}
    )


@pytest.mark.slow
@pytest.mark.parametrize("v2", [False, True], ids=["V1", "V2"])
def test_vllm_says_which_model_runner_it_takes(smollm2: Path, v2: bool, monkeypatch: pytest.MonkeyPatch):
    """The engine's other arguments count too, so they are those of the request."""
    from vllm.config import vllm as config

    monkeypatch.setattr(config, "HAS_TRITON", v2)
    model = plan.read_model(str(smollm2))
    request = plan.forced_request(model, Forced(model.tokens[:50], 34, 8), "none")
    assert compat.uses_v2_runner(request.engine) is v2


@pytest.mark.engine
def test_both_model_runners_decode_the_text_alike(smollm2: Path):
    """The same log-probabilities and the same counters, though tokens are forced in different ways."""
    model = plan.read_model(str(smollm2))
    request = plan.forced_request(model, Forced(model.tokens[:50], 34, 8), "none")
    # Rounding to 7 bits would differ by runner, for their batches do.
    request = replace(request, engine=request.engine | {"dtype": "float32"})
    programs = (
        ["-m", "topt_vllm.verify.engine_main"],
        [str(Path(__file__).with_name("support") / "v2_engine.py")],
    )
    v1, v2 = (engine.ask(program, asdict(request), False, timeout=600) for program in programs)
    assert len(v1["decoded"]) == len(v1["prefilled"]) == 16
    for found in (v2["decoded"], v2["prefilled"], v1["prefilled"]):
        assert found == pytest.approx(v1["decoded"], abs=1e-3)
    assert v1["totals"] == v2["totals"]
    assert v1["totals"]["toptheta:decode_rows_total"] == v1["totals"]["dense_rows:no_thresholds"] > 0


@pytest.mark.engine
def test_a_real_model_passes(smollm2: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", "--model", str(smollm2)]) == 0, capsys.readouterr().out
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["PASS"] * 9
