"""The plugin's metrics: names, sums over tensor-parallel ranks and dead workers, the log line, the dashboard."""

import json
import logging
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from prometheus_client.parser import text_string_to_metric_families

from topt_vllm.attention.common import Stat, new_statistics
from topt_vllm.backend.exporter import Amounts, Exporter
from topt_vllm.backend.metrics import LayerAccumulators, Recorder, summary

DASHBOARD = Path(__file__).parent.parent / "docs" / "grafana-dashboard.json"
TABLE = {"name": "a.yaml", "sha256": "12ab", "budget": "128", "model": "m", "fingerprint": "sha256:34"}


def samples(registry: CollectorRegistry) -> dict[str, float]:
    """Samples as they appear in /metrics, without those that say when a counter was made."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return {name: value for name, value in found.items() if "_created" not in name}


def decoded(rows: int, keys: int, read: int, heads: int, kv_heads: int) -> torch.Tensor:
    """Accumulators after ``rows`` rows with ``keys`` keys.

    ``read`` of them are kept and twice as many candidates, whose K is read; a quarter of the mass is dropped.
    """
    statistics = new_statistics()[0]
    for stat, amount in {
        Stat.ROWS: rows,
        Stat.ELEMENTS: rows * keys * heads,
        Stat.KEPT_ELEMENTS: rows * read * heads,
        Stat.V_ROWS: rows * keys * kv_heads,
        Stat.V_ROWS_READ: rows * read * kv_heads,
        Stat.K_ROWS_READ: rows * min(2 * read, keys) * kv_heads,
        Stat.CANDIDATES: rows * min(2 * read, keys) * kv_heads,
        Stat.DROPPED_MASS: rows * heads / 4,
    }.items():
        statistics[stat] = amount
    return statistics


def rank_amounts(rank: int, ranks: int, heads: int, kv_heads: int, replicas: float) -> dict[str, float]:
    """Metrics of a rank with one sparse layer and one that vLLM serves."""
    registry = CollectorRegistry()
    recorder = Recorder(registry)
    recorder.describe(TABLE, rank, ranks, per_layer=True)
    recorder.add_layer(LayerAccumulators(decoded(5, 100, 10, heads, kv_heads), heads, replicas, "1"))
    recorder.count_platform_rows("sliding_window", torch.tensor([64, 20]), heads, kv_heads / replicas)
    recorder.close()
    return samples(registry)


def test_names_and_values_in_metrics():
    assert rank_amounts(0, 1, heads=4, kv_heads=2, replicas=1) == {
        "toptheta:attention_elements_total": (5 * 100 + 84) * 4,
        "toptheta:attention_elements_kept_total": (5 * 10 + 84) * 4,
        "toptheta:v_rows_total": (5 * 100 + 84) * 2,
        "toptheta:v_rows_read_total": (5 * 10 + 84) * 2,
        "toptheta:k_rows_read_total": (5 * 20 + 84) * 2,
        "toptheta:k_candidates_total": (5 * 20 + 84) * 2,
        "toptheta:dropped_mass_sum": 5.0,
        "toptheta:dropped_mass_count": (5 + 2) * 4,
        'toptheta:decode_rows_total{mode="dense",reason="sliding_window"}': 2,
        'toptheta:decode_rows_total{mode="sparse",reason=""}': 5,
        "toptheta:table_info{" + ",".join(f'{name}="{TABLE[name]}"' for name in sorted(TABLE)) + "}": 1,
        'toptheta:layer_v_rows_total{layer="1"}': 5 * 100 * 2,
        'toptheta:layer_v_rows_read_total{layer="1"}': 5 * 10 * 2,
    }


def test_layers_of_a_later_engine_add_to_those_of_the_same_number():
    """A notebook may start one engine after the other in its own process."""
    registry = CollectorRegistry()
    recorder = Recorder(registry)
    recorder.describe(TABLE, 0, 1, per_layer=True)
    for rows in (5, 2):
        recorder.add_layer(LayerAccumulators(decoded(rows, 100, 10, 4, 2), 4, label="1"))
        recorder.export()
    recorder.close()
    found = samples(registry)
    assert found['toptheta:layer_v_rows_total{layer="1"}'] == 7 * 100 * 2
    assert found["toptheta:v_rows_total"] == 7 * 100 * 2


@pytest.mark.parametrize(("kv_heads", "ranks"), [(4, 2), (2, 2), (1, 2), (2, 4), (1, 4)])
def test_ranks_sum_to_what_one_rank_counts(kv_heads: int, ranks: int):
    """Also where there are more ranks than KV heads, so that several ranks hold the same one."""
    alone = rank_amounts(0, 1, heads=4, kv_heads=kv_heads, replicas=1)
    share = max(1, kv_heads // ranks)
    summed: Counter[str] = Counter()
    for rank in range(ranks):
        summed.update(rank_amounts(rank, ranks, 4 // ranks, share, share * ranks / kv_heads))
    info = next(name for name in alone if "table_info" in name)
    assert summed.pop(info) == ranks  # vLLM's /metrics takes the maximum
    assert {name: value for name, value in summed.items() if value} == {
        name: value for name, value in alone.items() if name != info
    }


WORKER = """
import os, sys, torch
from topt_vllm.attention.common import Stat, new_statistics
from topt_vllm.backend.metrics import LayerAccumulators, recorder
statistics = new_statistics()[0]
recorder().describe(dict(name=sys.argv[1], sha256="", budget="", model="", fingerprint=""), 0, 1, False)
recorder().add_layer(LayerAccumulators(statistics, 4))
statistics += float(sys.argv[2])
recorder().count_dense_rows("dense_layer", int(sys.argv[2]))
recorder().export()
os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_a_worker_that_was_killed_stays_in_the_sum_and_its_table_does_not(tmp_path: Path):
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for table, amount in (("old", "3"), ("new", "4")):
        run = subprocess.run(
            [sys.executable, "-c", WORKER, table, amount],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.returncode == -9, run.stderr
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, str(tmp_path))
    found = samples(registry)
    assert found["toptheta:v_rows_total"] == 7
    assert found["toptheta:dropped_mass_sum"] == 7
    assert found["toptheta:dropped_mass_count"] == 7 * 4
    assert found['toptheta:decode_rows_total{mode="dense",reason="dense_layer"}'] == 7
    tables = [name for name in found if "table_info" in name]
    assert len(tables) == 1
    assert 'name="new"' in tables[0]


def test_ranks_that_start_together_may_clear_up_after_the_same_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What one has found the other has removed meanwhile."""
    pids = [2**22 + 1, 2**22 + 2]  # beyond those that Linux gives
    for pid in pids:
        (tmp_path / f"gauge_livemax_{pid}.db").touch()
    remove = os.remove

    def remove_twice(path: str) -> None:
        remove(path)
        remove(path)

    monkeypatch.setattr(os, "remove", remove_twice)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    Exporter(CollectorRegistry())
    assert list(tmp_path.iterdir()) == []


def test_rows_of_the_platforms_kernel_are_told_apart():
    """Rows are dense for one reason, whoever reads them; the first rank alone counts them."""
    for rank, rows in ((0, 2.0), (1, None)):
        recorder = Recorder(CollectorRegistry())
        recorder.describe(TABLE, rank, 2, per_layer=False)
        recorder.count_dense_rows("no_thresholds", 5)
        recorder.count_platform_rows("no_thresholds", torch.tensor([64, 20]), 4, 2.0)
        recorder.close()
        totals = recorder.totals()
        assert totals.get("platform_rows:no_thresholds") == rows
        assert totals.get("dense_rows:no_thresholds") == (7.0 if rows else None)


def test_rows_counted_before_they_are_decoded_never_look_sparse():
    """A layer says that rows are dense before it decodes them, and an export may come in between."""
    registry = CollectorRegistry()
    recorder = Recorder(registry)
    statistics = new_statistics()[0]
    recorder.add_layer(LayerAccumulators(statistics, 4))
    for _ in range(3):
        recorder.count_dense_rows("no_thresholds", 2)
        recorder.export()
        statistics[Stat.ROWS] += 2
        recorder.export()
    recorder.close()
    found = samples(registry)
    assert found['toptheta:decode_rows_total{mode="sparse",reason=""}'] == 0
    assert found['toptheta:decode_rows_total{mode="dense",reason="no_thresholds"}'] == 6


def test_the_log_line_says_what_an_interval_read_and_why_rows_were_dense():
    before = Amounts(decoded(8, 100, 100, 4, 2).tolist(), 32.0, Counter(no_thresholds=8))
    after = Amounts(
        (decoded(8, 100, 100, 4, 2) + decoded(8, 100, 10, 4, 2)).tolist(),
        64.0,
        Counter(no_thresholds=8, dense_layer=2, short_context=4),
    )
    assert summary(after, after) is None
    assert summary(after, before) == (
        "V rows read: 10.0%, keys kept by a head: 10.0%, rows decoded (all layers): 8, "
        "dense: 75.0% (short_context 50.0%, dense_layer 25.0%)"
    )
    screened = summary(after, before, screened=True)
    assert screened is not None
    assert screened.startswith(
        "V rows read: 10.0%, K rows read: 20.0%, candidates: 20.0%, keys kept by a head: "
    )


def test_the_log_line_has_rows_of_k_where_they_are_screened(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    for screened in (False, True):
        recorder = Recorder(CollectorRegistry())
        recorder.describe(TABLE, 0, 1, per_layer=False, screened=screened)
        recorder.add_layer(LayerAccumulators(decoded(8, 100, 10, 4, 2), 4))
        with caplog.at_level(logging.INFO):
            recorder._log()
        recorder.close()
        assert ("K rows read: 20.0%, candidates: 20.0%" in caplog.text) == screened


def test_the_dashboard_asks_for_metrics_that_exist():
    exported = {name.partition("{")[0] for name in rank_amounts(0, 1, 4, 2, 1)}
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
        for name in re.findall(r"toptheta:\w+", target["expr"])
    }
    assert asked == exported
