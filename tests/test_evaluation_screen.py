"""Top-Theta behind a K screen in an evaluation: the reference operator's rows, what it counts, and the command."""

import json
import shlex
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from table_factory import make_key_statistics, make_table
from tiny_models import SMALL, save_model, save_text
from transformers import Gemma3TextConfig

from topt_vllm.attention.common import (
    SCREEN_LIMITS,
    KeyScreen,
    ScreenLimits,
    Selection,
    Stat,
    Thetas,
    new_statistics,
)
from topt_vllm.attention.cpu import launcher
from topt_vllm.attention.reference import attend_row
from topt_vllm.attention.screen import ScreenTransform, rotation_signs
from topt_vllm.cli.main import main
from topt_vllm.evaluation.rules.screened import ScreenedTopTheta
from topt_vllm.evaluation.screens import Screen
from topt_vllm.replay import scores as scores_module
from topt_vllm.replay.rule import attend
from topt_vllm.replay.scores import LayerCall
from topt_vllm.replay.top_theta import TopTheta
from topt_vllm.table.file import dump
from topt_vllm.table.identity import identify
from topt_vllm.table.schema import ThresholdTable

HEADS, KV_HEADS, DIM, N, FIRST = 4, 2, 16, 150, 120


def layer(softcap: float = 0.0) -> tuple[LayerCall, ScreenTransform, Thetas]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(HEADS, N - FIRST, DIM, generator=generator)
    key = 2 + torch.randn(KV_HEADS, N, DIM, generator=generator)
    value = torch.randn(KV_HEADS, N, DIM, generator=generator)
    call = LayerCall(3, query, key, value, 0.4, softcap, first=FIRST)
    transform = ScreenTransform(key.mean(1), key.std(1), rotation_signs(0, DIM))
    theta = call.scores(torch.arange(FIRST, N)).quantile(0.9, dim=2).mean(1)
    thetas = Thetas(torch.tensor([125, N]), theta[:, None].expand(HEADS, 2), torch.zeros(HEADS, 2))
    return call, transform, thetas


@pytest.mark.parametrize("min_seq_len", [0, 135])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("margin", [0.0, 2.5, None])
@pytest.mark.parametrize("format", ["int4", "int4+4"])
def test_rows_at_once_are_the_reference_s(
    format: Any, margin: Any, softcap: float, min_seq_len: int, monkeypatch
):
    """Rows below 125 tokens have no thresholds, so they aren't screened; nor are those up to ``min_seq_len``."""
    monkeypatch.setattr(scores_module, "_CHUNK_ELEMENTS", 4000)
    call, transform, thetas = layer(softcap)
    counted: list[Any] = []
    rule = ScreenedTopTheta({3: thetas}, transform, format, margin, min_seq_len)
    out = attend(call, rule, lambda rows, outcome: counted.append(outcome))
    statistics = new_statistics()
    for row in range(FIRST, N):
        expected = attend_row(
            call.query[:, row - FIRST],
            call.key[:, : row + 1],
            call.value[:, : row + 1],
            thetas.at(row + 1),
            Selection(),
            call.scale,
            softcap,
            statistics=statistics[0],
            key_screen=KeyScreen(format, transform, torch.empty(0), margin, min_seq_len),
        )
        torch.testing.assert_close(out[:, row - FIRST], expected, rtol=1e-4, atol=1e-5)
    counts = statistics[0]
    assert sum(found.candidates for found in counted) == counts[Stat.CANDIDATES] < counts[Stat.V_ROWS]
    assert sum(int(found.kept.sum()) for found in counted) == counts[Stat.KEPT_ELEMENTS]
    assert sum(found.read for found in counted) == counts[Stat.V_ROWS_READ]
    beside = (2 if margin is not None else 4) / (2 * DIM)
    cost = 1.0 if format == "int4" else 0.25
    in_full = KV_HEADS * sum(n for n in range(FIRST + 1, N + 1) if n <= min_seq_len)
    expected_k = in_full + (0.25 + beside) * (float(counts[Stat.V_ROWS]) - in_full)
    expected_k += cost * (float(counts[Stat.CANDIDATES]) - in_full)
    assert sum(found.k_rows for found in counted) == pytest.approx(expected_k)


def test_layers_that_let_too_many_through_have_no_screen():
    _, transform, thetas = layer()
    rule = TopTheta({0: thetas, 1: thetas, 2: thetas})
    transforms = dict.fromkeys(range(3), transform)
    shares = {0: 0.36, 1: 0.38}
    kinds = [type(found) for found in Screen("int4", 2.5, transforms).rules(rule, [0, 1, 2], shares).values()]
    assert kinds == [ScreenedTopTheta, TopTheta, ScreenedTopTheta]
    both = Screen("int4+4", 2.5, transforms).rules(rule, [0], {})[0]
    assert isinstance(both, ScreenedTopTheta)
    assert both.min_seq_len == launcher.capabilities.screens["int4+4"].min_seq_len == 1024
    assert all(found is rule for found in Screen(None, 2.5, {}).rules(rule, [0, 1], {}).values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("model")
    windows = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
    save_model(made, Gemma3TextConfig(**SMALL, **windows))
    save_text(made / "play.txt", 700)
    table = table_of(made)
    statistics = make_key_statistics(table.model)
    dump(table.model_copy(update={"key_statistics": statistics}), made / "toptheta.yaml")
    return made


def table_of(folder: Path) -> ThresholdTable:
    identity = identify(transformers.AutoConfig.from_pretrained(folder), "tiny")
    return make_table(identity, lengths=[64, 128, 256], dense_layers=())


def command(folder: Path, *more: str) -> list[str]:
    text = ("--dataset", str(folder / "play.txt"), "--max-seq-length", "320", "--device", "cpu")
    return ["evaluate", "--model", str(folder), *text, "--decode-rows", "40", *more]


def test_records_pair_a_screen_with_none(folder, tmp_path, capsys, monkeypatch):
    # Made contexts are shorter than those that the CPU kernel screens.
    monkeypatch.setitem(cast(dict, SCREEN_LIMITS), "int4+4", ScreenLimits(largest_share=0.2))
    out = tmp_path / "out.json"
    asked = shlex.split("--k-screen off int4 int4+4 --rules toptheta topk --rows 0.6 --budget 64")
    more = ("--needles", "260", "--depths", "1", "--generate", "30", "--json", str(out))
    assert main(command(folder, *asked, *more)) == 0
    printed = capsys.readouterr().out
    records = json.loads(out.read_text())
    screens = ["off", "int4", "int4+4"]
    for text in ("play.txt", "needles", "generated"):
        here = [record for record in records if record["text"] == text]
        assert [(r["rule"], r["k"], r["k_screen"]) for r in here] == [
            *(("toptheta", 64, screen) for screen in screens),
            *(("toptheta", None, screen) for screen in screens),
            ("topk", None, "off"),
        ]
        assert "kv_bytes_read" not in here[-1]
        off, int4, both = here[:3]
        assert (off["k_screen_margin"], int4["k_screen_margin"]) == (None, 2.5)
        assert off["candidates_by_layer"] == [1.0] * 3
        assert int4["candidates_by_layer"][0] == 1.0
        assert int4["candidates_by_layer"] == pytest.approx(both["candidates_by_layer"], abs=0.1)
        assert off["kv_bytes_read"] == pytest.approx((1 + off["v_rows_read"]) / 2, abs=1e-5)
        assert both["kv_bytes_read"] < int4["kv_bytes_read"]
        assert int4["loss_pct"] == pytest.approx(off["loss_pct"], abs=0.5)
        assert int4["v_rows_read"] == pytest.approx(off["v_rows_read"], abs=0.01)
    assert "K screen int4+4 at margin 2.5" in printed
    assert "of K and V read" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--k-screen", "int4", "--rules", "topk"], "--k-screen int4 is for the rule toptheta"),
        (["--k-screen", "int4", "--k-screen-margin", "-1"], "--k-screen-margin is -1.0; it must be"),
        (["--k-screen", "int4", "--k-screen-margin", "nan"], "--k-screen-margin is nan; it must be"),
        (["--k-screen-margin", "3"], "--k-screen-margin is that of a K screen; name one with --k-screen"),
    ],
)
def test_options_that_are_refused(folder, more, message, capsys):
    assert main(command(folder, *more)) == 2
    assert message in capsys.readouterr().err


def test_a_table_that_knows_no_keys_is_refused(folder, tmp_path, capsys):
    path = tmp_path / "old.yaml"
    dump(table_of(folder), path)
    assert main(command(folder, "--k-screen", "off", "int4", "--thresholds", str(path))) == 2
    error = capsys.readouterr().err
    assert f"{path} has no key_statistics" in error
    assert (
        f"topt-vllm calibrate --model {folder} --dataset TEXT_FILE.txt --k-screen-only --output {path}"
        in error
    )
